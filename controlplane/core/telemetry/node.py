"""Current signals of one node and its GPUs, from its agent's samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.core.telemetry.gpu import GpuTelemetry
from controlplane.core.telemetry.samples import NodeSample
from controlplane.core.telemetry.series import DEFAULT_LIMITS, FreshnessLimits, GaugeSeries, Signal


@dataclass(frozen=True, slots=True)
class NodeSignals:
    """One node now."""

    cpu_ratio: Signal
    memory_available_bytes: Signal
    disk_free_bytes: Signal
    load_1m: Signal


class NodeTelemetry:
    """The newest sample of one node, and the signals of the node and of its GPUs."""

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        newest_only = replace(limits, max_points=1)
        self._cpu = GaugeSeries(newest_only)
        self._memory = GaugeSeries(newest_only)
        self._disk = GaugeSeries(newest_only)
        self._load = GaugeSeries(newest_only)
        self.gpus = GpuTelemetry(limits)
        """The signals of the GPUs in the newest sample."""
        self.latest: NodeSample | None = None
        self.latest_s: float | None = None
        """When the newest sample arrived, by the caller's clock."""

    def observe(self, sample: NodeSample, received_s: float) -> bool:
        """Takes in a sample that arrived at ``received_s``; False if it had arrived before.

        The time of arrival counts as the time of the sample: the clocks of two machines are never compared.
        """
        last = self.latest
        if last is not None and sample.epoch == last.epoch and sample.seq <= last.seq:
            return False
        self._cpu.observe(received_s, sample.cpu_ratio)
        self._memory.observe(received_s, sample.memory_available_bytes)
        self._disk.observe(received_s, sample.disk_free_bytes)
        self._load.observe(received_s, sample.load_1m)
        self.gpus.observe(sample.gpus, received_s)
        self.latest, self.latest_s = sample, received_s
        return True

    def signals(self, now_s: float) -> NodeSignals:
        """The node at ``now_s``."""
        return NodeSignals(
            self._cpu.latest(now_s),
            self._memory.latest(now_s),
            self._disk.latest(now_s),
            self._load.latest(now_s),
        )
