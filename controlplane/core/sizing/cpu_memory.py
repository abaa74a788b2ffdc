"""The memory of an engine that runs on CPUs: weights, KV cache and its processes.

On CPU every worker allocates its own KV cache (``VLLM_CPU_KVCACHE_SPACE`` GiB each) in the same memory, and
an engine has three kinds of processes. The process constants are resident sets measured with the bundled
model on vLLM 0.32; ``tierplane bench memory`` measures them again. On machines with few cores, tierplane lets
vLLM run its only worker inside the engine core's process; then an engine needs about 0.45 GiB less than
predicted here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.engine_plan import EnginePlan
from controlplane.core.sizing.gpu_memory import activation_bytes, gib
from controlplane.core.sizing.gpu_models import GIB, MIB
from controlplane.core.sizing.kv_cache import KvLayout, kv_layout
from controlplane.core.sizing.weights import (
    MemoryTerm,
    WeightStage,
    divisibility,
    local_bytes,
    stages,
    weight_terms,
)

API_SERVER_BYTES = 752 * MIB
ENGINE_CORE_BYTES = 679 * MIB
WORKER_BYTES = 690 * MIB
"""Resident set of each kind of process without weights and KV cache (see the table in ``memory.md``)."""


@dataclass(frozen=True, slots=True)
class CpuWorker:
    """One worker process: a tensor-parallel rank of a pipeline stage."""

    weights_bytes: int
    """Including the rotary table."""
    tables_bytes: int
    """The rotary table alone."""
    layout: KvLayout
    kv_budget_bytes: int

    @property
    def blocks(self) -> int:
        """KV blocks of this worker, as vLLM reports them."""
        return self.layout.blocks_in(self.kv_budget_bytes)


@dataclass(frozen=True, slots=True)
class CpuPlan(EnginePlan):
    """An engine's memory on one machine without GPUs."""

    terms: tuple[MemoryTerm, ...]
    """For all processes of the engine together."""
    workers: tuple[CpuWorker, ...]
    problems: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """What the whole engine needs, estimates included."""
        return sum(term.size_bytes for term in self.terms)

    @property
    def least_bytes(self) -> int:
        """The least that the engine needs: ``total_bytes`` without the activations, which are only
        estimated."""
        return sum(term.size_bytes for term in self.terms if term.name != "activations")

    @property
    def layout(self) -> KvLayout:
        """The KV cache of the first worker."""
        return self.workers[0].layout

    @property
    def blocks(self) -> int:
        """KV blocks as vLLM reports them: the smallest number over the workers."""
        return self.settings.blocks or min(worker.blocks for worker in self.workers)


def plan_cpu_memory(
    model: ModelSpec, settings: EngineArgs, *, kv_cache_bytes: int, node_bytes: int, packs_16_bit: bool = True
) -> CpuPlan:
    """The memory of one engine on a machine with ``node_bytes`` of memory.

    ``kv_cache_bytes`` is per worker (``VLLM_CPU_KVCACHE_SPACE``); if 0, vLLM gives each worker's cache the
    memory ratio of the machine, less what the worker already holds. ``packs_16_bit`` says whether oneDNN has
    16-bit kernels for this CPU (AVX-512 on x86); otherwise it packs float32 only.
    """
    dtype = settings.resolved_dtype(model)
    tokens, sequences = settings.batch(model, None)
    workers: list[CpuWorker] = []
    activations = packed = 0
    for stage in stages(model, max(1, min(settings.pp, len(model.layers)))):
        found = weight_terms(model, settings, stage, dtype)
        weights = sum(term.size_bytes for term in found)
        tables = sum(term.size_bytes for term in found if term.name == "rotary table")
        if packs_16_bit or dtype == "float32":
            packed += settings.tp * _packed_bytes(model, settings, stage, dtype)
        automatic = int(node_bytes * settings.memory_ratio) - WORKER_BYTES - weights
        layout = kv_layout(
            model,
            tp=settings.tp,
            stage=stage.layers,
            block_tokens=settings.block_tokens(model),
            kv_bytes=settings.kv_bytes(model, dtype),
            in_flight_tokens=settings.in_flight_tokens(model, None),
            hybrid=settings.hybrid_kv,
        )
        workers += [CpuWorker(weights, tables, layout, kv_cache_bytes or automatic)] * settings.tp
        size = activation_bytes(model, settings.tp, tokens, sequences, dtype, last=stage.last)
        activations += settings.tp * size
    count = len(workers)
    kv = sum(max(0, worker.kv_budget_bytes) for worker in workers)
    source = "VLLM_CPU_KVCACHE_SPACE" if kv_cache_bytes else f"{settings.memory_ratio} of the machine"
    terms = (
        MemoryTerm("weights", sum(w.weights_bytes for w in workers), f"config, {dtype}, {count} workers"),
        MemoryTerm("packed copies", packed, "oneDNN's copies of embedding and output head (vLLM 0.32)"),
        MemoryTerm("KV cache", kv, f"{source}, per worker, {count} workers"),
        MemoryTerm(
            "activations", activations, f"estimate for {tokens} batched tokens, {sequences} sequences"
        ),
        MemoryTerm("workers", count * WORKER_BYTES, "resident set measured on vLLM 0.32"),
        MemoryTerm("engine core", ENGINE_CORE_BYTES, "resident set measured on vLLM 0.32"),
        MemoryTerm("API server", API_SERVER_BYTES, "resident set measured on vLLM 0.32"),
    )
    return CpuPlan(model, settings, dtype, terms, tuple(workers), divisibility(model, settings))


