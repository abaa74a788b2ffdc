"""The counters of gateways, and how the controller derives demand, outcomes and latencies per tier and
endpoint from them.

A gateway's counters only grow (:class:`TrafficCounters`), so a lost report loses nothing: the next one
includes it. The controller adds up what each gateway counted since its first report (:class:`TrafficLedger`),
and computes windows as the difference of two readings (:class:`TrafficWindow`). A gateway that restarts has a
new id and counts from zero.
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
from controlplane.core.traffic.gone_subjects import GoneSubjects

LATENCY_BOUNDS_S: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0, math.inf),
)
"""Upper bounds of the latency buckets, in seconds."""
_NO_COUNTS: Final = (0,) * len(LATENCY_BOUNDS_S)
WINDOW_S: Final = 300.0
"""The default length of a window."""
KEEP_GONE_S: Final = 1500.0
"""How long the counts of a subject that is gone stay: gateways report its last requests only afterwards,
and samples for reports are up to 600 s apart."""
MAX_GONE: Final = 1000
"""Subjects that are gone and whose counts stay; beyond that, the first that went are dropped."""
MAX_POINTS: Final = 240
"""Approximate number of readings in a window; readings that are closer together are thinned out."""


@dataclass(frozen=True, slots=True)
class TrafficCounters:
    """Requests of one tier or endpoint, counted since the gateway started. A tier has counts of the requests
    meant for it (``arrived``, ``judged``, ``missed``, ``served_elsewhere``) and of those it served (the
    rest); an endpoint has only the latter."""

    subject: str
    """A tier's name or an endpoint's id."""
    arrived: int = 0
    """Requests meant for this tier, whatever their outcome."""
    judged: int = 0
    """Part of ``arrived`` that counts for the SLO: neither invalid nor cancelled by the client."""
    missed: int = 0
    """Part of ``judged`` that missed the tier's SLO; failed and shed requests always do."""
    served_elsewhere: int = 0
    """Requests meant for this tier that another tier served (spilled or bridged)."""
    ok: int = 0
    failed: int = 0
    shed: int = 0
    """Not admitted, or expired in the queue."""
    retried: int = 0
    """Attempts after the first."""
    resumed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    latency_s: float = 0.0
    """Sum over ``ok`` of the time from arrival to the end of the response."""
    latency_counts: tuple[int, ...] = _NO_COUNTS
    """The same times as a histogram over :data:`LATENCY_BOUNDS_S`, not cumulative."""
    ttft_counts: tuple[int, ...] = _NO_COUNTS
    """Histogram of the times to the first byte of streamed responses."""
    waiting: int = 0
    """Requests in the gateway's queue now; a gauge, not a count."""
    in_flight: int = 0
    """Requests at the engines now; a gauge."""
    latency_max_s: float = 0.0
    """Maximum latency of the last 10 to 20 seconds; a gauge."""

    @property
    def served(self) -> int:
        """Requests that ended here, whatever their outcome."""
        return self.ok + self.failed + self.shed


COUNTS: Final = tuple(
    field.name
    for field in fields(TrafficCounters)
    if field.name not in ("subject", "waiting", "in_flight", "latency_max_s", "latency_counts", "ttft_counts")
)
"""The fields that are sums; the others are the name, gauges and histograms."""


def _combine(a: TrafficCounters, b: TrafficCounters, sign: int) -> TrafficCounters:
    values = {name: getattr(a, name) + sign * getattr(b, name) for name in COUNTS}
    return replace(
        a,
        **values,
        latency_counts=tuple(x + sign * y for x, y in zip(a.latency_counts, b.latency_counts, strict=True)),
        ttft_counts=tuple(x + sign * y for x, y in zip(a.ttft_counts, b.ttft_counts, strict=True)),
    )


def since(later: TrafficCounters, earlier: TrafficCounters) -> TrafficCounters:
    """What was counted between two readings; gauges are those of the later one."""
    return _combine(later, earlier, -1)


def within_slo(slo: Slo, *, ttft_s: float | None, itl_s: float | None, total_s: float, tokens: int) -> bool:
    """Whether a response met the SLO. ``ttft_s`` is None for a response that was not streamed, which may take
    as long as a streamed one that just meets the SLO. ``itl_s`` is the mean time per token after the first;
    None if there was no second token."""
    if total_s > slo.total_s:
        return False
    if ttft_s is None:
        return total_s <= slo.ttft_s + slo.itl_s * max(tokens - 1, 0)
    return ttft_s <= slo.ttft_s and (itl_s is None or itl_s <= slo.itl_s)


def quantile_s(counts: Sequence[int], quantile: float) -> float | None:
    """A quantile in seconds of a histogram over :data:`LATENCY_BOUNDS_S`; None if the histogram is empty."""
    total = 0
    cumulative = []
    for count in counts:
        total += count
        cumulative.append(float(total))
    return histogram_quantile(quantile, LATENCY_BOUNDS_S, tuple(cumulative))


