"""Reports on a window of time, per tier and endpoint: from samples to means, maxima and ratios.

A sample describes the activity of one instance (a tier or an endpoint) since the previous sample. It has two
kinds of figures: :data:`SUMS`, which are summed, and :data:`GAUGES`, which are reported as mean and maximum.
So the report is the same whether samples are summed in memory, or in a store that merges old points into
wider ones.

A sample belongs to the window in which it ends. Times without measurements are left out: an hour in which no
gateway reported counts as not covered, not as an hour without requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Final

from controlplane.core.traffic.counters import LATENCY_BOUNDS_S, quantile_s

MAX_WINDOW_MINUTES: Final = 30 * 24 * 60.0
"""The store has no older samples."""
MIN_WINDOW_MINUTES: Final = 1.0
MAX_ENDPOINTS: Final = 1000
"""Maximum number of endpoints in one report, because over weeks there may have been very many; those with the
most requests are included."""
TRACK_POINTS: Final = 120
"""Approximate maximum number of points in a track."""


class InstanceKind(StrEnum):
    """The type of an instance."""

    TIER = "tier"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True, order=True)
class Instance:
    """A tier or an endpoint of which samples are taken."""

    kind: InstanceKind
    tier: str
    name: str
    """The tier's name, or the endpoint's id."""


@dataclass(frozen=True, slots=True)
class ReportSample:
    """The activity of one instance since the previous sample; None means not measured. The store names its
    series after the fields."""

    watched_s: float = 0.0
    """Seconds in which the instance was observed and should have served."""
    up_s: float = 0.0
    """Part of ``watched_s`` during which it could serve."""
    counted_s: float = 0.0
    """Seconds that the counts of all gateways cover; 0 means that nothing is known about requests."""
    requests: float = 0.0
    """Requests that ended here without being cancelled: answered, failed or shed."""
    answered: float = 0.0
    errors: float = 0.0
    shed: float = 0.0
    retried: float = 0.0
    """Attempts after the first."""
    resumed: float = 0.0
    arrived: float = 0.0
    """Requests meant for this tier."""
    spilled: float = 0.0
    """Requests meant for this tier that another tier served."""
    judged: float = 0.0
    """Requests meant for this tier that count for its SLO."""
    missed: float = 0.0
    """Part of ``judged`` that missed the SLO."""
    prompt_tokens: float = 0.0
    generated_tokens: float = 0.0
    latency_s: float = 0.0
    """Sum over ``answered`` of the time from arrival to the end of the response."""
    gpu_s: float = 0.0
    """GPUs held × seconds."""
    queue: float | None = None
    """Requests that wait for the instance, in the gateways (tiers only) and in engines that report their
    queue."""
    in_flight: float | None = None
    gpu_ratio: float | None = None
    """Mean utilisation of its GPUs; a shared GPU counts in full."""
    latency_max_s: float | None = None
    latency_counts: tuple[int, ...] = ()
    """The times in ``latency_s`` as a histogram over :data:`.counters.LATENCY_BOUNDS_S`; tiers only."""
    ttft_counts: tuple[int, ...] = ()
    """The times to the first byte of streamed responses, as a histogram; tiers only."""


HISTOGRAMS: Final = ("latency_counts", "ttft_counts")
"""Fields of a sample that are histograms. They are only in the store, because they would make the buffer in
memory three times as large."""
_NAMES: Final = tuple(item.name for item in fields(ReportSample) if item.name not in HISTOGRAMS)
GAUGES: Final = ("queue", "in_flight", "gpu_ratio", "latency_max_s")
SUMS: Final = tuple(name for name in _NAMES if name not in GAUGES)
_REPORTED_SUMS: Final = (
    "prompt_tokens", "generated_tokens", "errors", "shed", "retried", "resumed", "spilled", "judged",
)  # fmt: skip
"""Those of :data:`SUMS` that a report shows unchanged."""


@dataclass(slots=True)
class Totals:
    """The sums of one instance's samples."""

    sums: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Name → (number of values, sum, maximum)."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """One of :data:`HISTOGRAMS` → its counts."""

    def add(self, name: str, count: float, total: float, high: float) -> None:
        """Add values of one figure, given their number, sum and maximum. ValueError if samples have no such
        figure."""
        if name in GAUGES:
            known = self.gauges.get(name, (0.0, 0.0, high))
            self.gauges[name] = (known[0] + count, known[1] + total, max(known[2], high))
        elif name in SUMS:
            self.sums[name] = self.sums.get(name, 0.0) + total
        else:
            raise ValueError(f"a sample has no '{name}'")

    def add_count(self, name: str, bucket: int, count: float) -> None:
        """Add to a bucket of one of :data:`HISTOGRAMS`. ValueError if there is no such bucket."""
        if name not in HISTOGRAMS or not 0 <= bucket < len(LATENCY_BOUNDS_S):
            raise ValueError(f"no sample has a bucket {bucket} of '{name}'")
        self.counts.setdefault(name, [0] * len(LATENCY_BOUNDS_S))[bucket] += round(count)

    def quantile_ms(self, name: str, quantile: float) -> float | None:
        """A quantile of one of :data:`HISTOGRAMS` in milliseconds, in the right bucket; None without
        values."""
        found_s, high_s = quantile_s(self.counts.get(name, ()), quantile), self.high("latency_max_s")
        if found_s is None or high_s is None or _bucket(found_s) != _bucket(high_s):
            return _ms(found_s)
        return _ms(min(found_s, high_s))  # interpolation knows nothing of the largest value in its bucket

    def sum(self, name: str) -> float:
        """The sum of one of :data:`SUMS`."""
        return self.sums.get(name, 0.0)

    def mean(self, name: str) -> float | None:
        """The mean of one of :data:`GAUGES` over the samples that have it."""
        count, total, _ = self.gauges.get(name, (0.0, 0.0, 0.0))
        return total / count if count else None

    def high(self, name: str) -> float | None:
        """The maximum of one of :data:`GAUGES`."""
        return self.gauges[name][2] if name in self.gauges else None


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One tier or endpoint over the window. None means not measured, or without requests. ``GET /report``
    uses these field names."""

    kind: InstanceKind
    tier: str
    instance: str
    gone: bool
    """The instance no longer exists."""
    covered_s: float
    """Seconds of the window that the counts of all gateways cover; rates are per second of this time."""
    requests: float
    requests_per_s: float | None
    latency_mean_ms: float | None
    latency_max_ms: float | None
    queue_mean: float | None
    queue_max: float | None
    in_flight_mean: float | None
    availability: float | None
    """Share of the time in which the instance could serve: a tier with at least one ready endpoint, or an
    endpoint that is ready. Times in which an endpoint drained, or a tier's desired number of replicas was 0,
    don't count."""
    prompt_tokens: float
    generated_tokens: float
    errors: float
    error_ratio: float | None
    shed: float
    retried: float
    resumed: float
    spilled: float
    """Requests meant for this tier that another tier served; tiers only."""
    judged: float
    attainment: float | None
    """Ratio of ``judged`` that met the tier's SLO; tiers only."""
    slo_target: float | None
    """The ratio that must meet the SLO according to the present configuration; tiers only."""
    slo_missed: bool | None
    """Whether ``attainment`` is below ``slo_target``; None if either is None."""
    gpu_ratio: float | None
    gpu_hours: float
    cost: float
    latency_p50_ms: float | None = None
    """Tiers only, as all percentiles; their error is below the width of a bucket of
    :data:`.counters.LATENCY_BOUNDS_S`."""
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    ttft_p50_ms: float | None = None
    """Time to the first byte of streamed responses."""
    ttft_p95_ms: float | None = None
    ttft_p99_ms: float | None = None


