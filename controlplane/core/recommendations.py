"""Advice for people: what a tier lacks or has too much of, what to do, what that would bring, how sure it is.

:func:`advise` looks at the windowed signals of all tiers and gives at most one recommendation for each. Only
fresh signals count: what is stale or missing breaches no threshold, and never makes a tier idle. What came
of an advice, followed or not, is judged by :func:`score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from controlplane.core.capacity import Bounds, Capacity, Work
from controlplane.core.telemetry import Signal, missing

_NOT_MEASURED: Final = missing("not measured")
_FAILING_CONFIDENCE: Final = 0.3
"""More replicas seldom cure errors."""


class Kind(StrEnum):
    """What to do."""

    SCALE_UP = "scale_up"
    """More of a GPU, or more tensor parallelism: each request must become faster."""
    SCALE_OUT = "scale_out"
    """More replicas: there are too many requests."""
    SCALE_DOWN = "scale_down"
    REBALANCE = "rebalance"
    """Move GPUs from an idle tier to one that lacks them."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a figure is a breach."""

    gpu_ratio: float = 0.95
    memory_ratio: float = 0.95
    latency_ms: float = 3000.0
    queue: float = 50.0
    kv_ratio: float = 0.95
    error_ratio: float = 0.10
    idle_gpu_ratio: float = 0.20
    idle_requests_per_s: float = 1.0
    attainment: float = 0.99


@dataclass(frozen=True, slots=True)
class TierCondition:
    """One tier as the last minutes show it."""

    tier: str
    replicas: int
    min_replicas: int = 1
    max_replicas: int = 10
    gpus_per_replica: float = 1.0
    tensor_parallel: int = 1
    gpu_ratio: Signal = _NOT_MEASURED
    """Highest of its GPUs."""
    load_name: str = "GPU utilisation"
    """What ``gpu_ratio`` is where there is no GPU to ask."""
    memory_ratio: Signal = _NOT_MEASURED
    """Of GPU memory, the highest of its GPUs."""
    kv_ratio: Signal = _NOT_MEASURED
    """Of its KV caches, the fullest."""
    latency_ms: Signal = _NOT_MEASURED
    """95th percentile of the whole answer."""
    queue: Signal = _NOT_MEASURED
    error_ratio: Signal = _NOT_MEASURED
    requests_per_s: Signal = _NOT_MEASURED
    attainment: Signal = _NOT_MEASURED
    """Share of the requests that kept the SLO."""
    capacity: Capacity | None = None
    work: Work | None = None
    bounds: Bounds | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What following the advice is expected to bring; None: it can't be told."""

    latency_ms: float | None
    attainment: float | None
    gpus: float
    """More GPUs (or fewer, if negative)."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One advice."""

    instance: str
    kind: Kind
    reasons: tuple[str, ...]
    """Each with its figure and the threshold."""
    suggestion: str
    effect: Effect
    confidence: float
    replicas: int
    """That the tier would have."""
    latency_ms: float | None = None
    """As it was when the advice was given."""
    gpus_per_replica: float = 0.0
    """As it was then."""


@dataclass(frozen=True, slots=True)
class Score:
    """How good an advice was."""

    right: bool
    value: float
    """In [0, 1]."""
    reason: str


@dataclass(slots=True)
class _Breaches:
    """What is over its threshold."""

    saturated: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)


def advise(
    tiers: Sequence[TierCondition], thresholds: Thresholds | None = None, free_gpus: float | None = None
) -> tuple[Recommendation, ...]:
    """At most one recommendation for each tier. ``free_gpus`` None: not known, then they are taken to be
    there."""
    limits = thresholds or Thresholds()
    idle = [tier for tier in tiers if _idle(tier, limits) and tier.replicas > tier.min_replicas]
    found: list[Recommendation] = []
    givers: set[str] = set()
    for tier in tiers:
        breaches = _breaches(tier, limits)
        if breaches.saturated:
            wants = _out(tier, breaches)
            if free_gpus is not None and wants.effect.gpus > free_gpus:
                giver = next((other for other in idle if other.tier not in givers | {tier.tier}), None)
                if giver is not None:
                    givers.add(giver.tier)
                    wants = _moved(wants, giver)
            found.append(wants)
        elif breaches.slow:
            found.append(_up(tier, breaches))
        elif breaches.failing:
            found.append(_failing(tier, breaches))
    advised = {advice.instance for advice in found}
    found += [_down(tier, limits) for tier in idle if tier.tier not in advised | givers]
    return tuple(found)


