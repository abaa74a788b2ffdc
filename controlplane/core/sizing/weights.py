"""Bytes of weights per GPU: every matrix split over tensor-parallel ranks and pipeline stages as in vLLM."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.core.sizing.architecture import LayerKind, Matrix, ModelSpec, Split
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.quantization import DTYPE_BYTES, NONE, Quantization, Scheme, matrix_bytes


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One part of the memory of one GPU, and the source of its size."""

    name: str
    size_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class WeightStage:
    """One pipeline stage: its layers, and whether it is the first or the last one."""

    index: int
    layers: range
    first: bool
    last: bool


def stages(model: ModelSpec, pp: int) -> tuple[WeightStage, ...]:
    """The layers over ``pp`` stages as ``vllm.distributed.utils.get_pp_indices`` distributes them: the
    remainder goes to the stages before the last one."""
    count = len(model.layers)
    sizes = [count // pp] * pp
    for i in range(2, count % pp + 2):
        sizes[-i] += 1
    found = []
    start = 0
    for index, size in enumerate(sizes):
        found.append(WeightStage(index, range(start, start + size), index == 0, index == pp - 1))
        start += size
    return tuple(found)


def divisibility(model: ModelSpec, settings: EngineArgs) -> tuple[str, ...]:
    """Why the model can't be split into that many ranks and stages, as messages; empty if it can."""
    tp, pp = settings.tp, settings.pp
    wrong = []
    if model.heads % tp:
        wrong.append(f"{model.heads} attention heads are not divisible by tensor parallel size {tp}")
    kv = model.kv_heads
    if not model.mla and (kv % tp if tp <= kv else tp % kv):
        wrong.append(f"{kv} KV heads can be neither divided nor replicated over tensor parallel size {tp}")
    dense = any(not kind.moe for kind in model.layers)
    if dense and model.intermediate % tp:
        wrong.append(f"the feed-forward width {model.intermediate} is not divisible by {tp}")
    if model.moe and any(kind.moe for kind in model.layers):
        moe = model.moe
        if settings.expert_parallel and moe.experts % tp:
            wrong.append(f"{moe.experts} experts are not divisible by {tp}")
        if not settings.expert_parallel and moe.intermediate % tp:
            wrong.append(f"the experts' width {moe.intermediate} is not divisible by {tp}")
        if moe.shared_intermediate % tp:
            wrong.append(f"the shared experts' width {moe.shared_intermediate} is not divisible by {tp}")
    if model.padded_vocab % tp:
        wrong.append(f"the padded vocabulary {model.padded_vocab} is not divisible by {tp}")
    if pp > len(model.layers):
        wrong.append(f"{len(model.layers)} layers are fewer than pipeline parallel size {pp}")
    return tuple(wrong) + _group_problems(model, settings)


def _group_problems(model: ModelSpec, settings: EngineArgs) -> tuple[str, ...]:
    """Widths that would be split inside a scale group, which a row-parallel matrix in a packed format can't
    be."""
    quantization = settings.weights_format(model)
    group = quantization.group_size
    if settings.tp == 1 or not group or quantization.scheme not in _GROUPED:
        return ()
    widths = {model.intermediate} if any(not kind.moe for kind in model.layers) else set()
    if model.moe and not settings.expert_parallel:
        widths.add(model.moe.intermediate)
    return tuple(
        f"a feed-forward slice of {width // settings.tp} is no multiple of the quantisation group {group}"
        for width in sorted(widths)
        if width % settings.tp == 0 and (width // settings.tp) % group
    )


_GROUPED = frozenset({Scheme.AWQ, Scheme.GPTQ, Scheme.FP8, Scheme.NVFP4, Scheme.MXFP4, Scheme.MXFP8})
"""Formats in which rows of one group of weights can't be split over ranks."""


def local_shape(model: ModelSpec, matrix: Matrix, settings: EngineArgs) -> tuple[int, int, int]:
    """(inputs, outputs, copies) of a matrix on one rank."""
    tp = settings.tp
    if settings.expert_parallel and matrix.copies > 1:
        return matrix.inputs, matrix.outputs, -(-matrix.copies // tp)
    match matrix.split:
        case Split.COLUMN | Split.VOCAB:
            return matrix.inputs, -(-matrix.outputs // tp), matrix.copies
        case Split.ROW:
            return -(-matrix.inputs // tp), matrix.outputs, matrix.copies
        case Split.KV:
            return matrix.inputs, max(1, model.kv_heads // tp) * model.head_dim, matrix.copies
        case Split.REPLICATED:
            return matrix.inputs, matrix.outputs, matrix.copies


def local_bytes(model: ModelSpec, matrix: Matrix, settings: EngineArgs, dtype: str) -> int:
    """Bytes of a matrix (and its bias) on one rank."""
    inputs, outputs, copies = local_shape(model, matrix, settings)
    wide = DTYPE_BYTES[dtype]
    quantization = _format_of(matrix, settings.weights_format(model))
    size = matrix_bytes(quantization, inputs, outputs, wide)
    if matrix.bias:
        size += outputs * wide
    return copies * size


def _format_of(matrix: Matrix, quantization: Quantization) -> Quantization:
    if not matrix.quantizable or _names(quantization.skipped, matrix):
        return NONE
    if quantization.scheme is Scheme.MIXED:
        return next((part for names, part in quantization.parts if _names(names, matrix)), NONE)
    return quantization


_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
"""Matrix → the matrix into which vLLM and some checkpoints join it."""


def _names(modules: Sequence[str], matrix: Matrix) -> bool:
    """Whether a list of modules names the matrix, by its class, a part of its name, or a pattern."""
    path, _, last = matrix.name.rpartition(".")
    path = path.replace("experts", "experts.0") or "self_attn"
    full = "lm_head" if last == "lm_head" else f"model.layers.0.{path}.{last}"
    names = (full, f"model.layers.0.{path}.{_FUSED.get(last, last)}", full.replace(".experts.0", ".experts"))
    for module in modules:
        if module.startswith("re:"):
            if any(_matches(module.removeprefix("re:"), name) for name in names):
                return True
        elif module == "Linear" or any(f".{module}." in f".{name}." for name in names):
            return True
    return False


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False


def weight_terms(
    model: ModelSpec, settings: EngineArgs, stage: WeightStage, dtype: str
) -> tuple[MemoryTerm, ...]:
    """The weights of one GPU of a stage, grouped as reports show them."""
    quantization = settings.weights_format(model)
    wide = DTYPE_BYTES[dtype]
    sums: Counter[str] = Counter()
    kinds = Counter(model.layers[layer] for layer in stage.layers)
    for kind, count in kinds.items():
        for matrix in model.matrices(kind):
            sums[_part(matrix)] += count * local_bytes(model, matrix, settings, dtype)
        sums["norms"] += count * model.layer_norm_params * wide
        sums["norms"] += count * model.router_bias_params(kind) * 4
    source = f"config, split over tensor parallel {settings.tp}" if settings.tp > 1 else "config"
    stored = dtype if not quantization.quantized else quantization.label
    terms = [
        MemoryTerm(f"weights: {name}", sums[name], f"{source}, {stored}")
        for name in ("attention", "feed-forward", "experts")
        if sums[name]
    ]
    if stage.first or (stage.last and model.tied):
        size = local_bytes(model, model.embedding(), settings, dtype)
        terms.append(MemoryTerm("weights: embedding", size, f"{source}, {dtype}, vocabulary padded to 64s"))
    if stage.last and not model.tied:
        size = local_bytes(model, model.head(), settings, dtype)
        terms.append(MemoryTerm("weights: output head", size, f"{source}, vocabulary padded to 64s"))
    norms = sums["norms"] + (model.final_norm_params * wide if stage.last else 0)
    terms.append(MemoryTerm("weights: norms", norms, f"config, {dtype}, whole on every GPU"))
    terms += _derived_terms(model, settings, kinds, dtype)
    return tuple(terms)


def _derived_terms(
    model: ModelSpec, settings: EngineArgs, kinds: Counter[LayerKind], dtype: str
) -> list[MemoryTerm]:
    """Tables and copies that the engine derives from the config and the weights while loading."""
    wide = DTYPE_BYTES[dtype]
    rotary = model.mla.rope_head_dim if model.mla else int(model.head_dim * model.rotary_ratio)
    tables = 2 if len({kind.window for kind in model.layers}) > 1 and model.norms_per_layer == 4 else 1
    tables = tables if model.qk_norm else 1
    size = tables * model.max_length * rotary * wide
    terms = [
        MemoryTerm("rotary table", size, "max_position_embeddings x rotary dimensions, whole on every GPU")
    ]
    if model.mla and settings.weights_format(model).quantized:
        mla = model.mla
        one = model.heads // settings.tp * mla.kv_lora_rank * (mla.nope_head_dim + mla.v_head_dim) * wide
        terms.append(
            MemoryTerm(
                "absorbed MLA matrices", one * sum(kinds.values()), f"kv_b_proj unpacked to {dtype} by vLLM"
            )
        )
    return terms


def _part(matrix: Matrix) -> str:
    if not matrix.name.startswith("mlp"):
        return "attention"
    return "feed-forward" if matrix.name.startswith("mlp.") and matrix.copies == 1 else "experts"