class TrafficLedger:
    """The counts of all gateways, added up."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, TrafficCounters]] = {}
        """Gateway → subject → last reading."""
        self._reported_s: dict[str, float] = {}
        self._sum: dict[str, TrafficCounters] = {}
        self._gone = GoneSubjects()
        """Subject that is gone → since when, in this order."""

    def observe(self, gateway_id: str, traffic: Iterable[TrafficCounters], now_s: float) -> None:
        """Add a gateway's report. Counts from before its first report to this ledger are not added."""
        before = self._last.get(gateway_id)
        self._reported_s[gateway_id] = now_s
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
        """Remove a gateway; its counts remain in the sums."""
        self._last.pop(gateway_id, None)
        self._reported_s.pop(gateway_id, None)

    def retain_gateways(self, gateway_ids: Collection[str]) -> None:
        """Remove all gateways except these."""
        for gateway_id in self._last.keys() - set(gateway_ids):
            self.forget(gateway_id)

    def retain_subjects(self, subjects: Iterable[str], now_s: float) -> None:
        """Drop the sums of all subjects except these and those that went less than :data:`KEEP_GONE_S` ago;
        of the latter at most :data:`MAX_GONE` stay."""
        gone = self._sum.keys() - set(subjects)
        for name in self._gone.take_expired(gone, now_s, keep_s=KEEP_GONE_S, most=MAX_GONE):
            del self._sum[name]

    def knows(self, subject: str) -> bool:
        """Whether something was counted for the subject and not dropped since."""
        return subject in self._sum

    def last_report(self, gateway_id: str, subject: str) -> TrafficCounters:
        """A gateway's last reading of a subject; zeros if there is none."""
        return self._last.get(gateway_id, {}).get(subject) or TrafficCounters(subject)

    def reading(self, subject: str) -> TrafficCounters:
        """All counts of a subject so far, and its gauges from the last reports."""
        base = self._sum.get(subject) or TrafficCounters(subject)
        parts = [readings[subject] for readings in self._last.values() if subject in readings]
        return replace(
            base,
            waiting=sum(part.waiting for part in parts),
            in_flight=sum(part.in_flight for part in parts),
            latency_max_s=max((part.latency_max_s for part in parts), default=0.0),
        )

    @property
    def reported_s(self) -> Mapping[str, float]:
        """Gateway → when it last reported."""
        return MappingProxyType(self._reported_s)

    def oldest_report_s(self) -> float | None:
        """The last report of the gateway that has been silent for longest; None without gateways."""
        return min(self._reported_s.values(), default=None)


class TrafficWindow:
    """Readings of one subject over the last minutes."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._points: deque[tuple[float, TrafficCounters]] = deque()
        self.set_length(window_s)

    def set_length(self, window_s: float) -> None:
        """Change the length of the window; readings inside it remain."""
        self._window_s = window_s
        self._apart_s = window_s / MAX_POINTS

    def observe(self, reading: TrafficCounters, now_s: float) -> None:
        """Add a reading of the ledger. If its counts are lower than the last ones, the ledger was restarted,
        and the window starts again as well."""
        points = self._points
        if points and (reading.arrived < points[-1][1].arrived or reading.served < points[-1][1].served):
            points.clear()
        # The newest reading always stays, but is replaced by the next unless it is far enough from the one
        # before it. Counts are cumulative, so thinning only makes it less exact where a window can begin.
        if len(points) >= 2 and points[-1][0] - points[-2][0] < self._apart_s:
            points.pop()
        points.append((now_s, reading))
        while len(points) > 2 and points[1][0] <= now_s - self._window_s:
            points.popleft()

    def __len__(self) -> int:
        """The number of readings."""
        return len(self._points)

    def over_last(self, seconds: float) -> tuple[TrafficCounters, float] | None:
        """The counts of approximately the last ``seconds``, and the exact number of seconds that they cover;
        None until there are two readings."""
        points = self._points
        if len(points) < 2:
            return None
        last_s, last = points[-1]
        older = (point for point in reversed(points) if point[0] <= last_s - seconds)
        at_s, base = next(older, points[0])
        if at_s >= last_s:
            return None
        return since(last, base), last_s - at_s

    def sample(self, seconds: float, min_minutes: int) -> int:
        """Requests that ended in about the last ``seconds``; 0 if they ended in fewer than ``min_minutes``
        different minutes."""
        if not self._points:
            return 0
        since_s = self._points[-1][0] - seconds
        minutes: set[int] = set()
        before: TrafficCounters | None = None
        total = 0
        for at_s, reading in self._points:
            if before is not None and at_s > since_s and reading.served > before.served:
                total += reading.served - before.served
                minutes.add(int(at_s // 60))
            before = reading
        return total if len(minutes) >= min_minutes else 0


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One tier's figures over the last minutes, for alerts and recommendations. Ratios and percentiles are
    MISSING if there was no request."""

    requests_per_s: Signal
    arrivals_per_s: Signal
    failed_ratio: Signal
    """Failed requests among those that ended here."""
    shed_ratio: Signal
    """Requests that were not admitted or expired in the queue, among those that ended here."""
    retried_ratio: Signal
    ttft_p95_s: Signal
    latency_p95_s: Signal
    attainment: Signal
    waiting: Signal
    in_flight: Signal


def figures(
    window: TrafficWindow,
    reading: TrafficCounters,
    reported_s: float | None,
    now_s: float,
    limits: FreshnessLimits,
    span_s: float = WINDOW_S,
) -> TierFigures:
    """The figures over ``span_s``. They are as fresh as ``reported_s``, the oldest of the gateways' last
    reports."""
    if reported_s is None:
        nothing = missing("no gateway has reported")
        return TierFigures(*(nothing,) * 10)

    def signal(value: float | None, why: str) -> Signal:
        return missing(why) if value is None else signal_of(value, reported_s, now_s, limits)

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole > 0 else None

    waiting, in_flight = signal(reading.waiting, ""), signal(reading.in_flight, "")
    found = window.over_last(span_s)
    if found is None:
        nothing = missing("the gateways have reported only once")
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
    """The figures of all tiers as figure (``tier/NAME``) → tier → signal."""
    return {
        f"tier/{field.name}": {tier: getattr(value, field.name) for tier, value in figures.items()}
        for field in fields(TierFigures)
    }
