"""What the control plane knows of each engine right now, from its scraped metrics.

One :class:`EngineTelemetry` per endpoint takes samples in and gives signals out; it is bounded. Signals of an
engine that stopped reporting grow stale and then missing, whatever they were before.
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
    HistogramSeries,
    Signal,
    missing,
)

GAUGES = ("running", "waiting", "kv_usage_ratio")
COUNTERS = (
    *("generation_tokens_total", "prompt_tokens_total", "preemptions_total"),
    *("prefix_hits_total", "prefix_queries_total", "success_total"),
)
HISTOGRAMS = ("ttft_seconds", "itl_seconds", "e2e_seconds", "queue_seconds")
"""Together: what an engine may offer, by the names of ``controlplane.engines.base.MetricNames``."""

_NOT_OFFERED = Missing(Absence.NOT_SUPPORTED, "the engine does not offer it")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one latency over the window, in seconds."""

    p50: Signal
    p95: Signal
    p99: Signal


@dataclass(frozen=True, slots=True)
class EngineSignals:
    """One engine process now."""

    running: Signal
    waiting: Signal
    kv_usage_ratio: Signal
    generation_tokens_per_s: Signal
    prompt_tokens_per_s: Signal
    preemptions_per_s: Signal
    completions_per_s: Signal
    prefix_hit_ratio: Signal
    ttft: Percentiles
    itl: Percentiles
    e2e: Percentiles
    queue: Percentiles


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The part of :class:`EngineSignals` that is cheap: a look at thousands of engines asks for no
    percentiles."""

    running: Signal
    waiting: Signal
    kv_usage_ratio: Signal
    generation_tokens_per_s: Signal
    prompt_tokens_per_s: Signal
    completions_per_s: Signal


@dataclass(frozen=True, slots=True)
class BusyPeriod:
    """How much of a window an engine ran requests, for learning its speed."""

    ratio: float
    batch: float
    """Requests at once, the mean over that part."""


class EngineTelemetry:
    """The recent past of one endpoint."""

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._generation = 0
        self._clear()

    def observe(self, sample: EngineSample, at_s: float) -> None:
        """Takes in a scrape. A new generation is a new process: nothing of the old one is left."""
        if sample.generation < self._generation:
            return
        if sample.generation > self._generation:
            self._generation = sample.generation
            self._clear()
        failed = Missing(Absence.ERROR, sample.error) if sample.error else _NOT_OFFERED
        gauges, counters, histograms = dict(sample.gauges), dict(sample.counters), dict(sample.histograms)
        for name, gauge in self._gauges.items():
            gauge.observe(at_s, gauges.get(name, failed))
        for name, counter in self._counters.items():
            counter.observe(at_s, counters.get(name, failed))
        for name, histogram in self._histograms.items():
            histogram.observe(at_s, histograms.get(name, failed))

    def signals(self, now_s: float) -> EngineSignals:
        """Everything about the engine at ``now_s``."""
        rates = {name: counter.rate(now_s) for name, counter in self._counters.items()}
        latencies = {
            name: Percentiles(*(series.percentile(q, now_s) for q in (0.5, 0.95, 0.99)))
            for name, series in self._histograms.items()
        }
        return EngineSignals(
            running=self._gauges["running"].latest(now_s),
            waiting=self._gauges["waiting"].latest(now_s),
            kv_usage_ratio=self._gauges["kv_usage_ratio"].latest(now_s),
            generation_tokens_per_s=rates["generation_tokens_total"],
            prompt_tokens_per_s=rates["prompt_tokens_total"],
            preemptions_per_s=rates["preemptions_total"],
            completions_per_s=rates["success_total"],
            prefix_hit_ratio=self.prefix_hit_ratio(now_s),
            ttft=latencies["ttft_seconds"],
            itl=latencies["itl_seconds"],
            e2e=latencies["e2e_seconds"],
            queue=latencies["queue_seconds"],
        )

    def load(self, now_s: float) -> EngineLoad:
        """How busy the engine is at ``now_s``."""
        return EngineLoad(
            self._gauges["running"].latest(now_s),
            self._gauges["waiting"].latest(now_s),
            self._gauges["kv_usage_ratio"].latest(now_s),
            self._counters["generation_tokens_total"].rate(now_s),
            self._counters["prompt_tokens_total"].rate(now_s),
            self._counters["success_total"].rate(now_s),
        )

    def busy(self, now_s: float) -> BusyPeriod | None:
        """How much of the window the engine ran requests; None if that is not known."""
        found = self._gauges["running"].busy(now_s)
        return None if found is None else BusyPeriod(*found)

    def prefix_hit_ratio(self, now_s: float) -> Signal:
        """Share of the prompt tokens that the prefix cache had."""
        hits, queries = self._counters["prefix_hits_total"], self._counters["prefix_queries_total"]
        return ratio(hits.increase(now_s), queries.increase(now_s))

    def _clear(self) -> None:
        self._gauges = {name: GaugeSeries(self._limits) for name in GAUGES}
        self._counters = {name: CounterSeries(self._limits) for name in COUNTERS}
        self._histograms = {name: HistogramSeries(self._limits) for name in HISTOGRAMS}


def ratio(part: Signal, whole: Signal) -> Signal:
    """``part`` of ``whole``, as fresh as the staler of them; MISSING where the whole is nothing."""
    for signal in (part, whole):
        if signal.freshness is Freshness.MISSING:
            return signal
    if part.value is None or not whole.value:
        return missing("nothing to take a share of in the window", whole.age_s)
    staler = max((part, whole), key=lambda signal: signal.age_s or 0.0)
    return Signal(staler.freshness, part.value / whole.value, staler.age_s, staler.reason)