def score(advice: Recommendation, *, applied: bool, latency_ms: float, attainment: float) -> Score:
    """How good it was, by what was measured afterwards.

    Applied: how near the prediction came. Not applied: whether the trouble it named is still there
    (scale-down: whether there still is none).
    """
    good = attainment >= Thresholds().attainment
    if not applied:
        right = good if advice.kind is Kind.SCALE_DOWN else not good
        return Score(right, float(right), f"not applied; attainment is {attainment:.1%}")
    errors = []
    if advice.effect.latency_ms:
        errors.append(abs(latency_ms - advice.effect.latency_ms) / max(latency_ms, advice.effect.latency_ms))
    if advice.effect.attainment is not None:
        errors.append(min(1.0, abs(attainment - advice.effect.attainment) * 10))
    value = 1.0 - sum(errors) / len(errors) if errors else float(good)
    predicted = "-" if advice.effect.latency_ms is None else f"{advice.effect.latency_ms:.0f}"
    return Score(value >= 0.5, value, f"{latency_ms:.0f} ms measured, {predicted} predicted")


def _breaches(tier: TierCondition, limits: Thresholds) -> _Breaches:
    found = _Breaches()
    gpu, memory, queue = tier.gpu_ratio.fresh, tier.memory_ratio.fresh, tier.queue.fresh
    if gpu is not None and gpu > limits.gpu_ratio:
        found.saturated.append(f"{tier.load_name} is {gpu:.0%}, over {limits.gpu_ratio:.0%}")
    if memory is not None and memory > limits.memory_ratio:
        found.saturated.append(f"GPU memory is {memory:.0%} used, over {limits.memory_ratio:.0%}")
    kv = tier.kv_ratio.fresh
    if kv is not None and kv > limits.kv_ratio:
        found.saturated.append(f"a KV cache is {kv:.0%} full, over {limits.kv_ratio:.0%}")
    if queue is not None and queue > limits.queue:
        found.saturated.append(f"{queue:.0f} requests wait, over {limits.queue:.0f}")
    latency, kept = tier.latency_ms.fresh, tier.attainment.fresh
    if latency is not None and latency > limits.latency_ms:
        found.slow.append(f"latency is {latency:.0f} ms, over {limits.latency_ms:.0f} ms")
    if kept is not None and kept < limits.attainment:
        found.slow.append(f"{kept:.1%} of the requests keep the SLO, under {limits.attainment:.0%}")
    errors = tier.error_ratio.fresh
    if errors is not None and errors > limits.error_ratio:
        found.failing.append(f"{errors:.0%} of the requests fail, over {limits.error_ratio:.0%}")
    return found


def _count(replicas: int) -> str:
    return f"{replicas} replica{'s' * (replicas != 1)}"


def _idle(tier: TierCondition, limits: Thresholds) -> bool:
    gpu, rate, queue = tier.gpu_ratio.fresh, tier.requests_per_s.fresh, tier.queue.fresh
    if gpu is None or rate is None or queue is None:
        return False
    return gpu < limits.idle_gpu_ratio and rate < limits.idle_requests_per_s and queue == 0


def _effect(tier: TierCondition, replicas: int, gpus: float) -> Effect:
    """From the capacity model; the attainment is the share of the arrivals that finds a free slot."""
    rate = tier.requests_per_s.fresh
    if tier.capacity is None or tier.work is None or tier.bounds is None or rate is None or replicas < 1:
        return Effect(None, None, gpus)
    slots = tier.capacity.most_sequences(tier.work, tier.bounds)
    each_per_s = tier.capacity.requests_per_s(tier.work, slots)
    hold_s = tier.capacity.hold_s(min(rate / replicas, each_per_s), tier.work)
    carried = min(1.0, replicas * each_per_s / rate) if rate > 0 else 1.0
    return Effect(hold_s * 1000, carried, gpus)


def _confidence(tier: TierCondition, breaches: int) -> float:
    """More with each breach that agrees, and with what is measured of the engine's speed."""
    measured = tier.capacity.confidence if tier.capacity is not None else 0.0
    return min(0.95, 0.4 + 0.1 * breaches + 0.35 * measured)


