"""Bytes per GPU, KV blocks, and how models are split over GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.sizing.architecture import LayerKind, ModelSpec, plain_model
from controlplane.core.sizing.cpu_memory import judge_cpu, plan_cpu_memory
from controlplane.core.sizing.engine_args import ArgValue, EngineArgs, parse_settings
from controlplane.core.sizing.gpu_memory import MemoryPlan, gib, graph_sizes, plan_memory
from controlplane.core.sizing.gpu_models import GIB, MIB
from controlplane.core.sizing.kv_cache import kv_groups, kv_layout
from controlplane.core.sizing.quantization import BNB4, INT8
from controlplane.core.sizing.weights import divisibility, stages, weight_terms
from controlplane.models.catalog import gpu_named, known_model

H100 = gpu_named("H100")
L4 = gpu_named("L4")


def known(name: str) -> ModelSpec:
    spec = known_model(name)
    assert spec is not None
    return spec


def weights(plan: MemoryPlan, stage: int = 0) -> int:
    return sum(t.size_bytes for t in plan.stages[stage].terms if t.name.startswith("weights"))


@pytest.mark.parametrize(
    ("name", "args", "tp", "logged_gib"),
    [
        # «Model loading took 14.9889 GiB», with the rotary table: vllm-project/vllm#17122, L40S.
        ("llama-3.1-8b-instruct", {}, 1, 14.9889),
        # «Model loading took 14.2474 GiB» on each of four: vllm-project/vllm#17327.
        ("qwen3-30b-a3b", {}, 4, 14.2474),
    ],
)
def test_weights_against_public_logs_of_vllm(
    name: str, args: dict[str, str], tp: int, logged_gib: float
) -> None:
    plan = plan_memory(known(name), parse_settings(dict(args), tp=tp), H100)
    assert plan.worst.weights_bytes / GIB == pytest.approx(logged_gib, rel=0.001)


def test_weights_of_one_gpu_are_all_parameters() -> None:
    for name in ("llama-3.1-8b-instruct", "qwen2.5-0.5b-instruct", "gemma-2-9b-it"):
        spec = known(name)
        assert weights(plan_memory(spec, EngineArgs(), H100)) == spec.params * 2


def test_padding_of_the_vocabulary_counts() -> None:
    spec = plain_model(layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocab=1001)
    plan = plan_memory(spec, EngineArgs(), H100)
    assert spec.padded_vocab == 1024
    assert weights(plan) == (spec.params + 2 * 23 * 64) * 2


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks() -> None:
    spec = known("qwen2.5-3b-instruct")  # 2 KV heads
    per_layer = [
        kv_layout(spec, tp=tp, stage=range(36), block_tokens=16, kv_bytes=2, in_flight_tokens=0).page_bytes
        for tp in (1, 2, 4, 8)
    ]
    assert per_layer == [16 * 2 * 2 * 128 * 2, *[16 * 2 * 128 * 2] * 3]


def test_mla_caches_one_latent_per_token_on_every_rank() -> None:
    spec = known("deepseek-v3")
    plans = [plan_memory(spec, EngineArgs(tp=tp), gpu_named("B200")) for tp in (1, 8)]
    assert {plan.stages[0].layout.page_bytes for plan in plans} == {16 * 576 * 2}
    fp8 = plan_memory(spec, EngineArgs(tp=8, kv_dtype="fp8"), gpu_named("B200"))
    assert fp8.stages[0].layout.page_bytes == 16 * 576


@pytest.mark.parametrize(
    ("full", "sliding", "groups"),
    [(4, 0, [4]), (0, 4, [4]), (2, 2, [2, 2]), (10, 20, [10, 10, 10]), (13, 12, [13, 12]), (1, 5, [1] * 6)],
)
def test_layers_are_grouped_as_vllm_does(full: int, sliding: int, groups: list[int]) -> None:
    kinds = [LayerKind()] * full + [LayerKind(window=128)] * sliding
    spec = replace(
        plain_model(layers=1, hidden=64, heads=4, kv_heads=2, intermediate=64), layers=tuple(kinds)
    )
    assert [len(group.layers) for group in kv_groups(spec)] == groups
    assert sorted(layer for group in kv_groups(spec) for layer in group.layers) == list(range(len(kinds)))
    assert [len(g.layers) for g in kv_groups(spec, hybrid=False)] == [len(kinds)]


def test_sliding_layers_store_their_window_and_tokens_in_flight() -> None:
    spec = known("gemma-2-9b-it")
    plan = plan_memory(spec, EngineArgs(max_batched_tokens=512), L4)
    layout = plan.stages[0].layout
    # 21 full layers hold 8192 tokens; 21 sliding ones 4095 + 2 x 512 in flight, and one block more.
    assert layout.blocks_for(8192) == 512 + (-(-(4095 + 1024) // 16) + 1)
    assert layout.layers_per_block == 21


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"), [(32, 1, [32]), (32, 4, [8] * 4), (30, 4, [7, 8, 8, 7]), (61, 2, [31, 30])]
)
def test_layers_are_distributed_over_stages_as_in_vllm(layers: int, pp: int, sizes: list[int]) -> None:
    spec = plain_model(layers=layers, hidden=64, heads=4, kv_heads=2, intermediate=64)
    found = stages(spec, pp)
    assert [len(stage.layers) for stage in found] == sizes
    assert [stage.first for stage in found] == [True] + [False] * (pp - 1)
    assert [stage.last for stage in found] == [False] * (pp - 1) + [True]


def test_a_tied_embedding_is_on_both_ends_of_a_pipeline() -> None:
    spec = known("qwen2.5-0.5b-instruct")
    plan = plan_memory(spec, EngineArgs(pp=2), L4)
    assert weights(plan, 0) + weights(plan, 1) == (spec.params + spec.embedding().params) * 2


@pytest.mark.parametrize(
    ("name", "tp", "words"),
    [
        ("smollm2-135m-instruct", 2, "9 attention heads"),
        ("smollm2-135m-instruct", 9, "padded vocabulary"),
        ("qwen2.5-7b-instruct", 7, "KV heads"),
        ("llama-3.1-8b-instruct", 3, "feed-forward width"),
    ],
)
def test_the_size_that_is_not_divisible_is_named(name: str, tp: int, words: str) -> None:
    assert words in "; ".join(divisibility(known(name), EngineArgs(tp=tp)))


def test_divisible_models() -> None:
    assert divisibility(known("smollm2-135m-instruct"), EngineArgs(tp=3)) == ()
    assert divisibility(known("deepseek-v3"), EngineArgs(tp=8, expert_parallel=True)) == ()
    assert "fewer" in divisibility(known("qwen3-8b"), EngineArgs(pp=37))[0]


def test_a_group_of_a_packed_format_is_not_split() -> None:
    spec = known("qwen2.5-72b-instruct")
    assert divisibility(spec, EngineArgs(tp=8)) == ()
    awq = parse_settings({"quantization": "awq"}, tp=8)
    assert "3696 is no multiple of the quantisation group 128" in divisibility(spec, awq)[0]


def test_formats_do_not_quantise_embeddings() -> None:
    spec = known("llama-3.1-8b-instruct")
    (stage,) = stages(spec, 1)
    full = {t.name: t.size_bytes for t in weight_terms(spec, EngineArgs(), stage, "bfloat16")}
    for quantization in (INT8, BNB4):
        settings = EngineArgs(quantization=quantization)
        small = {t.name: t.size_bytes for t in weight_terms(spec, settings, stage, "bfloat16")}
        assert small["weights: embedding"] == full["weights: embedding"]
        assert small["weights: output head"] == full["weights: output head"]
        assert small["weights: feed-forward"] < full["weights: feed-forward"] * 0.51


def test_defaults_of_the_batch_follow_the_gpu() -> None:
    spec = known("llama-3.1-8b-instruct")
    settings = EngineArgs()
    assert settings.batch(spec, H100) == (8192, 1024)
    assert settings.batch(spec, gpu_named("A100-80G")) == (2048, 256)
    assert settings.batch(spec, gpu_named("B200")) == (16384, 1024)
    assert EngineArgs(tp=3).batch(spec, None) == (2048 * 3, 128 * 3)
    assert EngineArgs(max_sequences=4, max_length=100).batch(spec, L4) == (400, 4)


def test_captured_graphs() -> None:
    assert graph_sizes(8192, 4) == (1, 2, 4, 8)
    assert len(graph_sizes(8192, 256)) == 51  # «PIECEWISE=51 (largest=512)» in vllm-project/vllm#39559
    assert len([n for n in graph_sizes(8192, 256) if n <= 256]) == 35  # «FULL=35 (largest=256)»
    assert max(graph_sizes(8192, 1024, 100)) == 1024


def test_kv_cache_in_bytes_overrides_the_memory_ratio() -> None:
    plan = plan_memory(known("qwen3-8b"), EngineArgs(kv_cache_bytes=4 * GIB), H100)
    assert plan.blocks == 4 * GIB // (16 * 36 * 2 * 8 * 128 * 2)


def test_the_longest_sequence_that_fits() -> None:
    plan = plan_memory(known("llama-3.1-8b-instruct"), EngineArgs(max_length=-1), L4)
    assert 0 < plan.longest == plan.length < 131072
    assert plan.sequences(plan.longest) == 1
    assert plan.sequences(plan.longest + 16) == 0


def test_without_estimates_only_weights_remain() -> None:
    plan = plan_memory(known("qwen3-8b"), EngineArgs(), L4, estimates=False)
    assert plan.worst.fixed_bytes == plan.worst.weights_bytes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max-model-len": "long"}, "max-model-len"),
        ({"gpu-memory-utilization": 1.5}, "gpu-memory-utilization"),
        ({"dtype": "int4"}, "dtype"),
        ({"kv-cache-dtype": "fp2"}, "kv-cache-dtype"),
        ({"quantization": "magic"}, "quantization"),
    ],
)
def test_an_invalid_argument_is_named(args: dict[str, ArgValue], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_settings(args)


def test_arguments() -> None:
    settings = parse_settings(
        {
            "max_model_len": "8k",
            "max-num-batched-tokens": "2K",
            "enforce-eager": None,
            "no-async-scheduling": True,
            "enable-expert-parallel": "true",
            "dtype": "half",
            "kv-cache-dtype": "fp8_e4m3",
            "speculative-config": "{}",
        }
    )
    assert (settings.max_length, settings.max_batched_tokens) == (8000, 2048)
    assert settings.eager
    assert settings.expert_parallel
    assert settings.dtype == "float16"
    assert settings.kv_bytes(known("Qwen/Qwen3-8B"), "float16") == 1
    assert settings.unmodelled == ("speculative-config",)


def test_plain_numbers() -> None:
    spec = plain_model(layers=32, hidden=4096, heads=32, kv_heads=8, params=7e9)
    assert spec.params == pytest.approx(7e9, rel=0.01)
    with pytest.raises(ValueError, match="fewer"):
        plain_model(layers=32, hidden=4096, heads=32, kv_heads=8, params=1e9)
    with pytest.raises(ValueError, match="params or intermediate"):
        plain_model(layers=32, hidden=4096, heads=32, kv_heads=8)


# What vLLM 0.32 reported on CPU for the bundled model (see memory.md).
@pytest.mark.parametrize(
    ("tp", "dtype", "kv_gib", "blocks"),
    [(1, "float32", 1, 182), (3, "float32", 1, 546), (1, "float32", 2, 364)],
)
def test_cpu_blocks_as_vllm_reported(tp: int, dtype: str, kv_gib: int, blocks: int) -> None:
    settings = parse_settings({"dtype": dtype}, tp=tp, device="cpu")
    plan = plan_cpu_memory(
        known("smollm2-135m-instruct"), settings, kv_cache_bytes=kv_gib * GIB, node_bytes=24 * GIB
    )
    assert plan.blocks == blocks
    assert plan.kv_tokens == blocks * 128
    assert len(plan.workers) == tp


def test_cpu_verdicts() -> None:
    spec = known("smollm2-135m-instruct")
    settings = parse_settings({"dtype": "float32"}, device="cpu")
    plan = plan_cpu_memory(spec, settings, kv_cache_bytes=GIB, node_bytes=24 * GIB)
    assert judge_cpu(plan, total_bytes=24 * GIB, available_bytes=20 * GIB).fits
    now = judge_cpu(plan, total_bytes=24 * GIB, available_bytes=2 * GIB)
    assert (now.fits, now.permanent) == (False, False)
    ever = judge_cpu(plan, total_bytes=2 * GIB, available_bytes=2 * GIB)
    assert (ever.fits, ever.permanent) == (False, True)
    large = plan_cpu_memory(spec, settings, kv_cache_bytes=30 * GIB, node_bytes=24 * GIB)
    verdict = judge_cpu(large, total_bytes=24 * GIB, available_bytes=24 * GIB)
    assert "VLLM_CPU_KVCACHE_SPACE to 21" in verdict.remedy
    long = plan_cpu_memory(
        spec, replace(settings, max_length=131072), kv_cache_bytes=GIB, node_bytes=24 * GIB
    )
    short = judge_cpu(long, total_bytes=24 * GIB, available_bytes=24 * GIB)
    assert "lower max-model-len to" in short.remedy
    odd = plan_cpu_memory(spec, replace(settings, tp=2), kv_cache_bytes=GIB, node_bytes=24 * GIB)
    assert judge_cpu(odd, total_bytes=24 * GIB, available_bytes=24 * GIB).remedy.endswith("2 → 1")


def test_an_automatic_cpu_cache_takes_the_remainder_of_the_memory_ratio() -> None:
    settings = parse_settings({"dtype": "float32", "gpu-memory-utilization": 0.5}, device="cpu")
    plan = plan_cpu_memory(known("smollm2-135m-instruct"), settings, kv_cache_bytes=0, node_bytes=16 * GIB)
    assert 6 * GIB < plan.workers[0].kv_budget_bytes < 8 * GIB


def test_bytes_as_text() -> None:
    assert [gib(15 * GIB), gib(200 * MIB), gib(2 * MIB), gib(131072)] == [
        "15.00 GiB",
        "0.20 GiB",
        "2.0 MiB",
        "128.0 KiB",
    ]
