"""Computes the shape that a replica leases on its machine; for a shared GPU, its shares of compute and
memory.

No memory is accounted for a whole GPU. On a shared GPU vLLM takes ``gpu-memory-utilization`` of the GPU's
total memory, independent of its share of the compute; with ``kv-cache-memory-bytes`` it takes that amount
plus the weights and overhead of the memory model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from controlplane.config import TierConfig
from controlplane.config.gpu_models import table_name
from controlplane.core.placement.gangs import GangShape
from controlplane.core.sizing.engine_args import parse_settings
from controlplane.core.sizing.gpu_memory import plan_memory
from controlplane.core.sizing.gpu_models import GpuModel
from controlplane.errors import SetupError
from controlplane.models.model_config import load_model
from controlplane.node_agent.nvml.reader import GpuReader
from controlplane.planning.launch_check import gpu_samples, identified_gpus


def lease_shape(tier: TierConfig, reader: GpuReader | None = None) -> GangShape:
    """The shape that a replica of ``tier`` leases here. Blocks for a few driver calls and file reads.

    The memory is computed for the largest GPU of this machine, so that it suffices on any of them; 0 if the
    driver shows no GPU.
    """
    shape = tier.shape
    if not shape.shared and not shape.models:
        return shape
    samples = gpu_samples(reader)
    if shape.models:
        # The controller identifies GPU models by the driver's names.
        names = {name for sample in samples if isinstance(name := sample.info.name, str)}
        accepted = {name for name in names if table_name(name) in shape.models}
        shape = replace(shape, models=shape.models | accepted)
    gpus = [gpu for gpu, _ in identified_gpus(samples)]
    if not gpus or not shape.shared:
        return shape
    largest = max(gpus, key=lambda gpu: gpu.usable_bytes)
    return replace(shape, gpu_memory_bytes=min(_used_bytes(tier, largest), largest.usable_bytes))


def _used_bytes(tier: TierConfig, gpu: GpuModel) -> int:
    if tier.engine == "simulated":
        return int(tier.gpus * gpu.usable_bytes)
    args: dict[str, Any] = dict(tier.engine_args)
    try:
        settings = parse_settings(args, tp=1, pp=1)
    except ValueError:
        return int(tier.gpu_share * gpu.usable_bytes)
    if not settings.kv_cache_bytes:
        return int(settings.memory_ratio * gpu.usable_bytes)
    try:
        loaded = load_model(tier.model)
        fixed_bytes = plan_memory(loaded.spec, settings, gpu, loaded.extra).worst.fixed_bytes
    except (SetupError, ValueError, OSError):
        return int(tier.gpu_share * gpu.usable_bytes)
    return fixed_bytes + settings.kv_cache_bytes
