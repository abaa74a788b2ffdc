"""GPU models: memory, links, supported formats and speeds.

The table itself is data (``controlplane/data/gpus.json``); :mod:`controlplane.models.catalog` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controlplane.core.sizing.quantization import FP8_KV_MINIMUM, HARDWARE, PRESETS, Scheme, runs_on

MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One GPU model."""

    name: str
    """The short name in the table, such as ``H100-80G``."""
    nvml_name: str
    """The driver's name for it; empty if unknown."""
    memory_mib: int
    """Total memory as ``nvidia-smi`` and NVML show it."""
    usable_mib: int
    """Total memory as CUDA (``torch.cuda.mem_get_info``) reports it: the engine's memory ratio refers to
    it."""
    capability: int
    """Compute capability x 10."""
    bandwidth_bytes_per_s: float
    nvlink_bytes_per_s: float
    """Sum of both directions, to all peers together; 0 means no NVLink, so peers communicate over PCIe."""
    flops: Mapping[str, float]
    """Dense operations per second by dtype (``float16``, ``bfloat16``, ``fp8``, ``int8``)."""
    aliases: tuple[str, ...] = ()
    source: str = ""

    @property
    def usable_bytes(self) -> int:
        """Bytes to which an engine's memory ratio applies."""
        return self.usable_mib * MIB

    @property
    def bfloat16(self) -> bool:
        """Whether vLLM runs bfloat16 on it (compute capability 8.0)."""
        return self.capability >= 80

    @property
    def default_dtype(self) -> str:
        """The dtype that vLLM chooses for a float32 checkpoint with ``--dtype auto``."""
        return "bfloat16" if self.bfloat16 else "float16"

    @property
    def fp8_kv_cache(self) -> bool:
        """Whether vLLM runs an fp8 KV cache on it."""
        return self.capability >= FP8_KV_MINIMUM

    def flops_for(self, scheme: Scheme, dtype: str) -> float:
        """Dense operations per second for weights in ``scheme`` and activations in ``dtype``; 0 if unknown.

        Formats that only save memory (4 bit; fp8 on older GPUs) are computed in 16 bit.
        """
        sixteen = self.flops.get(dtype) or self.flops["float16"]
        native = HARDWARE[scheme].native
        if scheme in {Scheme.FP8, Scheme.INT8} and self.capability >= native:
            return self.flops.get(str(scheme), sixteen)
        return sixteen

    def quantizations(self) -> dict[str, str]:
        """Names of the weight formats that run on it → how they are computed, and the source."""
        found = {name: runs_on(quantization, self.capability) for name, quantization in PRESETS.items()}
        return {name: why for name, (ok, why) in found.items() if ok and name != "none"}


def parse_gpus(rows: Iterable[Mapping[str, Any]]) -> tuple[GpuModel, ...]:
    """The table's rows as values. KeyError or ValueError if a row is incomplete."""
    return tuple(
        GpuModel(
            name=row["name"],
            nvml_name=row.get("nvml_name", ""),
            memory_mib=int(row["memory_mib"]),
            usable_mib=int(row["usable_mib"]),
            capability=round(float(row["compute_capability"]) * 10),
            bandwidth_bytes_per_s=float(row["bandwidth_gb_per_s"]) * 1e9,
            nvlink_bytes_per_s=float(row.get("nvlink_gb_per_s", 0)) * 1e9,
            flops={dtype: float(rate) * 1e12 for dtype, rate in row["tflops"].items()},
            aliases=tuple(row.get("aliases", ())),
            source=row["source"],
        )
        for row in rows
    )


def find_gpu(gpus: Iterable[GpuModel], text: str) -> GpuModel | None:
    """The GPU with that short name, alias or driver name; None if there is none."""
    wanted = _normal(text)
    for gpu in gpus:
        if wanted in {_normal(name) for name in (gpu.name, gpu.nvml_name, *gpu.aliases) if name}:
            return gpu
    return None


def unlisted_gpu(name: str, memory_mib: int, capability: int) -> GpuModel:
    """A GPU that isn't in the table, from the driver's figures; its speed is unknown (0)."""
    return GpuModel(
        name=name,
        nvml_name=name,
        memory_mib=memory_mib,
        usable_mib=round(memory_mib * 0.975),
        capability=capability,
        bandwidth_bytes_per_s=0.0,
        nvlink_bytes_per_s=0.0,
        flops={"float16": 0.0},
        source="the driver; less 2.5 % that CUDA reserves",
    )


def _normal(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower().removeprefix("nvidia "))