def _packed_bytes(model: ModelSpec, settings: EngineArgs, stage: WeightStage, dtype: str) -> int:
    """oneDNN's packed copies on one rank.

    vLLM 0.32 lets oneDNN pack the embedding and the output head without freeing the originals, a tied matrix
    once for each use. It frees the originals of all other matrices.
    """
    embedding = stage.first or (stage.last and model.tied)
    size = local_bytes(model, model.embedding(), settings, dtype) if embedding else 0
    if stage.last:
        size += local_bytes(model, model.head(), settings, dtype)
    return size


@dataclass(frozen=True, slots=True)
class CpuVerdict:
    """Whether an engine fits a machine."""

    fits: bool
    permanent: bool = False
    """Whether it would not fit even if no other program ran."""
    reason: str = ""
    remedy: str = ""
    """The smallest change that would make it fit."""


def judge_cpu(plan: CpuPlan, *, total_bytes: int, available_bytes: int) -> CpuVerdict:
    """Whether the plan fits a machine with that much memory, and the smallest change that would make it fit.

    Activations, which are only estimated, don't count.
    """
    if plan.problems:
        return CpuVerdict(False, True, "; ".join(plan.problems), _other_tp(plan))
    short = _short_cache(plan, total_bytes)
    needed = plan.least_bytes
    kv = _term(plan, "KV cache")
    if short and needed - kv + len(plan.workers) * GIB <= total_bytes:
        return short
    if needed <= available_bytes:
        return CpuVerdict(True)
    permanent = needed > total_bytes
    parts = ", ".join(
        f"{term.name} {gib(term.size_bytes)}" for term in plan.terms if term.name != "activations"
    )
    limit = f"{gib(total_bytes)} in all" if permanent else f"{gib(available_bytes)} available"
    reason = f"the engine needs {gib(needed)} ({parts}), the machine has {limit}"
    return CpuVerdict(
        False, permanent, reason, _remedy(plan, needed, total_bytes if permanent else available_bytes)
    )


def _term(plan: CpuPlan, name: str) -> int:
    return sum(term.size_bytes for term in plan.terms if term.name == name)


def _short_cache(plan: CpuPlan, total_bytes: int) -> CpuVerdict | None:
    """The verdict if the KV cache can't hold one sequence of ``max-model-len``, which vLLM requires to start;
    None if it can."""
    layout = plan.layout
    need = layout.blocks_for(max(plan.length, 1)) + 1
    if plan.blocks >= need:
        return None
    worst = min(plan.workers, key=lambda worker: worker.kv_budget_bytes)
    need_bytes = need * max(worker.layout.block_bytes for worker in plan.workers)
    reason = (
        f"one sequence of max-model-len {plan.length} needs {gib(need_bytes)} of KV cache per worker, "
        f"it has {gib(max(0, worst.kv_budget_bytes))}"
    )
    space = -(-need_bytes // GIB)
    ways = []
    if plan.longest >= 1:
        ways.append(f"lower max-model-len to {plan.longest}")
    rest = plan.least_bytes - _term(plan, "KV cache")
    if rest + len(plan.workers) * space * GIB <= total_bytes:
        ways.append(f"set VLLM_CPU_KVCACHE_SPACE to {space} in the tier's env")
    return CpuVerdict(False, True, reason, ", or ".join(ways))


def _remedy(plan: CpuPlan, needed_bytes: int, limit_bytes: int) -> str:
    """The largest KV cache that fits, else a smaller dtype, else a smaller model."""
    kv = _term(plan, "KV cache")
    count = len(plan.workers)
    per_worker = max(0, limit_bytes - (needed_bytes - kv)) // count // GIB
    layout = plan.layout
    if per_worker >= 1:
        longest = layout.longest(per_worker * GIB // layout.block_bytes - 1, plan.length)
        text = f"set VLLM_CPU_KVCACHE_SPACE to {per_worker} (GiB per worker) in the tier's env"
        return text if longest >= plan.length else f"{text} and max-model-len to {longest}"
    if plan.dtype == "float32" and limit_bytes > needed_bytes - kv - _halved(plan) + count * GIB:
        return "dtype bfloat16 with VLLM_CPU_KVCACHE_SPACE 1, where this CPU computes it"
    return "take a smaller model, a quantised one with engine llamacpp, or a machine with more memory"


def _halved(plan: CpuPlan) -> int:
    return (_term(plan, "weights") + _term(plan, "packed copies")) // 2


def _other_tp(plan: CpuPlan) -> str:
    for tp in (*range(plan.settings.tp - 1, 0, -1), *range(plan.settings.tp + 1, 9)):
        if not divisibility(plan.model, replace(plan.settings, tp=tp)):
            return f"tensor_parallel_size {plan.settings.tp} → {tp}"
    return "take another model"
