"""The engine arguments that determine memory use, with the defaults of vLLM 0.32.

:func:`parse_settings` reads a tier's ``engine_args``. Arguments that change memory but are not modelled are
listed in ``unmodelled``, so that a report can say that its total is incomplete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.gpu_models import GIB, GpuModel
from controlplane.core.sizing.quantization import DTYPE_BYTES, PRESETS, Quantization, dtype_name, preset

ArgValue = str | int | float | bool | None | list[str | int | float | bool | None]

DEFAULT_MEMORY_RATIO = 0.92
"""vLLM 0.32's ``--gpu-memory-utilization``."""

KV_DTYPE_BYTES: dict[str, int] = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, **DTYPE_BYTES}

UNMODELLED = (
    "speculative-config",
    "enable-lora",
    "cpu-offload-gb",
    "offload-group-size",
    "kv-offloading-size",
    "decode-context-parallel-size",
    "prefill-context-parallel-size",
    "data-parallel-size",
    "compilation-config",
    "hf-overrides",
)
"""Arguments that change memory use in ways that are not counted here."""

MAY_REDUCE_MEMORY = frozenset(UNMODELLED) - {
    "speculative-config",
    "enable-lora",
    "kv-offloading-size",
    "compilation-config",
}
"""Unmodelled arguments that may let an engine run with less memory than its weights and one sequence need."""

_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """Engine arguments as values; 0 or an empty string means the engine's default."""

    tp: int = 1
    pp: int = 1
    expert_parallel: bool = False
    dtype: str = ""
    quantization: Quantization | None = None
    """The format to which the engine quantises the checkpoint's weights; None: they stay as stored."""
    kv_dtype: str = ""
    max_length: int = 0
    """``max-model-len``; -1 means the longest that fits."""
    any_length: bool = False
    """Whether ``max_length`` may be more than the configuration allows, because an argument changes that."""
    max_sequences: int = 0
    max_batched_tokens: int = 0
    memory_ratio: float = DEFAULT_MEMORY_RATIO
    block_size: int = 0
    eager: bool = False
    kv_cache_bytes: int = 0
    """``--kv-cache-memory-bytes`` per worker, which overrides the memory ratio."""
    blocks: int = 0
    """``--num-gpu-blocks-override``."""
    hybrid_kv: bool = True
    """Whether sliding-window layers free the blocks that have left the window."""
    async_scheduling: bool = True
    device: Literal["gpu", "cpu"] = "gpu"
    unmodelled: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Workers of one engine."""
        return self.tp * self.pp

    def block_tokens(self, model: ModelSpec) -> int:
        """Tokens in a KV block, by default 16 on GPU and 128 on CPU (16 with latent attention)."""
        if self.device == "cpu":
            return 16 if model.mla else (self.block_size or 128)
        return self.block_size or 16

    def length(self, model: ModelSpec) -> int:
        """Tokens of the longest sequence that the engine accepts."""
        if self.max_length > 0:
            return self.max_length
        return (model.default_length if self.max_length == 0 else 0) or model.max_length

    def resolved_dtype(self, model: ModelSpec, default: str = "bfloat16") -> str:
        """The dtype that the engine computes in: ``auto`` downcasts a float32 checkpoint to ``default``."""
        if self.dtype:
            return self.dtype
        if model.dtype == "float32":
            return default
        if model.dtype == "bfloat16" and default == "float16":
            return "float16"
        return model.dtype

    def cached_dtype(self, model: ModelSpec) -> str:
        """The format of the KV cache, if it isn't the dtype in which the engine computes: the argument's, or
        with ``auto`` on a GPU the checkpoint's."""
        if self.kv_dtype or self.device == "cpu":
            return self.kv_dtype
        return model.kv_dtype

    def kv_bytes(self, model: ModelSpec, dtype: str) -> int:
        """Bytes of one cached value; ``dtype`` is the dtype in which the engine computes."""
        return KV_DTYPE_BYTES[self.cached_dtype(model) or dtype]

    def batch(self, model: ModelSpec, gpu: GpuModel | None) -> tuple[int, int]:
        """(maximum tokens, maximum sequences) of one step, by vLLM's defaults for the OpenAI server.

        Source: ``EngineArgs.get_batch_defaults`` in vLLM 0.32: 16384 and 1024 with at least 160 GiB, 8192
        and 1024 with at least 70 GiB except on A100, else 2048 and 256; on CPU 2048 and 128 per worker.
        """
        if gpu is None:
            tokens, sequences = 2048 * self.world_size, 128 * self.world_size
        elif gpu.usable_bytes >= 160 * GIB:
            tokens, sequences = 16384, 1024
        elif gpu.usable_bytes >= 70 * GIB and "a100" not in gpu.nvml_name.lower():
            tokens, sequences = 8192, 1024
        else:
            tokens, sequences = 2048, 256
        sequences_limit = self.max_sequences or sequences
        if not self.max_batched_tokens:
            tokens = min(tokens, sequences_limit * self.length(model))
        tokens = self.max_batched_tokens or tokens
        if not self.max_sequences:
            sequences_limit = min(sequences_limit, tokens)
        return tokens, sequences_limit

    def in_flight_tokens(self, model: ModelSpec, gpu: GpuModel | None) -> int:
        """Tokens that are scheduled but not finished (``VllmConfig.max_in_flight_tokens``), which
        sliding-window layers store in addition to their window. Asynchronous scheduling, used on GPUs only,
        overlaps two steps."""
        batches = self.pp
        if self.async_scheduling and self.device == "gpu":
            batches = self.pp + 1
        return batches * self.batch(model, gpu)[0]

    def weights_format(self, model: ModelSpec) -> Quantization:
        """The format in which the engine holds the weights."""
        if model.quantization.quantized:
            return model.quantization
        return self.quantization or model.quantization


