"""Memory per GPU for a model and engine arguments: weights, KV cache, activations and overhead.

The result is a :class:`MemoryPlan` with one :class:`StageMemory` per pipeline stage (tensor-parallel ranks of
a stage are equal). Weights and KV blocks are exact; activations, CUDA graphs and overhead are estimates,
whose constants and their sources are below. ``memory.md`` beside this file compares predictions with what
vLLM reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.engine_plan import EnginePlan
from controlplane.core.sizing.gpu_models import GIB, MIB, GpuModel
from controlplane.core.sizing.kv_cache import KvLayout, kv_bytes_per_token, kv_layout
from controlplane.core.sizing.quantization import DTYPE_BYTES, runs_on
from controlplane.core.sizing.weights import MemoryTerm, WeightStage, divisibility, stages, weight_terms

CUDA_CONTEXT_BYTES = 512 * MIB
"""CUDA context and kernels of one process, which vLLM doesn't count (estimate: nvidia-smi shows 0.4 to
0.6 GiB for a process that only initialised CUDA)."""

NON_TORCH_BYTES = 164 * MIB
"""Non-torch memory of vLLM's profile on one GPU (0.16 GiB in the log of vllm-project/vllm#12126)."""

COMMUNICATION_BYTES = 512 * MIB
"""NCCL channels and custom all-reduce buffers with more than one GPU (estimate)."""

GRAPH_BYTES = 8 * MIB
"""Per captured CUDA graph (estimate: 0.73 GiB for 86 graphs in the log of vllm-project/vllm#39559)."""

SAMPLER_FLOATS = 5
"""float32 copies of the logits alive at once in the sampler: logits, processed logits, softmax, its
workspace and the noise (read in ``vllm/v1/sample``, 0.32; older versions sorted and needed twice that)."""

MINIMUM_CAPABILITY = 70
"""Compute capability x 10 that vLLM's installation guide requires; wheels built with CUDA 13 require 7.5."""

HIGHEST_RATIO = 0.97
"""The highest ``gpu-memory-utilization`` that is suggested."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The memory of one GPU of one pipeline stage."""

    stage: WeightStage
    terms: tuple[MemoryTerm, ...]
    """Everything except the KV cache."""
    budget_bytes: int
    """Memory that the engine may use: the memory ratio times the GPU's usable memory."""
    kv_budget_bytes: int
    """What remains for KV blocks, or ``kv-cache-memory-bytes`` if set; negative if the terms alone exceed the
    budget."""
    layout: KvLayout

    @property
    def weights_bytes(self) -> int:
        """Weights and what the engine derives from them while loading."""
        return sum(term.size_bytes for term in self.terms if term.name not in RUNTIME_TERMS)

    @property
    def fixed_bytes(self) -> int:
        """Everything except the KV cache."""
        return sum(term.size_bytes for term in self.terms)

    @property
    def blocks(self) -> int:
        """KV blocks that fit on this GPU."""
        return self.layout.blocks_in(self.kv_budget_bytes)


RUNTIME_TERMS = frozenset({"activations", "CUDA graphs", "framework", "communication"})
"""Terms that are not weights."""


@dataclass(frozen=True, slots=True)
class MemoryPlan(EnginePlan):
    """An engine's memory on its GPUs."""

    gpu: GpuModel
    stages: tuple[StageMemory, ...]
    problems: tuple[str, ...] = ()
    """Why the engine would refuse these settings, however much memory there is."""
    extra: MemoryTerm | None = None
    """What every GPU holds beyond what the model's config explains."""

    @property
    def layout(self) -> KvLayout:
        """The KV cache of the first pipeline stage."""
        return self.stages[0].layout

    @property
    def blocks(self) -> int:
        """KV blocks as vLLM reports them: the smallest number over the stages."""
        return self.settings.blocks or min(stage.blocks for stage in self.stages)

    def sequences(self, length: int) -> int:
        """How many sequences of ``length`` tokens fit at once, by KV blocks and by ``max-num-seqs``."""
        needed = self.layout.blocks_for(length)
        by_blocks = self.usable_blocks // needed if needed else 0
        return min(by_blocks, self.settings.batch(self.model, self.gpu)[1])

    @property
    def worst(self) -> StageMemory:
        """The stage with the least room for KV blocks."""
        return min(self.stages, key=lambda stage: stage.kv_budget_bytes)


