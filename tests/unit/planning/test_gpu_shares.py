"""The shape that a replica leases, on whole and on shared GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.core.placement.gangs import GangShape
from controlplane.core.sizing.gpu_models import GIB
from controlplane.node_agent.nvml.reader import GpuReader
from controlplane.planning.gpu_shares import lease_shape
from tests.support.gpu_reader import FakeGpuReader, memory_sample

DRIVER = FakeGpuReader(*(memory_sample(i, f"GPU {mib}", mib, mib) for i, mib in enumerate((81559, 23034))))


def asked(reader: GpuReader | None = None, **fields: Any) -> GangShape:
    values = {"name": "t", "model": "bundled:smollm2-135m", "engine": "vllm", **fields}
    return lease_shape(TierConfig(**values), reader or DRIVER)


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
    assert asked(FakeGpuReader(), gpu_share=0.5) == GangShape(milli_gpu=500)


def test_accepted_models_have_the_names_that_the_driver_uses() -> None:
    names = enumerate(["NVIDIA H100 80GB HBM3", "NVIDIA L4"])
    mixed = FakeGpuReader(*(memory_sample(index, name, 81559, 81559) for index, name in names))
    assert asked(mixed, gpu_models=["l4"]).models == {"L4", "NVIDIA L4"}
    assert asked(mixed, gpu_models=["A100-80G"]).models == {"A100-80G"}
