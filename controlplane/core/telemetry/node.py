"""What the control plane knows of one node and its GPUs right now, from its agent's samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.core.telemetry.gpu import GpuTelemetry
from controlplane.core.telemetry.samples import NodeSample
from controlplane.core.telemetry.series import DEFAULT_LIMITS, FreshnessLimits, LastReading, Signal


@dataclass(frozen=True, slots=True)
class NodeSignals:
    """One node now."""

    cpu_ratio: Signal
    memory_available_bytes: Signal
    disk_free_bytes: Signal


class NodeTelemetry:
    """The recent past of one node and its GPUs."""

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._cpu = LastReading(limits)
        self._memory = LastReading(limits)
        self._disk = LastReading(limits)
        self.gpus = GpuTelemetry(limits)
        """Those that the agent's last sample names."""
        self.latest: NodeSample | None = None
        self.latest_s: float | None = None
        """When the newest sample was taken, by the caller's clock."""

    def observe(self, samples: Iterable[NodeSample], received_s: float) -> tuple[NodeSample, ...]:
        """Takes in what an agent sent at ``received_s``; answers what of it was new.

        The newest sample counts as taken when it arrived, the others as much earlier as the agent's own
        clock says: the clocks of two machines are never compared.
        """
        new = [sample for sample in samples if self._is_new(sample)]
        if len(new) > 1:
            new.sort(key=lambda sample: sample.seq)
        for sample in new:
            at_s = received_s - max(0.0, new[-1].unix_s - sample.unix_s)
            self._cpu.observe(at_s, sample.cpu_ratio)
            self._memory.observe(at_s, sample.memory_available_bytes)
            self._disk.observe(at_s, sample.disk_free_bytes)
            self.gpus.observe(sample.gpus, at_s)
        if new:
            self.latest, self.latest_s = new[-1], received_s
        return tuple(new)

    def signals(self, now_s: float) -> NodeSignals:
        """The node at ``now_s``."""
        return NodeSignals(self._cpu.latest(now_s), self._memory.latest(now_s), self._disk.latest(now_s))

    def _is_new(self, sample: NodeSample) -> bool:
        last = self.latest
        return last is None or sample.epoch != last.epoch or sample.seq > last.seq
