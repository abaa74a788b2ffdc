"""Samples of GPUs and nodes as a node agent would take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from controlplane.core.telemetry.samples import GpuCondition, GpuInfo, GpuSample, NodeSample, Reading

GIB = 1024**3


def gpu_sample(uuid: str, index: int = 0, **fields: Any) -> GpuSample:
    """A healthy GPU with 80 GiB; ``fields`` replace any of its readings."""
    info = GpuInfo(uuid, index, "NVIDIA A", numa_node=0, slowdown_c=90, nvlinks=())
    usual: dict[str, object] = {
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 1 * GIB,
        "memory_free_bytes": 79 * GIB,
        "temperature_c": 50,
        "gpu_ratio": 0.5,
        "power_w": 200.0,
        "ecc_uncorrected": 0,
        "ecc_corrected": 0,
    }
    return GpuSample(**{"info": info, "condition": GpuCondition.OK, **usual, **fields})


def node_sample(
    node_id: str,
    seq: int,
    unix_s: float,
    gpus: Iterable[GpuSample] = (),
    driver: Reading[str] = "580",
    epoch: str = "a",
) -> NodeSample:
    return NodeSample(
        node_id=node_id,
        epoch=epoch,
        seq=seq,
        unix_s=unix_s,
        boot_id="boot",
        cpu_count=8,
        cpu_ratio=0.5,
        memory_total_bytes=64 * GIB,
        memory_available_bytes=32 * GIB,
        disk_free_bytes=50 * GIB,
        driver_version=driver,
        gpus=tuple(gpus),
    )
