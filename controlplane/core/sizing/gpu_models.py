"""GPU models as values: memory, links, what they compute and how fast.

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
    """Our short name, such as ``H100-80G``."""
    nvml_name: str
    """What the driver calls it; empty if it isn't known."""
    memory_mib: int
    """What ``nvidia-smi`` and NVML show."""
    usable_mib: int
    """What CUDA (``torch.cuda.mem_get_info``) gives as total; the engine's memory ratio is of this."""
    capability: int
    """Compute capability x 10."""
    bandwidth_bytes_per_s: float
    nvlink_bytes_per_s: float
    """Sum of both directions to its peers; 0: none, peers talk over PCIe."""
    flops: Mapping[str, float]
    """Dense multiply-accumulate rate per dtype (``float16``, ``bfloat16``, ``fp8``, ``int8``), per second."""
    aliases: tuple[str, ...] = ()
    source: str = ""

    @property
    def usable_bytes(self) -> int:
        """Bytes that an engine's memory ratio is taken of."""
        return self.usable_mib * MIB

    @property
    def bfloat16(self) -> bool:
        """Whether vLLM runs bfloat16 there (compute capability 8.0)."""
        return self.capability >= 80

    @property
    def default_dtype(self) -> str:
        """What vLLM picks for a float32 checkpoint with ``--dtype auto``."""
        return "bfloat16" if self.bfloat16 else "float16"

    @property
    def fp8_kv_cache(self) -> bool:
        """Whether an fp8 KV cache runs there."""
        return self.capability >= FP8_KV_MINIMUM

    def flops_for(self, scheme: Scheme, dtype: str) -> float:
        """Dense rate of multiplications for weights in ``scheme`` and activations in ``dtype``.

        Formats that only save memory (4 bit; fp8 on older GPUs) are computed in 16 bit.
        """
        sixteen = self.flops.get(dtype) or self.flops["float16"]
        native = HARDWARE[scheme].native
        if scheme in {Scheme.FP8, Scheme.INT8} and self.capability >= native:
            return self.flops.get(str(scheme), sixteen)
        return sixteen

    def quantizations(self) -> dict[str, str]:
        """Format names that run there → how."""
        found = {name: runs_on(quantization, self.capability) for name, quantization in PRESETS.items()}
        return {name: why for name, (ok, why) in found.items() if ok and name != "none"}


def parse_gpus(rows: Iterable[Mapping[str, Any]]) -> tuple[GpuModel, ...]:
    """The table's rows as values. KeyError or ValueError if a row is not complete."""
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
    """The GPU that ``text`` names: our name, an alias, or the driver's name; None if there is none."""
    wanted = _normal(text)
    table = tuple(gpus)
    for gpu in table:
        if wanted in {_normal(name) for name in (gpu.name, gpu.nvml_name, *gpu.aliases) if name}:
            return gpu
    return None


def seen_gpu(name: str, memory_mib: int, capability: int) -> GpuModel:
    """A GPU that isn't in the table, from what the driver says; its speed is not known (0)."""
    return GpuModel(
        name=name,
        nvml_name=name,
        memory_mib=memory_mib,
        usable_mib=round(memory_mib * 0.975),
        capability=capability,
        bandwidth_bytes_per_s=0.0,
        nvlink_bytes_per_s=0.0,
        flops={"float16": 0.0},
        source="the driver; 2.5 % taken off for what CUDA keeps",
    )


def _normal(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower().removeprefix("nvidia "))
