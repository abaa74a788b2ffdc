"""The memory of an engine that runs on CPUs: weights, KV cache and what its processes need besides.

On CPU every worker allocates its own KV cache (``VLLM_CPU_KVCACHE_SPACE`` GiB each) in the same memory, and
an engine is three kinds of processes. The process constants are resident sets measured with the bundled
model on vLLM 0.32; ``tierplane bench memory`` measures them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.architecture import ModelSpec
from controlplane.core.engine_settings import EngineSettings
from controlplane.core.gpus import MIB
from controlplane.core.kv_cache import KvLayout, kv_layout
from controlplane.core.memory import activation_bytes
from controlplane.core.weights import Term, divisibility, stages, weight_terms

API_SERVER_BYTES = 750 * MIB
ENGINE_CORE_BYTES = 700 * MIB
WORKER_BYTES = 800 * MIB
"""Resident set of a process without weights and KV cache (see the table in ``memory.md``)."""


@dataclass(frozen=True, slots=True)
class CpuWorker:
    """One worker process: a tensor-parallel rank of a pipeline stage."""

    weights_bytes: int
    layout: KvLayout
    kv_budget_bytes: int

    @property
    def blocks(self) -> int:
        """KV blocks, as vLLM reports them."""
        return self.layout.blocks_in(self.kv_budget_bytes)


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """An engine's memory on one machine without GPUs."""

    model: ModelSpec
    settings: EngineSettings
    dtype: str
    terms: tuple[Term, ...]
    """Over all processes of the engine."""
    workers: tuple[CpuWorker, ...]
    problems: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """What the whole engine needs."""
        return sum(term.size_bytes for term in self.terms)

    @property
    def blocks(self) -> int:
        """KV blocks as vLLM reports them."""
        return self.settings.blocks or min(worker.blocks for worker in self.workers)

    @property
    def usable_blocks(self) -> int:
        """Blocks that sequences can use: vLLM keeps one back."""
        return max(0, self.blocks - 1)

    @property
    def length(self) -> int:
        """The longest sequence the engine promises."""
        if self.settings.max_length < 0:
            return self.longest
        return self.settings.length(self.model)

    @property
    def longest(self) -> int:
        """The longest sequence that fits alone, up to the model's own limit."""
        return self.workers[0].layout.longest(self.usable_blocks, self.model.max_length)

    @property
    def max_concurrency(self) -> float:
        """vLLM's «Maximum concurrency for N tokens per request»."""
        need = self.workers[0].layout.blocks_for(self.length)
        return self.blocks / need if need else 0.0

    @property
    def kv_tokens(self) -> int:
        """vLLM's «CPU KV cache size: N tokens»."""
        return int(self.max_concurrency * self.length)

    def sequences(self, length: int) -> int:
        """How many sequences of ``length`` tokens fit at once."""
        need = self.workers[0].layout.blocks_for(length)
        by_blocks = self.usable_blocks // need if need else 0
        return min(by_blocks, self.settings.batch(self.model, None)[1])


def plan_cpu_memory(
    model: ModelSpec, settings: EngineSettings, *, kv_cache_bytes: int, node_bytes: int
) -> CpuPlan:
    """The memory of one engine on a machine of ``node_bytes``.

    ``kv_cache_bytes`` is per worker (``VLLM_CPU_KVCACHE_SPACE``); 0: vLLM takes the memory ratio of the
    machine per worker, less what the worker already holds.
    """
    dtype = settings.resolved_dtype(model)
    tokens, sequences = settings.batch(model, None)
    workers: list[CpuWorker] = []
    activations = 0
    for stage in stages(model, max(1, min(settings.pp, len(model.layers)))):
        weights = sum(term.size_bytes for term in weight_terms(model, settings, stage, dtype))
        automatic = int(node_bytes * settings.memory_ratio) - WORKER_BYTES - weights
        layout = kv_layout(
            model,
            tp=settings.tp,
            stage=stage.layers,
            block_tokens=settings.block_tokens(model),
            kv_bytes=settings.kv_bytes(dtype),
            in_flight_tokens=settings.in_flight_tokens(model, None),
            hybrid=settings.hybrid_kv,
        )
        workers += [CpuWorker(weights, layout, kv_cache_bytes or automatic)] * settings.tp
        size = activation_bytes(model, settings.tp, tokens, sequences, dtype, last=stage.last)
        activations += settings.tp * size
    count = len(workers)
    kv = sum(max(0, worker.kv_budget_bytes) for worker in workers)
    given = "VLLM_CPU_KVCACHE_SPACE" if kv_cache_bytes else f"{settings.memory_ratio} of the machine"
    terms = (
        Term("weights", sum(w.weights_bytes for w in workers), f"config, {dtype}, {count} workers"),
        Term("KV cache", kv, f"{given}, per worker, {count} workers"),
        Term("activations", activations, f"estimate for {tokens} batched tokens, {sequences} sequences"),
        Term("workers", count * WORKER_BYTES, "resident set measured on vLLM 0.32"),
        Term("engine core", ENGINE_CORE_BYTES, "resident set measured on vLLM 0.32"),
        Term("API server", API_SERVER_BYTES, "resident set measured on vLLM 0.32"),
    )
    return CpuPlan(model, settings, dtype, terms, tuple(workers), divisibility(model, settings))
