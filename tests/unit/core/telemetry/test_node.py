"""Signals of a node and of its GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.telemetry.gpu import GpuTelemetry
from controlplane.core.telemetry.node import NodeTelemetry
from controlplane.core.telemetry.samples import (
    Absence,
    GpuCondition,
    GpuInfo,
    GpuSample,
    Missing,
    NodeSample,
)
from controlplane.core.telemetry.series import Freshness, FreshnessLimits
from tests.support.samples import node_sample

LIMITS = FreshnessLimits()
LOST = Missing(Absence.GPU_LOST, "GPU is lost")


def gpu(uuid: str = "GPU-a", **readings: Any) -> GpuSample:
    sample = GpuSample(GpuInfo(uuid, 0), GpuCondition.OK, memory_total_bytes=100, memory_used_bytes=25)
    return replace(sample, **readings)


def node(seq: int, unix_s: float, *gpus: GpuSample, epoch: str = "one") -> NodeSample:
    return node_sample("n", seq, unix_s, gpus, epoch=epoch)


def test_a_sample_counts_once_and_never_after_a_newer_one() -> None:
    telemetry = NodeTelemetry(LIMITS)
    assert telemetry.observe(node(2, 1001.0), 50)
    assert not telemetry.observe(node(2, 1001.0), 52)
    assert not telemetry.observe(node(1, 1000.0), 52)
    assert telemetry.latest_s == 50, "a sample that was known already does not become younger"
    assert telemetry.signals(56).cpu_ratio.freshness is Freshness.STALE
    assert telemetry.observe(node(1, 1.0, epoch="two"), 57), "a new agent process counts from 1 again"
    assert telemetry.signals(57).cpu_ratio.freshness is Freshness.FRESH


def test_gpu_signals_and_their_loss() -> None:
    telemetry = NodeTelemetry(LIMITS)
    telemetry.observe(node(1, 0, gpu(gpu_ratio=0.0, temperature_c=40)), 0)
    telemetry.observe(node(2, 10, gpu(gpu_ratio=1.0, temperature_c=60)), 10)
    signals = telemetry.gpus.signals("GPU-a", 10)
    assert signals.gpu_ratio.value == pytest.approx(0.5)
    assert (signals.memory_used_ratio.value, signals.temperature_c.value) == (0.25, 60)
    assert signals.power_w.freshness is Freshness.MISSING
    lost = gpu(condition=GpuCondition.LOST, gpu_ratio=LOST, memory_used_bytes=LOST, temperature_c=LOST)
    telemetry.observe(node(3, 20, lost), 20)
    signals = telemetry.gpus.signals("GPU-a", 20)
    assert (signals.temperature_c.freshness, signals.temperature_c.reason) == (Freshness.STALE, "GPU is lost")
    telemetry.observe(node(4, 60), 60)
    assert telemetry.gpus.uuids == ()
    assert telemetry.gpus.sample("GPU-a") is None


def test_a_gpu_without_memory_is_missing_not_full() -> None:
    telemetry = NodeTelemetry(LIMITS)
    telemetry.observe(node(1, 0, gpu(memory_total_bytes=0)), 0)
    assert telemetry.gpus.signals("GPU-a", 0).memory_used_ratio.freshness is Freshness.MISSING


def utilisation(telemetry: GpuTelemetry, now_s: float) -> float:
    value = telemetry.signals("GPU-a", now_s).gpu_ratio.value
    assert value is not None
    return value


def test_average_utilisation_weighs_the_past_by_half_after_a_half_life() -> None:
    telemetry = GpuTelemetry(LIMITS)
    for at_s, ratio, average in [(0, 0.0, 0.0), (10, 1.0, 0.5), (20, 1.0, 0.75)]:
        telemetry.observe([gpu(gpu_ratio=ratio)], at_s)
        assert utilisation(telemetry, at_s) == pytest.approx(average)
    telemetry.observe([gpu(gpu_ratio=0.08)], 80)
    assert utilisation(telemetry, 80) == 0.08, "after a gap this long the past does not count"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_average_utilisation_stays_between_the_extremes(ratios: list[float]) -> None:
    telemetry = GpuTelemetry(LIMITS)
    for at_s, ratio in enumerate(ratios):
        telemetry.observe([gpu(gpu_ratio=ratio)], at_s)
    assert min(ratios) - 1e-6 <= utilisation(telemetry, len(ratios)) <= max(ratios) + 1e-6
