"""Whether an engine fits its GPUs, and if not, the smallest change that makes it fit.

Changes are tried one at a time in the order of :data:`STEPS`, then two, then three together; the first that
fits is suggested. The order defines «smallest»: first changes that cost nothing, then those that limit
requests, then those that cost GPUs or may change the model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.gpu_memory import (
    CUDA_CONTEXT_BYTES,
    HIGHEST_RATIO,
    RUNTIME_TERMS,
    MemoryPlan,
    gib,
    plan_memory,
)
from controlplane.core.sizing.gpu_models import GpuModel
from controlplane.core.sizing.quantization import PRESETS, Quantization, preset, runs_on

MOST_GPUS = 8
"""Maximum number of GPUs per engine to suggest if the number of available GPUs is unknown."""

SHORTEST_LENGTH = 2048
"""A ``max-model-len`` below this is not suggested: chats would not fit."""

MOST_CHANGES = 3
"""Maximum number of changes to suggest together."""


@dataclass(frozen=True, slots=True)
class FitLimits:
    """What must fit, and what may be suggested to make it fit."""

    count: int = 0
    """GPUs available for one engine; 0 if unknown."""
    length: int = 0
    """Tokens per sequence that must fit; 0 means ``max-model-len``."""
    sequences: int = 1
    """Sequences of that length that must fit at once."""
    quantizations: tuple[str, ...] = ()
    """Weight formats that may be suggested, by name, in order of preference."""
    alternatives: tuple[GpuModel, ...] = ()
    """Other GPU models that may be suggested."""


@dataclass(frozen=True, slots=True)
class SettingChange:
    """One setting to change."""

    setting: str
    """The engine's flag, or ``gpu``."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.setting} {self.before} → {self.after}"


@dataclass(frozen=True, slots=True)
class Fit:
    """The engine fits."""

    plan: MemoryPlan
    sequences: int
    """Sequences of ``length`` tokens that fit at once."""
    length: int
    """Tokens per sequence that fit."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """The engine does not fit."""

    plan: MemoryPlan
    reasons: tuple[str, ...]
    """Every reason, with its numbers."""
    needed_bytes: int
    """Needed on the GPU with the least room."""
    available_bytes: int
    changes: tuple[SettingChange, ...] = ()
    """The smallest change that makes it fit; empty if none was found."""
    changed: MemoryPlan | None = None
    """The plan with those changes."""

    @property
    def remedy(self) -> str:
        """The smallest change, in words."""
        if not self.changes:
            return "no single engine argument, format or GPU of the table makes it fit"
        return "; ".join(str(change) for change in self.changes)


Verdict = Fit | Unfit
ChangedArgs = tuple[SettingChange, EngineArgs]
Step = Callable[[ModelSpec, EngineArgs, GpuModel, FitLimits], Iterator[ChangedArgs]]


def judge(plan: MemoryPlan, limits: FitLimits = FitLimits()) -> Verdict:
    """Whether the planned engine fits, and the smallest change that makes it fit if it doesn't."""
    length = _length(plan, limits)
    reasons = shortfalls(plan, limits)
    if not reasons:
        return Fit(plan, plan.sequences(length), length)
    worst = plan.worst
    needed = worst.fixed_bytes + _wanted_blocks(plan, limits) * worst.layout.block_bytes
    available = plan.settings.kv_cache_bytes + worst.fixed_bytes if plan.settings.kv_cache_bytes else 0
    changes, changed = _smallest(plan, limits)
    return Unfit(plan, reasons, needed, available or worst.budget_bytes, changes, changed)


def shortfalls(plan: MemoryPlan, limits: FitLimits) -> tuple[str, ...]:
    """Every reason why the plan doesn't meet the limits; empty if it does."""
    reasons = list(plan.problems)
    settings = plan.settings
    if limits.count and settings.world_size > limits.count:
        reasons.append(
            f"tensor x pipeline parallel size {settings.world_size} is more than {limits.count} GPUs"
        )
    worst = plan.worst
    share = f"{settings.memory_ratio:g} of {gib(plan.gpu.usable_bytes)}"
    if worst.kv_budget_bytes <= 0:
        reasons.append(
            f"{_fixed_parts(plan)} need {gib(worst.fixed_bytes)} per GPU, "
            f"the engine may take {gib(worst.budget_bytes)} ({share})"
        )
        return tuple(reasons)
    length = _length(plan, limits)
    if length < 1:
        reasons.append("not a single token's KV block fits")
        return tuple(reasons)
    if plan.blocks < _wanted_blocks(plan, limits):
        reasons.append(_cache_shortfall(plan, limits))
    elif plan.sequences(length) < limits.sequences:
        reasons.append(
            f"max-num-seqs admits {settings.batch(plan.model, plan.gpu)[1]} sequences, "
            f"{limits.sequences} are wanted"
        )
    return tuple(reasons)


