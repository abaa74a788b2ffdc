"""Properties of the memory model for any model, parallelism and GPU."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.sizing.architecture import LayerKind, ModelSpec, plain_model
from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.feasibility import Fit, FitLimits, Unfit, judge, shortfalls
from controlplane.core.sizing.gpu_memory import activation_bytes, plan_memory
from controlplane.core.sizing.gpu_models import GpuModel
from controlplane.core.sizing.hf_config import parse_config
from controlplane.core.sizing.kv_cache import kv_bytes_per_token, kv_groups, kv_layout
from controlplane.core.sizing.quantization import PRESETS, matrix_bytes
from controlplane.core.sizing.weights import divisibility, stages
from controlplane.models.catalog import gpu_table, known_models

SPECS = [parse_config(entry["config"], entry["name"]) for entry in known_models()]
models = st.sampled_from(SPECS)
gpus = st.sampled_from([gpu for gpu in gpu_table() if gpu.capability >= 80])


@st.composite
def small_models(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kinds = draw(st.lists(st.sampled_from([LayerKind(), LayerKind(window=64)]), min_size=1, max_size=12))
    spec = plain_model(
        layers=1,
        hidden=64 * draw(st.integers(1, 16)),
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 64, 128])),
        intermediate=64 * draw(st.integers(1, 32)),
        vocab=draw(st.integers(100, 200_000)),
    )
    return replace(spec, layers=tuple(kinds), tied=draw(st.booleans()), qkv_bias=draw(st.booleans()))


@given(small_models(), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 4), gpus)
def test_the_ranks_together_hold_all_parameters(model: ModelSpec, tp: int, pp: int, gpu: GpuModel) -> None:
    split = EngineArgs(tp=tp, pp=min(pp, len(model.layers)))
    if divisibility(model, split):
        return
    plan = plan_memory(model, split, gpu, estimates=False)
    held = sum(
        tp * sum(t.size_bytes for t in stage.terms if t.name.startswith("weights")) for stage in plan.stages
    )
    whole = model.params * 2
    assert held >= whole
    # Beyond that: replicated KV heads and norms, row-parallel biases, padding, a second tied embedding.
    assert held <= whole * tp + 2 * model.embedding().params * 2 + 64 * 4 * model.hidden


@given(small_models(), st.integers(1, 12))
def test_stages_hold_each_layer_once(model: ModelSpec, pp: int) -> None:
    pp = min(pp, len(model.layers))
    found = stages(model, pp)
    assert [layer for stage in found for layer in stage.layers] == list(range(len(model.layers)))
    assert max(len(s.layers) for s in found) - min(len(s.layers) for s in found) <= 1


@given(small_models())
def test_every_layer_is_in_one_group(model: ModelSpec) -> None:
    grouped = [layer for group in kv_groups(model) for layer in group.layers]
    assert sorted(grouped) == list(range(len(model.layers)))
    for group in kv_groups(model):
        assert {model.layers[layer].window for layer in group.layers} == {group.window}


@given(small_models(), st.integers(1, 100_000), st.integers(1, 100_000), st.sampled_from([16, 128]))
def test_blocks_grow_with_length(model: ModelSpec, one: int, other: int, block: int) -> None:
    layout = kv_layout(
        model, tp=1, stage=range(len(model.layers)), block_tokens=block, kv_bytes=2, in_flight_tokens=2048
    )
    shorter, longer = sorted((one, other))
    assert layout.blocks_for(shorter) <= layout.blocks_for(longer)
    # The longest that fits is the longest: one token more does not, unless it costs no block.
    usable = layout.blocks_for(shorter)
    longest = layout.longest(usable, 200_000)
    assert longest >= shorter
    assert layout.blocks_for(longest) <= usable
    if longest < 200_000:
        assert layout.blocks_for(longest + 1) > usable


@given(models, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]))
def test_kv_bytes_per_token(model: ModelSpec, tp: int, kv_bytes: int) -> None:
    found = kv_bytes_per_token(model, tp, kv_bytes)
    if model.mla:
        assert found == len(model.layers) * 576 * kv_bytes
    else:
        heads = max(1, model.kv_heads // tp)
        assert found == len(model.layers) * 2 * heads * model.head_dim * kv_bytes


@given(models, gpus, st.sampled_from([1, 2, 4, 8]), st.integers(1, 32768), st.floats(0.3, 0.95))
def test_sequences_stay_inside_the_budget(
    model: ModelSpec, gpu: GpuModel, tp: int, length: int, ratio: float
) -> None:
    plan = plan_memory(model, EngineArgs(tp=tp, memory_ratio=ratio), gpu)
    count = plan.sequences(length)
    assert count >= 0
    held = count * max(s.layout.block_bytes * s.layout.blocks_for(length) for s in plan.stages)
    assert held <= max(0, plan.worst.kv_budget_bytes)
    assert plan.sequences(length + 1000) <= count
    if count:
        assert plan.worst.fixed_bytes + held <= plan.worst.budget_bytes


@given(
    models,
    st.sampled_from([1, 2, 4]),
    st.integers(1, 16384),
    st.integers(1, 1024),
    st.integers(0, 4096),
    st.integers(0, 512),
)
def test_activations_grow_with_the_batch(
    model: ModelSpec, tp: int, tokens: int, sequences: int, more_tokens: int, more_sequences: int
) -> None:
    small = activation_bytes(model, tp, tokens, sequences, "bfloat16")
    large = activation_bytes(model, tp, tokens + more_tokens, sequences + more_sequences, "bfloat16")
    assert 0 < small <= large


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 64), st.integers(1, 64))
def test_formats_never_take_more_than_16_bit(name: str, inputs: int, outputs: int) -> None:
    inputs, outputs = inputs * 128, outputs * 128
    assert matrix_bytes(PRESETS[name], inputs, outputs, 2) <= inputs * outputs * 2
    assert matrix_bytes(PRESETS[name], inputs, outputs, 2) >= inputs * outputs // 2


# If nothing fits, every combination of changes is tried, which takes up to a second.
@settings(deadline=None, max_examples=40)
@given(models, gpus, st.sampled_from([1, 2, 4]), st.integers(0, 4))
def test_a_verdict_is_right(model: ModelSpec, gpu: GpuModel, tp: int, count: int) -> None:
    limits = FitLimits(
        count=count, length=4096 if model.max_length >= 4096 else 0, quantizations=("fp8", "awq")
    )
    found = judge(plan_memory(model, EngineArgs(tp=tp), gpu), limits)
    if isinstance(found, Fit):
        assert shortfalls(found.plan, limits) == ()
        assert found.sequences >= 1
    elif isinstance(found, Unfit):
        assert found.reasons
        if found.changes:
            assert found.changed is not None
            assert shortfalls(found.changed, limits) == ()
