"""Scorers, one function for each criterion, and the picker that compares two endpoints of a tier.

A score is in [0, 1], 1 is best. The picker takes the better of two endpoints (M. Mitzenmacher, "The power of
two choices in randomized load balancing", 2001). This spreads load nearly as evenly as taking the best of
all, and gateways with the same slightly outdated snapshot don't all choose the same endpoint. Randomness
comes from the caller as ``pick``, a non-negative integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from controlplane.core.routing.endpoint_table import EndpointLoad, LoadSettings

NEUTRAL: Final = 0.5
"""The score if nothing is known."""

WEIGHTS: Final = {
    "in_flight": 3.0,
    "queue": 2.0,
    "kv_cache": 2.0,
    "latency": 1.0,
    "alive": 8.0,
    "affinity": 3.0,
}
"""Weight of each scorer. Requests in flight are known exactly, so among the measures of load they weigh most.
A half-alive endpoint loses against any other. Affinity weighs as much as requests in flight, but only for an
endpoint without overload (:func:`affinity`)."""

AFFINITY_KV_LIMIT_RATIO: Final = 0.9
AFFINITY_EXCESS: Final = 1.25
"""Affinity applies while the endpoint has at most this many times the tier's mean load, plus one (bounded
loads: V. Mirrokni, M. Thorup, M. Zadimoghaddam, "Consistent hashing with bounded loads", 2018)."""

_W_IN_FLIGHT: Final = WEIGHTS["in_flight"]
_W_QUEUE: Final = WEIGHTS["queue"]
_W_KV: Final = WEIGHTS["kv_cache"]
_W_LATENCY: Final = WEIGHTS["latency"]
_W_ALIVE: Final = WEIGHTS["alive"]
_W_AFFINITY: Final = WEIGHTS["affinity"]
_WEIGHT_SUM: Final = sum(WEIGHTS.values())


def in_flight(load: EndpointLoad) -> float:
    """The free share of the endpoint's slots, counting the requests of all gateways."""
    limit = load.endpoint.concurrency_limit
    if limit <= 0:
        return 0.0
    free = 1.0 - (load.in_flight + load.others_in_flight) / limit
    return free if free > 0.0 else 0.0


def queue(load: EndpointLoad, now_s: float, settings: LoadSettings) -> float:
    """How short the engine's own queue is: 0 when it is as long as the concurrency limit."""
    if load.waiting is None:
        return NEUTRAL
    if now_s - load.observed_s > settings.stale_after_s:
        return 0.0
    limit = load.endpoint.concurrency_limit
    free = 1.0 - load.waiting / limit if limit > 0 else 0.0
    return free if free > 0.0 else 0.0


def kv_cache(load: EndpointLoad, now_s: float, settings: LoadSettings) -> float:
    """The free share of the KV cache."""
    ratio = load.kv_usage_ratio
    if ratio is None:
        return NEUTRAL
    if now_s - load.observed_s > settings.stale_after_s or ratio >= 1.0:
        return 0.0
    return 1.0 - ratio if ratio > 0.0 else 1.0


def latency(load: EndpointLoad, now_s: float, settings: LoadSettings) -> float:
    """Time to first token compared with the tier's: 1/2 if equal, approaching 1 if much faster."""
    own_s = load.ttft_s
    if own_s is None or load.pool is None or now_s - load.sampled_s > settings.latency_memory_s:
        return NEUTRAL
    usual_s = load.pool.ttft_s
    if usual_s is None or usual_s + own_s <= 0.0:
        return NEUTRAL
    return usual_s / (usual_s + own_s)


def alive(load: EndpointLoad, now_s: float, settings: LoadSettings) -> float:
    """0 if the endpoint is suspected of being half-alive: requests wait for their first token, and it sends
    nothing."""
    if not load.awaiting_first:
        return 1.0
    silent_s = now_s - load.last_sign_s
    if silent_s <= settings.silent_after_s or silent_s <= 4.0 * (load.ttft_s or 0.0):
        return 1.0
    return 0.0


def affinity(load: EndpointLoad, now_s: float, settings: LoadSettings) -> float:
    """The score of the endpoint that a session or prefix belongs to (:func:`home`): 1, or 0 if it is
    overloaded, so that it is compared like any other."""
    pool = load.pool
    if pool is None:
        return 0.0
    if pool.limit > 0 and load.in_flight * pool.limit > (
        AFFINITY_EXCESS * pool.in_flight * load.limit + pool.limit
    ):
        return 0.0
    if load.waiting is not None or load.kv_usage_ratio is not None:
        if now_s - load.observed_s > settings.stale_after_s:
            return 0.0
        if load.waiting or (load.kv_usage_ratio or 0.0) >= AFFINITY_KV_LIMIT_RATIO:
            return 0.0
    return 1.0


def home(loads: Sequence[EndpointLoad], key: int) -> int:
    """The index of the endpoint that ``key`` belongs to: rendezvous hashing (D. Thaler, C. Ravishankar,
    1998). When endpoints come or go, only the keys of those endpoints move."""
    # Python's hash of a tuple of integers (xxHash) is the same in every process.
    marks = [hash((key, load.seed)) for load in loads]
    return marks.index(max(marks))


def scores(load: EndpointLoad, now_s: float, settings: LoadSettings, at_home: bool) -> dict[str, float]:
    """The score of every scorer by name, for explanations."""
    return {
        "in_flight": in_flight(load),
        "queue": queue(load, now_s, settings),
        "kv_cache": kv_cache(load, now_s, settings),
        "latency": latency(load, now_s, settings),
        "alive": alive(load, now_s, settings),
        "affinity": affinity(load, now_s, settings) if at_home else 0.0,
    }


def total(load: EndpointLoad, now_s: float, settings: LoadSettings, at_home: bool) -> float:
    """The weighted mean of all scorers."""
    value = (
        _W_IN_FLIGHT * in_flight(load)
        + _W_QUEUE * queue(load, now_s, settings)
        + _W_KV * kv_cache(load, now_s, settings)
        + _W_LATENCY * latency(load, now_s, settings)
        + _W_ALIVE * alive(load, now_s, settings)
    )
    if at_home:
        value += _W_AFFINITY * affinity(load, now_s, settings)
    return value / _WEIGHT_SUM


def better_of_two(
    loads: Sequence[EndpointLoad], now_s: float, settings: LoadSettings, pick: int, key: int | None
) -> EndpointLoad:
    """The picker: the better of two of ``loads``, of which there is at least one and which can all take the
    request. With a ``key``, one of the two is the key's home."""
    count = len(loads)
    if count == 1:
        return loads[0]
    at_home = key is not None
    first = home(loads, key) if key is not None else pick % count
    second = (pick // count) % (count - 1)
    if second >= first:
        second += 1
    one, two = loads[first], loads[second]
    if total(two, now_s, settings, False) > total(one, now_s, settings, at_home):
        return two
    return one
