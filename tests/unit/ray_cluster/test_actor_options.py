"""The resources that Ray reserves for a replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray._private.label_utils import validate_label_selector

from controlplane.config import TierConfig
from controlplane.models.catalog import gpu_table
from controlplane.ray_cluster.actor_options import accelerator_types, actor_options, cluster_accelerator_types


def tier(**fields: Any) -> TierConfig:
    return TierConfig(**{"name": "t", "model": "m", **fields})


@pytest.mark.parametrize(
    ("fields", "gpus", "selector"),
    [
        ({}, 1.0, None),
        ({"gpu_share": 0.25}, 0.25, None),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4.0, None),
        ({"device": "cpu"}, 0.0, None),
        ({"gpu_models": ["H100-80G", "A100-80G", "A100-40G"]}, 1.0, "in(A100, H100)"),
        ({"pipeline_parallel_size": 2, "pipeline_across_nodes": True}, 0.0, "in(L4, T4)"),
        (
            {"pipeline_parallel_size": 2, "pipeline_across_nodes": True, "gpu_models": ["L4"]},
            0.0,
            "in(L4)",
        ),
    ],
)
def test_actor_options(fields: dict[str, Any], gpus: float, selector: str | None) -> None:
    options = actor_options(tier(cpus=2.0, **fields), ["T4", "L4", "T4"])
    assert (options["num_cpus"], options["num_gpus"]) == (2.0, gpus)
    found = options.get("label_selector")
    assert found == (selector and {"ray.io/accelerator-type": selector})
    assert not validate_label_selector(found)


def test_accelerator_types_are_those_that_ray_derives_from_the_drivers_names() -> None:
    ray_name: Callable[[str], str] = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type
    for gpu in gpu_table():
        if gpu.nvml_name:
            assert accelerator_types([gpu.name]) == [ray_name(gpu.nvml_name)], gpu.name
    assert accelerator_types(["Homemade"]) == []


def test_without_ray_there_are_no_accelerator_types() -> None:
    assert cluster_accelerator_types() == ()