@dataclass(frozen=True, slots=True)
class TrackPoint:
    """A tier over a short part of the window, for a plot."""

    unix_s: float
    """The beginning of the part."""
    requests_per_s: float | None
    latency_mean_ms: float | None
    latency_max_ms: float | None
    queue: float | None
    gpu_ratio: float | None
    attainment: float | None


@dataclass(frozen=True, slots=True)
class Track:
    """A tier's figures over time; a part without samples has no point."""

    tier: str
    step_s: float
    points: tuple[TrackPoint, ...]


@dataclass(frozen=True, slots=True)
class PlaneReport:
    """The whole plane over the window."""

    from_unix_s: float
    until_unix_s: float
    """Time of the newest sample."""
    tiers: tuple[InstanceReport, ...]
    endpoints: tuple[InstanceReport, ...]
    tracks: tuple[Track, ...]
    cost_per_gpu_hour: float
    left_out: int = 0
    """Number of endpoints left out because of :data:`MAX_ENDPOINTS`."""

    @property
    def gpu_hours(self) -> float:
        """The sum over all tiers."""
        return sum(tier.gpu_hours for tier in self.tiers)

    @property
    def cost(self) -> float:
        """The sum over all tiers."""
        return sum(tier.cost for tier in self.tiers)


def instance_report(
    instance: Instance,
    totals: Totals,
    cost_per_gpu_hour: float = 0.0,
    *,
    gone: bool = False,
    slo_target: float | None = None,
) -> InstanceReport:
    """The report on one instance's totals."""
    covered_s, requests, answered = (totals.sum(name) for name in ("counted_s", "requests", "answered"))
    gpu_hours = totals.sum("gpu_s") / 3600
    latency_mean_s = ratio(totals.sum("latency_s"), answered)
    attainment = ratio(totals.sum("judged") - totals.sum("missed"), totals.sum("judged"))
    return InstanceReport(
        kind=instance.kind,
        tier=instance.tier,
        instance=instance.name,
        gone=gone,
        covered_s=covered_s,
        requests=requests,
        requests_per_s=ratio(requests, covered_s),
        latency_mean_ms=_ms(latency_mean_s),
        latency_max_ms=_ms(totals.high("latency_max_s")),
        queue_mean=totals.mean("queue"),
        queue_max=totals.high("queue"),
        in_flight_mean=totals.mean("in_flight"),
        availability=ratio(totals.sum("up_s"), totals.sum("watched_s")),
        error_ratio=ratio(totals.sum("errors"), requests),
        **{name: totals.sum(name) for name in _REPORTED_SUMS},
        attainment=attainment,
        slo_target=slo_target,
        slo_missed=None if attainment is None or slo_target is None else attainment < slo_target,
        gpu_ratio=totals.mean("gpu_ratio"),
        gpu_hours=gpu_hours,
        cost=gpu_hours * cost_per_gpu_hour,
        latency_p50_ms=totals.quantile_ms("latency_counts", 0.5),
        latency_p95_ms=totals.quantile_ms("latency_counts", 0.95),
        latency_p99_ms=totals.quantile_ms("latency_counts", 0.99),
        ttft_p50_ms=totals.quantile_ms("ttft_counts", 0.5),
        ttft_p95_ms=totals.quantile_ms("ttft_counts", 0.95),
        ttft_p99_ms=totals.quantile_ms("ttft_counts", 0.99),
    )


