"""What a window of time was like, per instance: from samples to averages, maxima and shares.

An instance is a tier, an endpoint or a node; whoever samples it decides. What was not measured is left out of
the averages and stays None where nothing was: an hour without telemetry is not an hour at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReportSample:
    """One instance at one moment; None: not measured. Counts are since the sample before."""

    at_s: float
    interval_s: float
    up: bool
    """It could serve."""
    requests: float = 0.0
    errors: float = 0.0
    resumed: float = 0.0
    spilled: float = 0.0
    tokens: float = 0.0
    kept_slo: float | None = None
    """Requests that kept the SLO, of those that have one."""
    latency_ms: float | None = None
    """Mean of the requests of the interval."""
    latency_max_ms: float | None = None
    queue: float | None = None
    gpu_ratio: float | None = None
    gpus: float = 0.0
    """That it holds."""


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance over the window."""

    instance: str
    covered_s: float
    """How much of the window there are samples of."""
    latency_mean_ms: float | None
    """Weighted by requests."""
    latency_max_ms: float | None
    gpu_ratio: float | None
    """Weighted by time."""
    requests: float
    requests_per_s: float
    queue_mean: float | None
    queue_max: float | None
    availability: float | None
    """Share of the covered time in which it could serve."""
    tokens: float
    errors: float
    error_ratio: float
    resumed: float
    spilled: float
    attainment: float | None
    gpu_hours: float
    cost: float


def report(
    instance: str,
    samples: Iterable[ReportSample],
    from_s: float,
    until_s: float,
    cost_per_gpu_hour: float = 0.0,
) -> InstanceReport:
    """The instance from ``from_s`` to ``until_s``. A sample that reaches into the window counts for the part
    of its interval that lies there. ValueError if the window has no length."""
    if until_s <= from_s:
        raise ValueError("the window must end after it begins")
    inside = [(sample, part) for sample in samples if (part := _part(sample, from_s, until_s)) > 0]
    covered_s = sum(sample.interval_s * part for sample, part in inside)
    requests = _sum(inside, [sample.requests for sample, _ in inside])
    errors = _sum(inside, [sample.errors for sample, _ in inside])
    gpu_hours = sum(sample.gpus * sample.interval_s * part for sample, part in inside) / 3600
    judged = [(sample, part) for sample, part in inside if sample.kept_slo is not None]
    asked = _sum(judged, [sample.requests for sample, _ in judged])
    kept = _sum(judged, [sample.kept_slo or 0.0 for sample, _ in judged])
    timed = [(s.latency_ms, s.requests * part) for s, part in inside if s.latency_ms is not None]
    worst = [s.latency_max_ms if s.latency_max_ms is not None else s.latency_ms for s, _ in inside]
    return InstanceReport(
        instance,
        covered_s,
        _mean(timed),
        max((value for value in worst if value is not None), default=None),
        _mean([(s.gpu_ratio, s.interval_s * part) for s, part in inside if s.gpu_ratio is not None]),
        requests,
        requests / covered_s if covered_s else 0.0,
        _mean([(s.queue, s.interval_s * part) for s, part in inside if s.queue is not None]),
        max((s.queue for s, _ in inside if s.queue is not None), default=None),
        sum(s.interval_s * part for s, part in inside if s.up) / covered_s if covered_s else None,
        _sum(inside, [sample.tokens for sample, _ in inside]),
        errors,
        min(1.0, errors / requests) if requests else 0.0,
        _sum(inside, [sample.resumed for sample, _ in inside]),
        _sum(inside, [sample.spilled for sample, _ in inside]),
        min(1.0, kept / asked) if asked else None,
        gpu_hours,
        gpu_hours * cost_per_gpu_hour,
    )


def _part(sample: ReportSample, from_s: float, until_s: float) -> float:
    """The share of the sample's interval that lies in the window."""
    if sample.interval_s <= 0:
        return 0.0
    begin_s = sample.at_s - sample.interval_s
    return max(0.0, min(sample.at_s, until_s) - max(begin_s, from_s)) / sample.interval_s


def _sum(inside: Sequence[tuple[ReportSample, float]], values: Sequence[float]) -> float:
    return sum(value * part for value, (_, part) in zip(values, inside, strict=True))


def _mean(weighted: Sequence[tuple[float, float]]) -> float | None:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else None