def parse_settings(
    args: Mapping[str, ArgValue], *, tp: int = 1, pp: int = 1, device: Literal["gpu", "cpu"] = "gpu"
) -> EngineArgs:
    """Settings from engine arguments: flag names without leading dashes, with ``_`` or ``-`` inside.

    Raises ValueError that names the argument if a value can't be understood.
    """
    flags = {name.replace("_", "-"): value for name, value in args.items()}
    tp = _integer(flags, "tensor-parallel-size", tp)
    pp = _integer(flags, "pipeline-parallel-size", pp)
    if tp < 1 or pp < 1:
        raise ValueError("tensor and pipeline parallel size must be at least 1")
    return EngineArgs(
        tp=tp,
        pp=pp,
        expert_parallel=_switch(flags, "enable-expert-parallel"),
        dtype=_dtype(flags),
        quantization=_quantization(flags),
        kv_dtype=_kv_dtype(flags),
        any_length=bool(flags.get("hf-overrides") or flags.get("rope-scaling")),
        max_length=_integer(flags, "max-model-len", 0),
        max_sequences=_integer(flags, "max-num-seqs", 0),
        max_batched_tokens=_integer(flags, "max-num-batched-tokens", 0),
        memory_ratio=_ratio(flags),
        block_size=_integer(flags, "block-size", 0),
        eager=_switch(flags, "enforce-eager"),
        kv_cache_bytes=_integer(flags, "kv-cache-memory-bytes", 0) or _integer(flags, "kv-cache-memory", 0),
        blocks=_integer(flags, "num-gpu-blocks-override", 0),
        hybrid_kv=not _switch(flags, "disable-hybrid-kv-cache-manager"),
        async_scheduling=_switch(flags, "async-scheduling", True),
        device=device,
        unmodelled=tuple(name for name in UNMODELLED if flags.get(name)),
    )


def _integer(flags: Mapping[str, ArgValue], name: str, default: int) -> int:
    value = flags.get(name)
    if value is None or value == "":
        return default
    if isinstance(value, str):
        if value == "auto":
            return -1
        match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([kmgKMG]?)(?:iB|i?)?", value.strip())
        if match:
            return int(float(match[1]) * _FACTORS.get(match[2], 1))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and int(value) == value:
        return int(value)
    raise ValueError(f"{name}: {value!r} is not a whole number")


def _ratio(flags: Mapping[str, ArgValue]) -> float:
    value = flags.get("gpu-memory-utilization")
    if value is None:
        return DEFAULT_MEMORY_RATIO
    try:
        ratio = float(str(value))
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise ValueError(f"gpu-memory-utilization: {value!r} is not above 0 and at most 1")
    return ratio


def _switch(flags: Mapping[str, ArgValue], name: str, default: bool = False) -> bool:
    if name not in flags:
        return not flags[f"no-{name}"] if f"no-{name}" in flags else default
    return flags[name] not in (False, "false", "False")


def _dtype(flags: Mapping[str, ArgValue]) -> str:
    value = str(flags.get("dtype") or "auto")
    if value == "auto":
        return ""
    try:
        return dtype_name(value)
    except KeyError:
        raise ValueError(f"dtype: '{value}' is none of auto, {', '.join(DTYPE_BYTES)}") from None


def _kv_dtype(flags: Mapping[str, ArgValue]) -> str:
    value = str(flags.get("kv-cache-dtype") or "auto")
    if value == "auto":
        return ""
    if value not in KV_DTYPE_BYTES:
        raise ValueError(
            f"kv-cache-dtype: the size of '{value}' is not known here; "
            f"known: auto, {', '.join(KV_DTYPE_BYTES)}"
        )
    return value


def _quantization(flags: Mapping[str, ArgValue]) -> Quantization | None:
    value = flags.get("quantization")
    if not value:
        return None
    name = str(value).lower().replace("_", "-")
    known = {
        "fp8-per-tensor": "fp8",
        "fp8-per-channel": "fp8",
        "fp8-per-block": "fp8-block",
        "int8-per-channel-weight-only": "int8",
        "auto-awq": "awq",
        "awq-marlin": "awq",
        "auto-gptq": "gptq",
        "gptq-marlin": "gptq",
    }
    if name.startswith("gguf:"):
        name = str(value).lower()  # ggml's types are written with underscores
    try:
        return preset(known.get(name, name))
    except KeyError:
        raise ValueError(
            f"quantization: the size of '{value}' is not known here; known: {', '.join(PRESETS)}, gguf:TYPE"
        ) from None
