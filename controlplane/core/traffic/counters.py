"""What gateways count, and what the controller makes of it: demand, outcomes and latencies per tier and
endpoint.

A gateway's figures only grow (:class:`TrafficCounters`), so a report that is lost loses nothing: the next one
has it. The controller adds up what all gateways counted since it first heard of each
(:class:`TrafficLedger`), and looks back by the difference of two readings (:class:`TrafficWindow`). A
gateway that starts anew starts at zero, which the book notices by its id.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final

from controlplane.core.domain.slo import Slo
from controlplane.core.telemetry.series import FreshnessLimits, Signal, histogram_quantile, missing, signal_of

LATENCY_BOUNDS_S: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0, math.inf),
)
"""Upper bounds of the latency buckets, in seconds."""
_NO_COUNTS: Final = (0,) * len(LATENCY_BOUNDS_S)
WINDOW_S: Final = 300.0
"""How far a window looks back at most, unless said otherwise."""
POINTS_KEPT: Final = 240
"""Readings that a window holds, about: they are thinned so that the whole of it fits."""


@dataclass(frozen=True, slots=True)
class TrafficCounters:
    """Requests of one tier or endpoint, counted since the gateway began. A tier has both what was meant for
    it (``arrived``, ``judged``, ``missed``, ``away``) and what it served (the rest); an endpoint only what
    it served."""

    subject: str
    """A tier's name or an endpoint's id."""
    arrived: int = 0
    """Requests that were meant for it, whatever became of them."""
    judged: int = 0
    """Of those, that ended by themselves and not by the client's fault or wish."""
    missed: int = 0
    """Of those, that did not keep the tier's SLO; what failed or was shed never did."""
    away: int = 0
    """Requests meant for it that another tier served (spilled or bridged)."""
    ok: int = 0
    failed: int = 0
    shed: int = 0
    """Not admitted, or past their deadline."""
    retried: int = 0
    """Attempts after the first."""
    resumed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    gpu_s: float = 0.0
    latency_s: float = 0.0
    """Sum over ``ok``, from arrival to the end of the answer."""
    latency_counts: tuple[int, ...] = _NO_COUNTS
    """Of the same, by :data:`LATENCY_BOUNDS_S`; each bucket by itself."""
    ttft_counts: tuple[int, ...] = _NO_COUNTS
    """Times to the first byte of streamed answers."""
    waiting: int = 0
    """Now, in the gateway's queue; not a count."""
    in_flight: int = 0
    """Now, at the engines; not a count."""
    latency_max_s: float = 0.0
    """Of the last 10 to 20 seconds; not a count."""

    @property
    def served(self) -> int:
        """Requests that ended here, however."""
        return self.ok + self.failed + self.shed


_COUNTS: Final = tuple(
    field.name
    for field in fields(TrafficCounters)
    if field.name not in ("subject", "waiting", "in_flight", "latency_max_s", "latency_counts", "ttft_counts")
)


def _combine(a: TrafficCounters, b: TrafficCounters, sign: int) -> TrafficCounters:
    values = {name: getattr(a, name) + sign * getattr(b, name) for name in _COUNTS}
    return replace(
        a,
        **values,
        latency_counts=tuple(x + sign * y for x, y in zip(a.latency_counts, b.latency_counts, strict=True)),
        ttft_counts=tuple(x + sign * y for x, y in zip(a.ttft_counts, b.ttft_counts, strict=True)),
    )


def since(later: TrafficCounters, earlier: TrafficCounters) -> TrafficCounters:
    """What was counted between two readings; what is no count stays as it was at the later one."""
    return _combine(later, earlier, -1)


def within_slo(slo: Slo, *, ttft_s: float | None, itl_s: float | None, total_s: float, tokens: int) -> bool:
    """Whether an answer kept the SLO. ``ttft_s`` None: it came in one piece, and then it may take as long as
    a streamed one that just keeps it; ``itl_s`` is the mean time per token after the first, None if there is
    none."""
    if total_s > slo.total_s:
        return False
    if ttft_s is None:
        return total_s <= slo.ttft_s + slo.itl_s * max(tokens - 1, 0)
    return ttft_s <= slo.ttft_s and (itl_s is None or itl_s <= slo.itl_s)


def quantile_s(counts: Sequence[int], quantile: float) -> float | None:
    """In seconds, of counts by :data:`LATENCY_BOUNDS_S`; None if there are none."""
    total = 0
    cumulative = []
    for count in counts:
        total += count
        cumulative.append(float(total))
    return histogram_quantile(quantile, LATENCY_BOUNDS_S, tuple(cumulative))


