from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest

from controlplane.core.telemetry.engine import COUNTERS, GAUGES, HISTOGRAMS, EngineTelemetry
from controlplane.core.telemetry.node import NodeTelemetry
from controlplane.core.telemetry.samples import (
    Absence,
    EngineSample,
    GpuCondition,
    GpuInfo,
    GpuSample,
    Histogram,
    Missing,
    NodeSample,
)
from controlplane.core.telemetry.series import Freshness, FreshnessLimits
from controlplane.engines.base import MetricNames

LIMITS = FreshnessLimits()
LOST = Missing(Absence.GPU_LOST, "GPU is lost")


def engine(generation: int = 1, **values: float) -> EngineSample:
    return EngineSample(
        endpoint_id="light-0",
        generation=generation,
        unix_s=0.0,
        scrape_s=0.001,
        gauges=tuple((name, values[name]) for name in GAUGES if name in values),
        counters=tuple((name, values[name]) for name in COUNTERS if name in values),
    )


def test_every_metric_name_of_an_engine_has_a_signal() -> None:
    assert set(asdict(MetricNames())) == {*GAUGES, *COUNTERS, *HISTOGRAMS}


def test_engine_signals() -> None:
    telemetry = EngineTelemetry(LIMITS)
    telemetry.observe(
        engine(
            running=3, waiting=1, generation_tokens_total=100, prefix_hits_total=0, prefix_queries_total=0
        ),
        0,
    )
    latency = Histogram((0.1, 1.0, math.inf), (0, 0, 0), 0.0)
    sample = engine(
        running=4, waiting=0, generation_tokens_total=600, prefix_hits_total=30, prefix_queries_total=40
    )
    telemetry.observe(replace(sample, histograms=(("ttft_seconds", latency),)), 10)
    telemetry.observe(
        replace(sample, histograms=(("ttft_seconds", replace(latency, counts=(9, 10, 10))),)), 20
    )
    signals = telemetry.signals(20)
    assert (signals.running.value, signals.waiting.value) == (4, 0)
    assert signals.generation_tokens_per_s.value == 25
    assert signals.prefix_hit_ratio.value == 0.75
    assert signals.ttft.p50.value == pytest.approx(0.1 * 5 / 9)
    assert signals.ttft.p95.value == pytest.approx(0.55)
    assert signals.kv_usage_ratio.freshness is Freshness.MISSING
    assert signals.kv_usage_ratio.reason == "the engine does not offer it"


def test_a_new_process_inherits_nothing() -> None:
    telemetry = EngineTelemetry(LIMITS)
    telemetry.observe(engine(running=9, generation_tokens_total=0), 0)
    telemetry.observe(engine(running=9, generation_tokens_total=100), 1)
    telemetry.observe(EngineSample("light-0", 2, 0.0, 0.0, error="connection refused"), 2)
    signals = telemetry.signals(2)
    assert (signals.running.freshness, signals.running.reason) == (Freshness.MISSING, "connection refused")
    assert signals.generation_tokens_per_s.freshness is Freshness.MISSING
    telemetry.observe(engine(running=5), 3)
    assert telemetry.signals(3).running.freshness is Freshness.MISSING, "a late scrape of the old process"


def test_a_failed_scrape_makes_stale_then_missing() -> None:
    telemetry = EngineTelemetry(LIMITS)
    telemetry.observe(engine(running=9), 0)
    failed = EngineSample("light-0", 1, 0.0, 0.0, error="no answer within 2 s")
    telemetry.observe(failed, 6)
    assert (telemetry.signals(6).running.freshness, telemetry.signals(6).running.value) == (
        Freshness.STALE,
        9,
    )
    telemetry.observe(failed, 31)
    assert telemetry.signals(31).running.reason == "no answer within 2 s"
    assert telemetry.signals(31).running.value is None


def test_prefix_ratio_without_queries_is_missing() -> None:
    telemetry = EngineTelemetry(LIMITS)
    for at_s in (0, 1):
        telemetry.observe(engine(prefix_hits_total=5, prefix_queries_total=9), at_s)
    assert telemetry.signals(1).prefix_hit_ratio.freshness is Freshness.MISSING


def gpu(uuid: str = "GPU-a", **figures: object) -> GpuSample:
    sample = GpuSample(GpuInfo(uuid, 0), GpuCondition.OK, memory_total_bytes=100, memory_used_bytes=25)
    return replace(sample, **figures)  # type: ignore[arg-type]


def node(seq: int, unix_s: float, *gpus: GpuSample, epoch: str = "one") -> NodeSample:
    return NodeSample(
        node_id="n",
        epoch=epoch,
        seq=seq,
        unix_s=unix_s,
        boot_id="b",
        cpu_count=2,
        cpu_ratio=0.5,
        load_1m=0.1,
        memory_total_bytes=10,
        memory_available_bytes=5,
        disk_total_bytes=10,
        disk_free_bytes=5,
        driver_version="580",
        gpus=gpus,
    )


def test_samples_are_taken_once_and_in_order() -> None:
    telemetry = NodeTelemetry(LIMITS)
    batch = [node(2, 1001.0), node(1, 1000.0)]
    assert [sample.seq for sample in telemetry.observe(batch, 50)] == [1, 2]
    assert telemetry.observe(batch, 52) == ()
    assert telemetry.latest_s == 50, "what is known already does not become younger"
    assert telemetry.signals(56).cpu_ratio.freshness is Freshness.STALE
    assert [sample.seq for sample in telemetry.observe([node(1, 1.0, epoch="two")], 57)] == [1]
    assert telemetry.signals(57).cpu_ratio.freshness is Freshness.FRESH


def test_gpu_signals_and_their_loss() -> None:
    telemetry = NodeTelemetry(LIMITS)
    telemetry.observe(
        [node(1, 0, gpu(gpu_ratio=0.0, temperature_c=40)), node(2, 10, gpu(gpu_ratio=1.0, temperature_c=60))],
        10,
    )
    signals = telemetry.gpus.signals("GPU-a", 10)
    assert signals.gpu_ratio.value == pytest.approx(0.5)
    assert (signals.memory_used_ratio.value, signals.temperature_c.value) == (0.25, 60)
    assert signals.power_w.freshness is Freshness.MISSING
    lost = gpu(condition=GpuCondition.LOST, gpu_ratio=LOST, memory_used_bytes=LOST, temperature_c=LOST)
    telemetry.observe([node(3, 20, lost)], 20)
    signals = telemetry.gpus.signals("GPU-a", 20)
    assert (signals.temperature_c.freshness, signals.temperature_c.reason) == (Freshness.STALE, "GPU is lost")
    telemetry.observe([node(4, 60)], 60)
    assert telemetry.gpus.uuids == ()
    assert telemetry.gpus.sample("GPU-a") is None


def test_a_gpu_without_memory_is_missing_not_full() -> None:
    telemetry = NodeTelemetry(LIMITS)
    telemetry.observe([node(1, 0, gpu(memory_total_bytes=0))], 0)
    assert telemetry.gpus.signals("GPU-a", 0).memory_used_ratio.freshness is Freshness.MISSING
