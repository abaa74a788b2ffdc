"""The memory model's input for a tier (its engine's settings), and the tier's memory on CPUs."""

from __future__ import annotations

import os
from typing import Any

from controlplane.config import TierConfig
from controlplane.core.sizing.cpu_memory import CpuPlan, plan_cpu_memory
from controlplane.core.sizing.engine_args import EngineArgs, parse_settings
from controlplane.core.sizing.gpu_models import GIB
from controlplane.core.sizing.kv_cache import kv_bytes_per_token
from controlplane.models.model_config import LoadedModel

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB of KV cache per worker of a CPU engine."""


def tier_settings(tier: TierConfig) -> EngineArgs:
    """The settings of the tier's engine, with the arguments that tierplane adds on CPUs. ValueError that
    names the argument if one is invalid."""
    args: dict[str, Any] = {} if tier.engine == "llamacpp" else dict(tier.engine_args)
    if tier.device == "cpu":
        args = {"dtype": "float32", "enforce-eager": True} | args
    return parse_settings(
        args, tp=tier.tensor_parallel_size, pp=tier.pipeline_parallel_size, device=tier.device
    )


def cpu_plan(
    tier: TierConfig, loaded: LoadedModel, settings: EngineArgs, *, node_bytes: int, packs_16_bit: bool = True
) -> CpuPlan:
    """The memory of one vLLM engine of the tier on a machine with ``node_bytes`` of memory and no GPU.
    ValueError if the size of its KV cache is not a whole number of GiB."""
    space = tier.env.get(KV_SPACE) or os.environ.get(KV_SPACE) or "1"  # vLLM's own default
    if not space.isdigit():
        raise ValueError(f"{KV_SPACE} is '{space}': vLLM takes a whole number of GiB")
    return plan_cpu_memory(
        loaded.spec,
        settings,
        kv_cache_bytes=int(space) * GIB or settings.kv_cache_bytes,
        node_bytes=node_bytes,
        packs_16_bit=packs_16_bit,
    )


def llamacpp_bytes(tier: TierConfig, loaded: LoadedModel) -> tuple[int, int, int]:
    """(bytes of weights, bytes of KV cache, its tokens) of one llama.cpp engine: the file, and a float16
    cache for ``ctx-size`` tokens, if given."""
    args = {name.replace("_", "-"): value for name, value in tier.engine_args.items()}
    context = args.get("ctx-size") or args.get("n-ctx") or 0
    tokens = context if isinstance(context, int) else 0
    return loaded.stored_bytes, tokens * kv_bytes_per_token(loaded.spec, 1, 2), tokens
