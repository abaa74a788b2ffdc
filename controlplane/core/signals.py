"""What the control plane knows of engines, GPUs and nodes right now, from their samples.

One object per endpoint or node takes samples in and gives signals out; both are bounded. Signals of a GPU
or an engine that stopped reporting grow stale and then missing, whatever they were before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from controlplane.core.samples import (
    Absence,
    EngineSample,
    GpuSample,
    Missing,
    NodeSample,
    Reading,
)
from controlplane.core.telemetry import (
    DEFAULT_LIMITS,
    CounterSeries,
    Freshness,
    GaugeSeries,
    HistogramSeries,
    Limits,
    Signal,
    judge,
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
class Busy:
    """How much of a window an engine ran requests, for learning its speed."""

    ratio: float
    batch: float
    """Requests at once, the mean over that part."""


class EngineTelemetry:
    """The recent past of one endpoint."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
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

    def busy(self, now_s: float) -> Busy | None:
        """How much of the window the engine ran requests; None if that is not known."""
        found = self._gauges["running"].busy(now_s)
        return None if found is None else Busy(*found)

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


@dataclass(frozen=True, slots=True)
class GpuSignals:
    """One GPU now; ratios are averaged over the half-life, the rest is the newest value."""

    gpu_ratio: Signal
    memory_used_ratio: Signal
    memory_free_bytes: Signal
    temperature_c: Signal
    power_w: Signal


class GpuTelemetry:
    """The recent past of one GPU: its last sample, the last value of what is missing there, and the average
    of its utilisation. There are thousands, so there are no windows."""

    __slots__ = ("_at_s", "_average", "_kept", "_limits", "_ratio_s", "_sample")

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._average = 0.0
        self._ratio_s = -math.inf
        self._sample: GpuSample | None = None
        self._at_s = -math.inf
        self._kept: dict[str, tuple[float, float]] = {}
        """Reading → when it was there last, and its value; of those that are missing now."""

    def observe(self, sample: GpuSample, at_s: float) -> None:
        """Takes in a sample."""
        if at_s < self._at_s:
            return
        ratio = sample.gpu_ratio
        if not isinstance(ratio, Missing):
            gap_s = at_s - self._ratio_s
            # the past before a long gap says nothing about now
            keep = (
                0.0 if gap_s > self._limits.missing_after_s else math.exp2(-gap_s / self._limits.half_life_s)
            )
            self._average = keep * self._average + (1 - keep) * ratio
            self._ratio_s = at_s
        before = self._sample
        if before is not None and (
            isinstance(sample.memory_used_bytes, Missing)
            or isinstance(sample.memory_total_bytes, Missing)
            or isinstance(sample.memory_free_bytes, Missing)
            or isinstance(sample.temperature_c, Missing)
            or isinstance(sample.power_w, Missing)
        ):
            for name, read in _READINGS.items():
                value = read(before)
                if not isinstance(value, Missing):
                    self._kept[name] = (self._at_s, value)
        self._sample, self._at_s = sample, at_s

    def signals(self, now_s: float) -> GpuSignals:
        """Everything about the GPU at ``now_s``."""
        return GpuSignals(
            gpu_ratio=self._utilisation(now_s),
            memory_used_ratio=self._latest("memory_used_ratio", now_s),
            memory_free_bytes=self._latest("memory_free_bytes", now_s),
            temperature_c=self._latest("temperature_c", now_s),
            power_w=self._latest("power_w", now_s),
        )

    def load(self, now_s: float) -> tuple[float | None, float | None]:
        """Utilisation and power in watts, where they are fresh; the same as of :meth:`signals`, at once."""
        oldest_s = now_s - self._limits.stale_after_s
        power = self._sample.power_w if self._sample is not None and self._at_s >= oldest_s else None
        if isinstance(power, Missing):
            power = self._latest("power_w", now_s).fresh
        return self._average if self._ratio_s >= oldest_s else None, power

    def _utilisation(self, now_s: float) -> Signal:
        ratio = self._sample.gpu_ratio if self._sample is not None else None
        why = ratio.reason if isinstance(ratio, Missing) else ""
        known = self._ratio_s > -math.inf
        return judge(
            *(self._average if known else None, self._ratio_s if known else None), now_s, self._limits, why
        )

    def _latest(self, name: str, now_s: float) -> Signal:
        if self._sample is None:
            return judge(None, None, now_s, self._limits)
        value = _READINGS[name](self._sample)
        if not isinstance(value, Missing):
            return judge(value, self._at_s, now_s, self._limits)
        at_s, kept = self._kept.get(name, (None, None))
        return judge(kept, at_s, now_s, self._limits, value.reason)


@dataclass(frozen=True, slots=True)
class NodeSignals:
    """One node now."""

    cpu_ratio: Signal
    memory_available_bytes: Signal
    disk_free_bytes: Signal


class NodeTelemetry:
    """The recent past of one node and its GPUs."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._cpu = GaugeSeries(limits)
        self._memory = GaugeSeries(limits)
        self._disk = GaugeSeries(limits)
        self.gpus: dict[str, GpuTelemetry] = {}
        """By UUID; those that the agent's last sample names."""
        self.latest: NodeSample | None = None
        self.latest_s: float | None = None
        """When the newest sample was taken, by the caller's clock."""

    def observe(self, samples: Iterable[NodeSample], received_s: float) -> tuple[NodeSample, ...]:
        """Takes in what an agent sent at ``received_s``; answers what of it was new.

        The newest sample counts as taken when it arrived, the others as much earlier as the agent's own
        clock says: the clocks of two machines are never compared.
        """
        new = sorted((sample for sample in samples if self._is_new(sample)), key=lambda sample: sample.seq)
        for sample in new:
            at_s = received_s - max(0.0, new[-1].unix_s - sample.unix_s)
            self._cpu.observe(at_s, sample.cpu_ratio)
            self._memory.observe(at_s, sample.memory_available_bytes)
            self._disk.observe(at_s, sample.disk_free_bytes)
            known = {gpu.info.uuid: gpu for gpu in sample.gpus if gpu.info.uuid}
            for uuid, gpu in known.items():
                if uuid not in self.gpus:
                    self.gpus[uuid] = GpuTelemetry(self._limits)
                self.gpus[uuid].observe(gpu, at_s)
            for uuid in self.gpus.keys() - known.keys():
                del self.gpus[uuid]
        if new:
            self.latest, self.latest_s = new[-1], received_s
        return tuple(new)

    def signals(self, now_s: float) -> NodeSignals:
        """The node at ``now_s``."""
        return NodeSignals(self._cpu.latest(now_s), self._memory.latest(now_s), self._disk.latest(now_s))

    def _is_new(self, sample: NodeSample) -> bool:
        last = self.latest
        return last is None or sample.epoch != last.epoch or sample.seq > last.seq


def _used_ratio(sample: GpuSample) -> Reading[float]:
    used, total = sample.memory_used_bytes, sample.memory_total_bytes
    if isinstance(used, Missing):
        return used
    if isinstance(total, Missing):
        return total
    return used / total if total else Missing(Absence.ERROR, "the GPU says that it has no memory")


_READINGS: Mapping[str, Callable[[GpuSample], Reading[float]]] = MappingProxyType(
    {
        "memory_used_ratio": _used_ratio,
        "memory_free_bytes": lambda sample: sample.memory_free_bytes,
        "temperature_c": lambda sample: sample.temperature_c,
        "power_w": lambda sample: sample.power_w,
    }
)