def plan_memory(
    model: ModelSpec,
    settings: EngineArgs,
    gpu: GpuModel,
    extra: MemoryTerm | None = None,
    *,
    estimates: bool = True,
) -> MemoryPlan:
    """The memory of one engine on GPUs of one model.

    ``extra`` is what every GPU holds beyond what the config explains (other parts of a checkpoint). Without
    ``estimates`` only the exact terms are counted: a plan that doesn't fit then can't fit.
    """
    dtype = settings.resolved_dtype(model, gpu.default_dtype)
    problems = list(divisibility(model, settings))
    problems += length_problems(model, settings)
    problems += _gpu_problems(model, settings, gpu, dtype)
    found = []
    for stage in stages(model, max(1, min(settings.pp, len(model.layers)))):
        terms = list(weight_terms(model, settings, stage, dtype))
        if extra:
            terms.append(extra)
        if estimates:
            terms += _runtime_terms(model, settings, gpu, stage, dtype)
        fixed = sum(term.size_bytes for term in terms)
        budget = int(gpu.usable_bytes * settings.memory_ratio)
        kv_budget = settings.kv_cache_bytes or budget - fixed
        found.append(
            StageMemory(stage, tuple(terms), budget, kv_budget, _layout(model, settings, gpu, stage, dtype))
        )
    return MemoryPlan(model, settings, dtype, gpu, tuple(found), tuple(problems), extra)


def _layout(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel | None, stage: WeightStage, dtype: str
) -> KvLayout:
    return kv_layout(
        model,
        tp=settings.tp,
        stage=stage.layers,
        block_tokens=settings.block_tokens(model),
        kv_bytes=settings.kv_bytes(model, dtype),
        in_flight_tokens=settings.in_flight_tokens(model, gpu),
        hybrid=settings.hybrid_kv,
    )


def length_problems(model: ModelSpec, settings: EngineArgs) -> list[str]:
    """Why vLLM would refuse the length of the sequences, as messages."""
    if settings.max_length <= model.max_length or settings.any_length:
        return []
    own = f"the model's own {model.max_length} tokens"
    return [f"max-model-len {settings.max_length} is more than {own}: vLLM refuses it"]


def _gpu_problems(model: ModelSpec, settings: EngineArgs, gpu: GpuModel, dtype: str) -> list[str]:
    wrong = []
    if gpu.capability < MINIMUM_CAPABILITY:
        wrong.append(f"vLLM needs compute capability 7.0; {gpu.name} has {gpu.capability / 10}")
    runs, why = runs_on(settings.weights_format(model), gpu.capability)
    if not runs:
        wrong.append(why)
    if dtype == "bfloat16" and not gpu.bfloat16:
        wrong.append(f"bfloat16 needs compute capability 8.0; {gpu.name} has {gpu.capability / 10}")
    if settings.cached_dtype(model).startswith("fp8") and not gpu.fp8_kv_cache:
        wrong.append(f"an fp8 KV cache needs compute capability 8.0; {gpu.name} has {gpu.capability / 10}")
    highest = 1 - CUDA_CONTEXT_BYTES / gpu.usable_bytes
    if settings.memory_ratio > highest and not settings.kv_cache_bytes:
        wrong.append(
            f"a memory ratio of {settings.memory_ratio} leaves no room for the CUDA context: "
            f"at most {highest:.3f} is free at start on {gpu.name}"
        )
    return wrong


