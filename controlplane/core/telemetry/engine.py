"""Current signals of each engine, from its scraped metrics.

One :class:`EngineTelemetry` per endpoint takes in samples and returns signals; its memory is bounded. When an
engine stops reporting, its signals become stale and then missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.telemetry.samples import Absence, EngineSample, Missing
from controlplane.core.telemetry.series import (
    DEFAULT_LIMITS,
    CounterSeries,
    Freshness,
    FreshnessLimits,
    GaugeSeries,
    Signal,
    missing,
)

GAUGES = ("running", "waiting", "kv_usage_ratio")
COUNTERS = (
    *("generation_tokens_total", "prompt_tokens_total"),
    *("prefix_hits_total", "prefix_queries_total", "success_total"),
)
"""With :data:`GAUGES`, all metrics that are read from an engine: fields of
``controlplane.engines.base.MetricNames``."""

_NOT_OFFERED = Missing(Absence.NOT_SUPPORTED, "the engine does not offer it")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy one engine process is now."""

    running: Signal
    """Requests that the engine is computing."""
    waiting: Signal
    """Requests in the engine's own queue."""
    kv_usage_ratio: Signal
    generation_tokens_per_s: Signal
    prompt_tokens_per_s: Signal
    completions_per_s: Signal


@dataclass(frozen=True, slots=True)
class BusyPeriod:
    """The part of a window in which an engine ran requests, for learning its speed."""

    ratio: float
    """Share of the window, in [0, 1]."""
    batch: float
    """Requests running at once, averaged over that part."""


class EngineTelemetry:
    """The recent samples of one endpoint."""

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._generation = 0
        self._clear()

    def observe(self, sample: EngineSample, at_s: float) -> None:
        """Adds a scrape. A new generation is a new process, so all samples of the old one are dropped."""
        if sample.generation < self._generation:
            return
        if sample.generation > self._generation:
            self._generation = sample.generation
            self._clear()
        absent = Missing(Absence.ERROR, sample.error) if sample.error else _NOT_OFFERED
        gauges, counters = dict(sample.gauges), dict(sample.counters)
        for name, gauge in self._gauges.items():
            gauge.observe(at_s, gauges.get(name, absent))
        for name, counter in self._counters.items():
            counter.observe(at_s, counters.get(name, absent))

    def load(self, now_s: float) -> EngineLoad:
        """How busy the engine is at ``now_s``."""
        gauges, counters = self._gauges, self._counters
        return EngineLoad(
            running=gauges["running"].latest(now_s),
            waiting=gauges["waiting"].latest(now_s),
            kv_usage_ratio=gauges["kv_usage_ratio"].latest(now_s),
            generation_tokens_per_s=counters["generation_tokens_total"].rate(now_s),
            prompt_tokens_per_s=counters["prompt_tokens_total"].rate(now_s),
            completions_per_s=counters["success_total"].rate(now_s),
        )

    def busy(self, now_s: float) -> BusyPeriod | None:
        """The part of the window in which the engine ran requests; None if the window has too few points
        or is too old."""
        found = self._gauges["running"].busy(now_s)
        return None if found is None else BusyPeriod(*found)

    def prefix_hit_ratio(self, now_s: float) -> Signal:
        """Share of the prompt tokens that the prefix cache held, over the window."""
        hits, queries = self._counters["prefix_hits_total"], self._counters["prefix_queries_total"]
        return _ratio(hits.increase(now_s), queries.increase(now_s))

    def _clear(self) -> None:
        self._gauges = {name: GaugeSeries(self._limits) for name in GAUGES}
        self._counters = {name: CounterSeries(self._limits) for name in COUNTERS}


def _ratio(part: Signal, whole: Signal) -> Signal:
    """``part / whole``, as fresh as the older of the two; MISSING if ``whole`` is 0."""
    for signal in (part, whole):
        if signal.freshness is Freshness.MISSING:
            return signal
    if part.value is None or not whole.value:
        return missing("no prompt token was counted in the window", whole.age_s)
    older = max((part, whole), key=lambda signal: signal.age_s or 0.0)
    return Signal(older.freshness, part.value / whole.value, older.age_s, older.reason)