def track(tier: str, parts: Mapping[int, Totals], from_unix_s: float, step_s: float) -> Track:
    """A tier's figures over time; ``parts`` are numbered from the beginning of the window."""
    instance = Instance(InstanceKind.TIER, tier, tier)
    points = []
    for number in sorted(parts):
        found = instance_report(instance, parts[number])
        points.append(
            TrackPoint(
                unix_s=from_unix_s + number * step_s,
                requests_per_s=found.requests_per_s,
                latency_mean_ms=found.latency_mean_ms,
                latency_max_ms=found.latency_max_ms,
                queue=found.queue_mean,
                gpu_ratio=found.gpu_ratio,
                attainment=found.attainment,
            )
        )
    return Track(tier, step_s, tuple(points))


def plane_report(
    totals: Mapping[Instance, Totals],
    tracks: Mapping[str, Mapping[int, Totals]],
    *,
    tiers: Mapping[str, float | None],
    present: Iterable[str],
    from_unix_s: float,
    until_unix_s: float,
    step_s: float,
    cost_per_gpu_hour: float = 0.0,
) -> PlaneReport:
    """The report on the whole plane. ``tiers`` maps the configured tiers, in order, to the ratio of requests
    that must meet the SLO; other tiers that have samples follow. ``present`` are the endpoints that exist
    now."""
    existing = set(present)
    order = {tier: index for index, tier in enumerate(tiers)}
    made = [
        instance_report(
            item,
            found,
            cost_per_gpu_hour,
            gone=item.name not in (order if _is_tier(item) else existing),
            slo_target=tiers.get(item.name) if _is_tier(item) else None,
        )
        for item, found in totals.items()
    ]
    made.sort(key=lambda item: (order.get(item.tier, len(order)), item.tier, item.gone, item.instance))
    endpoints = [item for item in made if item.kind is InstanceKind.ENDPOINT]
    busiest = sorted(endpoints, key=lambda item: -item.requests)[:MAX_ENDPOINTS]
    listed = {item.instance for item in busiest}
    shown = tuple(item for item in made if item.kind is InstanceKind.TIER)
    return PlaneReport(
        from_unix_s,
        until_unix_s,
        shown,
        tuple(item for item in endpoints if item.instance in listed),
        tuple(track(item.tier, tracks.get(item.tier, {}), from_unix_s, step_s) for item in shown),
        cost_per_gpu_hour,
        len(endpoints) - len(listed),
    )


def track_step_s(window_s: float) -> int:
    """The length in seconds of the parts of a window's track: at least 10, and long enough for about
    :data:`TRACK_POINTS` parts."""
    return max(10, -(-int(window_s) // TRACK_POINTS))


def _is_tier(instance: Instance) -> bool:
    return instance.kind is InstanceKind.TIER


def _bucket(seconds: float) -> int:
    return bisect_left(LATENCY_BOUNDS_S, seconds)


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``; None if ``whole`` is 0."""
    return part / whole if whole > 0 else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