def _runtime_terms(
    model: ModelSpec, settings: EngineArgs, gpu: GpuModel, stage: WeightStage, dtype: str
) -> list[MemoryTerm]:
    tokens, sequences = settings.batch(model, gpu)
    size = activation_bytes(model, settings.tp, tokens, sequences, dtype, last=stage.last)
    what = f"estimate for {tokens} batched tokens and {sequences} sequences"
    terms = [MemoryTerm("activations", size, what)]
    sizes = () if settings.eager else graph_sizes(tokens, sequences, gpu.capability)
    graphs = len(sizes) + sum(size <= sequences for size in sizes)
    if graphs:
        terms.append(MemoryTerm("CUDA graphs", graphs * GRAPH_BYTES, f"estimate: {graphs} graphs of 8 MiB"))
    terms.append(MemoryTerm("framework", NON_TORCH_BYTES, "estimate: non-torch memory in vLLM's public logs"))
    if settings.world_size > 1:
        terms.append(
            MemoryTerm("communication", COMMUNICATION_BYTES, "estimate: NCCL and all-reduce buffers")
        )
    return terms


def activation_bytes(
    model: ModelSpec, tp: int, tokens: int, sequences: int, dtype: str, *, last: bool = True
) -> int:
    """The peak of one step's temporary tensors: a layer over all tokens, or the sampler over all sequences.

    A layer holds the residual stream, its input and output, and the wider of attention and feed-forward;
    the sampler holds the hidden states and :data:`SAMPLER_FLOATS` float32 copies of the logits.
    """
    wide = DTYPE_BYTES[dtype]
    stream = tokens * model.hidden * wide
    if model.mla:
        heads = model.heads // tp * (model.mla.nope_head_dim + model.mla.rope_head_dim)
        attention = tokens * (3 * heads + model.mla.cache_dim) * wide
    else:
        kv = max(1, model.kv_heads // tp)
        attention = tokens * (2 * (model.heads // tp) + 2 * kv) * model.head_dim * wide
    widest = 3 * model.intermediate
    moe = model.moe
    if moe:
        routed = moe.experts_per_token * (3 * moe.intermediate + model.hidden * tp)
        widest = max(widest if _has_dense(model) else 0, routed + 3 * moe.shared_intermediate)
    feed_forward = tokens * (widest // tp) * wide
    layer = 3 * stream + max(attention, feed_forward)
    if not last:
        return layer
    logits = sequences * model.padded_vocab
    return max(layer, stream + logits * (wide + 4 * SAMPLER_FLOATS))


def _has_dense(model: ModelSpec) -> bool:
    return any(not kind.moe for kind in model.layers)


def graph_sizes(tokens: int, sequences: int, capability: int = 80) -> tuple[int, ...]:
    """The batch sizes for which vLLM captures CUDA graphs (``VllmConfig._set_cudagraph_sizes``, 0.32)."""
    largest = min(sequences * 2, 1024 if capability // 10 == 10 else 512, tokens)
    sizes = [n for n in (1, 2, 4) if n <= largest]
    sizes += range(8, min(largest + 1, 256), 8)
    sizes += range(256, largest + 1, 16)
    if tokens <= largest and tokens not in sizes:
        sizes.append(tokens)
    return tuple(sorted(set(sizes)))


def token_bytes(plan: MemoryPlan) -> int:
    """KV bytes of one token over all layers on one rank (all pipeline stages together)."""
    return kv_bytes_per_token(plan.model, plan.settings.tp, plan.settings.kv_bytes(plan.model, plan.dtype))


def gib(size_bytes: float) -> str:
    """Bytes as text with a suitable unit, such as ``14.99 GiB``."""
    if abs(size_bytes) >= GIB / 10:
        return f"{size_bytes / GIB:.2f} GiB"
    if abs(size_bytes) >= MIB / 2 or not size_bytes:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes / 1024:.1f} KiB"