def _cache_shortfall(plan: MemoryPlan, limits: FitLimits) -> str:
    worst = plan.worst
    wanted = worst.layout.blocks_for(_length(plan, limits)) * limits.sequences
    what = f"{limits.sequences} x {_length(plan, limits)} tokens need"
    if wanted < _wanted_blocks(plan, limits) - 1:
        what = f"vLLM starts only with room for one sequence of max-model-len {plan.length}, which needs"
    need = _wanted_blocks(plan, limits) * worst.layout.block_bytes
    return (
        f"{what} {gib(need)} of KV cache per GPU; {gib(worst.kv_budget_bytes)} is left of "
        f"{gib(worst.budget_bytes)} after {gib(worst.fixed_bytes)} for {_fixed_parts(plan)}"
    )


def _fixed_parts(plan: MemoryPlan) -> str:
    counted = any(term.name in RUNTIME_TERMS for term in plan.worst.terms)
    return "weights, activations and overhead" if counted else "weights alone"


def _length(plan: MemoryPlan, limits: FitLimits) -> int:
    return limits.length or plan.length


def _wanted_blocks(plan: MemoryPlan, limits: FitLimits) -> int:
    """Blocks for the sequences that must fit, and at least for one of ``max-model-len``, which vLLM requires
    to start."""
    layout = plan.layout
    wanted = layout.blocks_for(_length(plan, limits)) * limits.sequences
    longest = layout.blocks_for(plan.length) if plan.settings.max_length >= 0 else 0
    return max(wanted, longest) + 1


def _smallest(plan: MemoryPlan, limits: FitLimits) -> tuple[tuple[SettingChange, ...], MemoryPlan | None]:
    for size in range(1, MOST_CHANGES + 1):
        for steps in combinations(STEPS, size):
            found = _try(plan, limits, steps)
            if found:
                return found
    others = [gpu for gpu in limits.alternatives if gpu.name != plan.gpu.name]
    for gpu in sorted(others, key=lambda other: other.usable_mib):
        change = SettingChange("gpu", plan.gpu.name, gpu.name)
        changed = plan_memory(plan.model, plan.settings, gpu, plan.extra)
        if not shortfalls(changed, limits):
            return (change,), changed
        for step in STEPS:
            found = _try(changed, limits, (step,))
            if found:
                return (change, *found[0]), found[1]
    return (), None


def _try(
    plan: MemoryPlan, limits: FitLimits, steps: Sequence[Step]
) -> tuple[tuple[SettingChange, ...], MemoryPlan] | None:
    """The first combination of one change from each step that fits."""
    model, gpu = plan.model, plan.gpu
    ways: list[tuple[tuple[SettingChange, ...], EngineArgs]] = [((), plan.settings)]
    for step in steps:
        ways = [
            ((*changes, change), settings)
            for changes, before in ways
            for change, settings in step(model, before, gpu, limits)
        ]
    for changes, settings in ways:
        changed = plan_memory(model, settings, gpu, plan.extra)
        if not shortfalls(changed, limits):
            return changes, changed
    return None


def _own_length(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel, limits: FitLimits
) -> Iterator[ChangedArgs]:
    if settings.max_length > model.max_length and not settings.any_length:
        change = SettingChange("max-model-len", str(settings.max_length), str(model.max_length))
        yield change, replace(settings, max_length=model.max_length)


def _dtype(
    _model: ModelSpec, settings: EngineArgs, gpu: GpuModel, _limits: FitLimits
) -> Iterator[ChangedArgs]:
    if settings.dtype == "float32" or (settings.dtype == "bfloat16" and not gpu.bfloat16):
        after = gpu.default_dtype
        yield SettingChange("dtype", settings.dtype, after), replace(settings, dtype=after)


def _ratio(
    _model: ModelSpec, settings: EngineArgs, gpu: GpuModel, _limits: FitLimits
) -> Iterator[ChangedArgs]:
    free = 1 - CUDA_CONTEXT_BYTES / gpu.usable_bytes
    highest = int(min(HIGHEST_RATIO, free) * 100) / 100
    ratio = 0.01 * (int(settings.memory_ratio * 100) + 1)
    if settings.memory_ratio > highest:
        ratio = highest
    while ratio <= highest + 1e-9:
        after = round(ratio, 2)
        change = SettingChange("gpu-memory-utilization", f"{settings.memory_ratio:g}", f"{after:g}")
        yield change, replace(settings, memory_ratio=after)
        ratio += 0.01


