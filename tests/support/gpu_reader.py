"""The driver of a GPU machine, as the launch check and the sizing of shares read it."""

from __future__ import annotations

from controlplane.core.sizing.gpu_models import MIB
from controlplane.core.telemetry.samples import GpuCondition, GpuInfo, GpuSample
from controlplane.node_agent.nvml.reader import GpuReader


class FakeGpuReader(GpuReader):
    """Reads the same samples each time."""

    def __init__(self, *samples: GpuSample) -> None:
        self.samples = samples
        self.closed = False

    def read(self) -> tuple[GpuSample, ...]:
        return self.samples

    def close(self) -> None:
        self.closed = True


def memory_sample(
    index: int, name: str, total_mib: int, free_mib: int, capability: tuple[int, int] = (9, 0)
) -> GpuSample:
    """A GPU of which only its kind and its memory are read."""
    return GpuSample(
        GpuInfo(uuid=f"GPU-{index}", index=index, name=name, compute_capability=capability),
        GpuCondition.OK,
        memory_total_bytes=total_mib * MIB,
        memory_free_bytes=free_mib * MIB,
    )
