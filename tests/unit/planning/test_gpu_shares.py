"""The shape that a replica leases, on whole and on shared GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.core.placement.gangs import GangShape
from controlplane.core.sizing.gpu_models import GIB, MIB
from controlplane.core.telemetry.samples import GpuCondition, GpuInfo, GpuSample
from controlplane.node_agent.nvml.reader import GpuReader
from controlplane.planning.gpu_shares import lease_shape


class Reader(GpuReader):
    """Stands for the driver: 80 GiB and 24 GiB."""

    def __init__(self, *mib: int) -> None:
        self._mib = mib or (81559, 23034)

    def read(self) -> tuple[GpuSample, ...]:
        return tuple(
            GpuSample(
                GpuInfo(uuid=f"GPU-{index}", index=index, name=f"GPU {mib}", compute_capability=(9, 0)),
                GpuCondition.OK,
                memory_total_bytes=mib * MIB,
                memory_free_bytes=mib * MIB,
            )
            for index, mib in enumerate(self._mib)
        )

    def close(self) -> None:
        pass


def asked(reader: GpuReader | None = None, **fields: Any) -> GangShape:
    values = {"name": "t", "model": "bundled:smollm2-135m", "engine": "vllm", **fields}
    return lease_shape(TierConfig(**values), reader or Reader())


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, GangShape()),
        ({"tensor_parallel_size": 3}, GangShape(gpus=3)),
        ({"device": "cpu"}, GangShape(gpus=0)),
        ({"engine": "simulated", "engine_args": {"gpus": 2}}, GangShape(gpus=2)),
    ],
)
def test_whole_gpus_have_no_memory_limit(fields: dict[str, Any], shape: GangShape) -> None:
    assert asked(**fields) == shape


@pytest.mark.parametrize(
    ("fields", "milli", "gib"),
    [
        ({"gpu_share": 0.25, "engine_args": {"gpu-memory-utilization": 0.2}}, 250, (15, 16)),
        ({"gpu_share": 0.5}, 500, (70, 75)),
        ({"gpu_share": 0.1, "engine_args": {"kv-cache-memory-bytes": 2 * GIB}}, 100, (2.2, 5)),
        ({"engine": "simulated", "engine_args": {"gpus": 0.25}}, 250, (19, 20)),
    ],
    ids=["the ratio", "the ratio by default", "weights and a fixed cache", "simulated"],
)
def test_the_memory_of_a_share_is_that_on_the_largest_gpu(
    fields: dict[str, Any], milli: int, gib: tuple[float, float]
) -> None:
    shape = asked(**fields)
    assert shape.milli_gpu == milli
    assert gib[0] < shape.gpu_memory_bytes / GIB < gib[1]


def test_without_a_driver_a_share_is_compute_only() -> None:
    class Nothing(Reader):
        def read(self) -> tuple[GpuSample, ...]:
            return ()

    assert asked(Nothing(), gpu_share=0.5) == GangShape(milli_gpu=500)


def test_accepted_models_have_the_names_that_the_driver_uses() -> None:
    class Mixed(Reader):
        def read(self) -> tuple[GpuSample, ...]:
            return tuple(
                GpuSample(GpuInfo(uuid=name, index=index, name=name), GpuCondition.OK)
                for index, name in enumerate(["NVIDIA H100 80GB HBM3", "NVIDIA L4"])
            )

    assert asked(Mixed(), gpu_models=["l4"]).models == {"L4", "NVIDIA L4"}
    assert asked(Mixed(), gpu_models=["A100-80G"]).models == {"A100-80G"}