def _out(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    reasons = (*breaches.saturated, *breaches.slow, *breaches.failing)
    rate = tier.requests_per_s.fresh
    replicas = tier.replicas + 1
    if tier.capacity is not None and tier.work is not None and tier.bounds is not None and rate is not None:
        replicas = max(replicas, tier.capacity.replicas(rate, tier.work, tier.bounds))
    replicas = min(replicas, max(tier.max_replicas, tier.replicas))
    more = replicas - tier.replicas
    suggestion = f"run {_count(replicas)} instead of {tier.replicas}"
    if not more:
        suggestion = f"raise the most replicas it may have, {tier.max_replicas}: all of them are saturated"
    effect = _effect(tier, replicas, more * tier.gpus_per_replica)
    return _recommend(tier, Kind.SCALE_OUT, reasons, suggestion, effect, replicas)


def _up(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    """Slow although neither the GPUs nor the queue are the limit: more replicas would not help."""
    reasons = (*breaches.slow, "neither GPUs nor queue are saturated", *breaches.failing)
    if not tier.gpus_per_replica:
        suggestion = "give each replica more CPU cores, or take a smaller model or a GPU"
        gpus = 0.0
    elif tier.gpus_per_replica < 1:
        share = min(1.0, tier.gpus_per_replica * 2)
        suggestion = f"give each replica {share:g} of a GPU instead of {tier.gpus_per_replica:g}"
        gpus = (share - tier.gpus_per_replica) * tier.replicas
    else:
        suggestion = (
            f"set tensor_parallel_size to {tier.tensor_parallel * 2} instead of {tier.tensor_parallel}"
        )
        gpus = tier.gpus_per_replica * tier.replicas
    latency = tier.latency_ms.fresh
    # Twice the bandwidth reads the weights in half the time; all-reduces take some of it back.
    faster = latency * 0.6 if latency is not None and tier.gpus_per_replica else None
    effect = Effect(faster, None, gpus)
    return _recommend(tier, Kind.SCALE_UP, reasons, suggestion, effect, tier.replicas)


def _failing(tier: TierCondition, breaches: _Breaches) -> Recommendation:
    reasons = tuple(breaches.failing)
    suggestion = "look at the replicas' diagnoses first; one more replica takes over from those that fail"
    replicas = min(tier.replicas + 1, max(tier.max_replicas, tier.replicas))
    effect = Effect(None, None, (replicas - tier.replicas) * tier.gpus_per_replica)
    advice = _recommend(tier, Kind.SCALE_OUT, reasons, suggestion, effect, replicas)
    return replace(advice, confidence=min(advice.confidence, _FAILING_CONFIDENCE))


def _down(tier: TierCondition, limits: Thresholds) -> Recommendation:
    gpu, rate = tier.gpu_ratio.fresh or 0.0, tier.requests_per_s.fresh or 0.0
    reasons = (
        f"{tier.load_name} is {gpu:.0%}, under {limits.idle_gpu_ratio:.0%}",
        f"{rate:.2f} requests/s, under {limits.idle_requests_per_s:g}",
    )
    replicas = tier.replicas - 1
    effect = _effect(tier, replicas, 0.0 - tier.gpus_per_replica)
    suggestion = f"run {_count(replicas)} instead of {tier.replicas}"
    return _recommend(tier, Kind.SCALE_DOWN, reasons, suggestion, effect, replicas)


def _moved(wants: Recommendation, giver: TierCondition) -> Recommendation:
    return replace(
        wants,
        kind=Kind.REBALANCE,
        reasons=(*wants.reasons, f"no GPU is free, and tier '{giver.tier}' is idle"),
        suggestion=f"take a replica from tier '{giver.tier}' ({giver.replicas} now) and {wants.suggestion}",
        effect=replace(wants.effect, gpus=wants.effect.gpus - giver.gpus_per_replica),
    )


def _recommend(
    tier: TierCondition, kind: Kind, reasons: tuple[str, ...], suggestion: str, effect: Effect, replicas: int
) -> Recommendation:
    confidence = _confidence(tier, len(reasons))
    return Recommendation(
        tier.tier,
        kind,
        reasons,
        suggestion,
        effect,
        confidence,
        replicas,
        tier.latency_ms.fresh,
        tier.gpus_per_replica,
    )