class TrafficLedger:
    """All gateways together."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, TrafficCounters]] = {}
        """Gateway → subject → its last reading."""
        self._heard_s: dict[str, float] = {}
        self._sum: dict[str, TrafficCounters] = {}

    def observe(self, gateway_id: str, traffic: Iterable[TrafficCounters], now_s: float) -> None:
        """A gateway's report. What it counted before its first report to this book is not news."""
        before = self._last.get(gateway_id)
        self._heard_s[gateway_id] = now_s
        readings = {item.subject: item for item in traffic}
        if before is not None:
            for subject, item in readings.items():
                base = before.get(subject) or TrafficCounters(subject)
                if item.arrived < base.arrived or item.served < base.served:
                    base = TrafficCounters(subject)
                gained = since(item, base)
                known = self._sum.get(subject)
                self._sum[subject] = gained if known is None else _combine(known, gained, 1)
        else:
            for subject in readings:
                self._sum.setdefault(subject, TrafficCounters(subject))
        self._last[gateway_id] = readings

    def forget(self, gateway_id: str) -> None:
        """The gateway is gone; what it counted stays counted."""
        self._last.pop(gateway_id, None)
        self._heard_s.pop(gateway_id, None)

    def forget_others(self, gateway_ids: Collection[str]) -> None:
        """Those that are none of these are gone."""
        for gateway_id in self._last.keys() - set(gateway_ids):
            self.forget(gateway_id)

    def keep_only(self, subjects: Iterable[str]) -> None:
        """Forget what is about nobody else."""
        wanted = set(subjects)
        for subject in self._sum.keys() - wanted:
            del self._sum[subject]

    def last(self, gateway_id: str, subject: str) -> TrafficCounters:
        """A gateway's last reading of a subject; zeros if there is none."""
        return self._last.get(gateway_id, {}).get(subject) or TrafficCounters(subject)

    def reading(self, subject: str) -> TrafficCounters:
        """Everything counted of a subject so far, and its present as of the last reports."""
        base = self._sum.get(subject) or TrafficCounters(subject)
        parts = [readings[subject] for readings in self._last.values() if subject in readings]
        return replace(
            base,
            waiting=sum(part.waiting for part in parts),
            in_flight=sum(part.in_flight for part in parts),
            latency_max_s=max((part.latency_max_s for part in parts), default=0.0),
        )

    @property
    def gateways(self) -> Mapping[str, float]:
        """When each was last heard of."""
        return MappingProxyType(self._heard_s)

    def heard_s(self) -> float | None:
        """When the gateway that was silent for longest was last heard of; None: there is none."""
        return min(self._heard_s.values(), default=None)


class TrafficWindow:
    """One subject's last minutes."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._points: deque[tuple[float, TrafficCounters]] = deque()
        self.remember(window_s)

    def remember(self, window_s: float) -> None:
        """Look back so far from now on; what is remembered already stays as far as it is inside."""
        self._window_s = window_s
        self._apart_s = window_s / POINTS_KEPT

    def observe(self, reading: TrafficCounters, now_s: float) -> None:
        """A reading of the book. One that counts less than the last begins a new window: the book was made
        anew."""
        points = self._points
        if points and (reading.arrived < points[-1][1].arrived or reading.served < points[-1][1].served):
            points.clear()
        # The last one is always kept, and stays when the next comes only if it is far enough from its own
        # last: what is counted goes on, so nothing is lost but where exactly a window may begin.
        if len(points) >= 2 and points[-1][0] - points[-2][0] < self._apart_s:
            points.pop()
        points.append((now_s, reading))
        while len(points) > 2 and points[1][0] <= now_s - self._window_s:
            points.popleft()

    def __len__(self) -> int:
        """Readings that it holds."""
        return len(self._points)

    def back(self, seconds: float) -> tuple[TrafficCounters, float] | None:
        """What was counted in the last ``seconds``, and over how many seconds that is, the nearest that the
        readings allow; None until there are two."""
        points = self._points
        if len(points) < 2:
            return None
        last_s, last = points[-1]
        older = (point for point in reversed(points) if point[0] <= last_s - seconds)
        at_s, base = next(older, points[0])
        if at_s >= last_s:
            return None
        return since(last, base), last_s - at_s


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One tier's last minutes, for alerts, advice and reports. Shares and percentiles of no request are
    MISSING."""

    requests_per_s: Signal
    arrivals_per_s: Signal
    failed_ratio: Signal
    """Of the requests it served, those that failed."""
    shed_ratio: Signal
    """Of the requests meant for it or served by it, those that were not admitted or came too late."""
    retried_ratio: Signal
    ttft_p95_s: Signal
    latency_p95_s: Signal
    attainment: Signal
    waiting: Signal
    in_flight: Signal


def figures(
    window: TrafficWindow,
    reading: TrafficCounters,
    heard_s: float | None,
    now_s: float,
    limits: FreshnessLimits,
    span_s: float = WINDOW_S,
) -> TierFigures:
    """The figures over ``span_s``, as fresh as the gateway that was silent for longest."""
    if heard_s is None:
        nothing = missing("no gateway has reported")
        return TierFigures(*(nothing,) * 10)

    def signal(value: float | None, why: str) -> Signal:
        return missing(why) if value is None else signal_of(value, heard_s, now_s, limits)

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole > 0 else None

    waiting, in_flight = signal(reading.waiting, ""), signal(reading.in_flight, "")
    found = window.back(span_s)
    if found is None:
        nothing = missing("the gateways have reported once only")
        return TierFigures(*(nothing,) * 8, waiting, in_flight)
    counted, over_s = found
    none_ended = "no request ended in the window"
    return TierFigures(
        signal(counted.served / over_s, ""),
        signal(counted.arrived / over_s, ""),
        signal(share(counted.failed, counted.served), none_ended),
        signal(share(counted.shed, counted.served), none_ended),
        signal(share(counted.retried, counted.served), none_ended),
        signal(quantile_s(counted.ttft_counts, 0.95), "no stream ended in the window"),
        signal(quantile_s(counted.latency_counts, 0.95), none_ended),
        signal(share(counted.judged - counted.missed, counted.judged), none_ended),
        waiting,
        in_flight,
    )


def named(figures: Mapping[str, TierFigures]) -> dict[str, dict[str, Signal]]:
    """Figure (``tier/NAME``) → tier → signal."""
    return {
        f"tier/{field.name}": {tier: getattr(value, field.name) for tier, value in figures.items()}
        for field in fields(TierFigures)
    }