def _batch(model: ModelSpec, settings: EngineArgs, gpu: GpuModel, limits: FitLimits) -> Iterator[ChangedArgs]:
    tokens, sequences = settings.batch(model, gpu)
    for after in (256, 128, 64, 32):
        if limits.sequences <= after < sequences:
            change = SettingChange("max-num-seqs", str(sequences), str(after))
            yield change, replace(settings, max_sequences=after, max_batched_tokens=min(tokens, 2048))


def _eager(
    _model: ModelSpec, settings: EngineArgs, _gpu: GpuModel, _limits: FitLimits
) -> Iterator[ChangedArgs]:
    if not settings.eager:
        yield SettingChange("enforce-eager", "off", "on"), replace(settings, eager=True)


def _shorter(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel, limits: FitLimits
) -> Iterator[ChangedArgs]:
    """The longest ``max-model-len`` that fits, in steps of 256 tokens."""
    before = settings.length(model)
    plan = plan_memory(model, replace(settings, max_length=-1), gpu)
    after = plan.longest // 256 * 256
    if max(SHORTEST_LENGTH, limits.length) <= after < before:
        yield SettingChange("max-model-len", str(before), str(after)), replace(settings, max_length=after)


def _plain_kv(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel, _limits: FitLimits
) -> Iterator[ChangedArgs]:
    if settings.cached_dtype(model).startswith("fp8") and not gpu.fp8_kv_cache:
        after = settings.resolved_dtype(model, gpu.default_dtype) if model.kv_dtype else ""
        change = SettingChange("kv-cache-dtype", settings.kv_dtype or "auto", after or "auto")
        yield change, replace(settings, kv_dtype=after)


def _fp8_kv(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel, _limits: FitLimits
) -> Iterator[ChangedArgs]:
    dtype = settings.resolved_dtype(model, gpu.default_dtype)
    if gpu.fp8_kv_cache and settings.kv_bytes(model, dtype) > 1:
        yield (
            SettingChange("kv-cache-dtype", settings.kv_dtype or "auto", "fp8"),
            replace(settings, kv_dtype="fp8"),
        )


def _quantize(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel, limits: FitLimits
) -> Iterator[ChangedArgs]:
    now = settings.quantization
    if model.quantization.quantized or (now and runs_on(now, gpu.capability)[0]):
        return
    before = "none"
    if now is not None:
        # The format doesn't run on this GPU: try without it, then in another format.
        before = next((name for name, each in PRESETS.items() if each == now), now.label)
        yield SettingChange("quantization", before, "none"), replace(settings, quantization=None)
    for name in limits.quantizations:
        quantization: Quantization = preset(name)
        if quantization.quantized and runs_on(quantization, gpu.capability)[0]:
            yield SettingChange("quantization", before, name), replace(settings, quantization=quantization)


def _tensor_parallel(
    _model: ModelSpec, settings: EngineArgs, _gpu: GpuModel, limits: FitLimits
) -> Iterator[ChangedArgs]:
    most = (limits.count or MOST_GPUS) // settings.pp
    sizes = [*range(settings.tp + 1, most + 1), *range(settings.tp - 1, 0, -1)]
    for tp in sizes:
        yield SettingChange("tensor-parallel-size", str(settings.tp), str(tp)), replace(settings, tp=tp)


def _pipeline_parallel(
    _model: ModelSpec, settings: EngineArgs, _gpu: GpuModel, limits: FitLimits
) -> Iterator[ChangedArgs]:
    most = (limits.count or MOST_GPUS) // settings.tp
    for pp in range(settings.pp + 1, most + 1):
        yield SettingChange("pipeline-parallel-size", str(settings.pp), str(pp)), replace(settings, pp=pp)


STEPS: tuple[Step, ...] = (
    _own_length,
    _dtype,
    _plain_kv,
    _ratio,
    _batch,
    _shorter,
    _eager,
    _fp8_kv,
    _tensor_parallel,
    _pipeline_parallel,
    _quantize,
)
"""From the smallest change to the largest: the length that the model was made for, a dtype and a KV cache
format that the GPU supports, more of the GPU's memory, fewer sequences in a step, shorter requests, no CUDA
graphs (slower), an fp8 KV cache, more GPUs, quantised weights."""
