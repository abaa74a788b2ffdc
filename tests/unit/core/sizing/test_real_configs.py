"""Configurations as published checkpoints have them: left-out fields, quantised weights, lengths."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.context_length import context_length
from controlplane.core.sizing.engine_args import parse_settings
from controlplane.core.sizing.feasibility import Unfit, judge
from controlplane.core.sizing.gpu_memory import plan_memory, token_bytes
from controlplane.core.sizing.hf_config import parse_config
from controlplane.core.sizing.quantization import NONE, Scheme
from controlplane.core.sizing.quantization_config import parse_quantization
from controlplane.models.catalog import config_defaults, gpu_named, known_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_32B: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "max_position_embeddings": 40960,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}


def spec(config: dict[str, Any]) -> ModelSpec:
    return parse_config(config, "x", config_defaults())


@pytest.mark.parametrize(
    ("config", "heads", "kv_heads", "head_dim", "vocab", "hidden"),
    [
        pytest.param(
            {
                "model_type": "gemma3",
                "torch_dtype": "bfloat16",
                "vision_config": VISION,
                "text_config": {
                    "hidden_size": 2560,
                    "intermediate_size": 10240,
                    "model_type": "gemma3_text",
                    "num_hidden_layers": 34,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                    "sliding_window": 1024,
                },
            },
            *(8, 4, 256, 262208, 2560),
            id="gemma-3-4b-it",
        ),
        pytest.param(
            {
                "model_type": "llava",
                "vision_config": VISION,
                "text_config": {
                    "max_position_embeddings": 4096,
                    "model_type": "llama",
                    "vocab_size": 32064,
                },
            },
            *(32, 32, 128, 32064, 4096),
            id="llava-1.5-7b-hf",
        ),
        pytest.param(
            {"model_type": "mistral3", "vision_config": VISION, "text_config": {"num_hidden_layers": 40}},
            *(32, 8, 128, 32000, 4096),
            id="the type of the language model is left out too",
        ),
        pytest.param(
            {**LLAMA, "num_attention_heads": 40, "hidden_size": 5120, "num_key_value_heads": None},
            *(40, 40, 128, 128256, 5120),
            id="null is a value: as many KV heads as heads",
        ),
    ],
)
def test_what_a_config_leaves_out_is_transformers_default(
    config: dict[str, Any], heads: int, kv_heads: int, head_dim: int, vocab: int, hidden: int
) -> None:
    found = spec(config)
    assert (found.heads, found.kv_heads, found.head_dim, found.vocab, found.hidden) == (
        heads,
        kv_heads,
        head_dim,
        vocab,
        hidden,
    )
    assert not found.guesses


def test_the_defaults_that_were_used_are_noted() -> None:
    found = spec({"model_type": "llama", "hidden_size": 2048})
    (note,) = found.notes
    assert note.startswith("left out of the configuration, so as in transformers: num_hidden_layers 32")
    assert "hidden_size" not in note


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({**LLAMA, "vision_config": VISION}, "vision"),
        ({"model_type": "qwen2_audio", "audio_config": {"d_model": 8}, "text_config": LLAMA}, "audio"),
        ({**QWEN_32B, "model_type": "qwen2_5_vl", "vision_config": VISION}, "vision"),
    ],
)
def test_parts_that_are_not_counted_are_noted(config: dict[str, Any], part: str) -> None:
    assert any(part in note for note in spec(config).notes)


def test_a_list_with_a_value_for_each_layer_is_counted_at_its_largest_and_noted() -> None:
    found = spec({**LLAMA, "num_key_value_heads": [8, 4] * 16, "intermediate_size": [14336] * 32})
    assert (found.kv_heads, found.intermediate) == (8, 14336)
    (guess,) = found.guesses
    assert "num_key_value_heads differs between layers" in guess
    with pytest.raises(ValueError, match="'num_attention_heads' \\(found \\['a'\\]\\)"):
        spec({**LLAMA, "num_attention_heads": ["a"]})


MODELOPT = {"quant_method": "modelopt"}
GROUPS = {"quant_method": "compressed-tensors"}
FLOAT4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float", "strategy": "tensor"}


def group(weights: dict[str, Any], *targets: str) -> dict[str, Any]:
    return {"weights": weights, "input_activations": weights, "targets": list(targets or ("Linear",))}


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        ({**MODELOPT, "quant_algo": "NVFP4", "config_groups": {"g": group(FLOAT4)}}, "nvfp4 4 bit g16"),
        ({**MODELOPT, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}, "nvfp4 4 bit g16"),
        ({"quant_method": "modelopt_fp4"}, "nvfp4 4 bit g16"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "fp8 8 bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": group(FLOAT4)}}, "nvfp4 4 bit g16"),
        ({**GROUPS, "config_groups": {"g": group(FLOAT4 | {"group_size": 32})}}, "mxfp4 4 bit g32"),
        ({"quant_method": "mxfp4"}, "mxfp4 4 bit g32"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": group(FLOAT8, "re:.*self_attn.*"),
                    "b": group(FLOAT4, "re:.*mlp.*"),
                },
            },
            "mixed: fp8 8 bit, nvfp4 4 bit g16",
        ),
    ],
)  # fmt: skip
def test_four_bit_floats_and_groups(raw: dict[str, Any], label: str) -> None:
    found = parse_quantization(raw)
    assert found.weights.label == label
    assert not found.guesses


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "modelopt", "quant_algo": "NEW"},
        {"quant_method": "compressed-tensors"},
        {**GROUPS, "config_groups": {"g": {"weights": {"type": "float", "num_bits": 6}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": "x"}},
        {"quant_method": 5},
    ],
)  # fmt: skip
def test_a_format_that_is_not_known_is_a_guess(raw: dict[str, Any]) -> None:
    found = parse_quantization(raw)
    assert found.weights is NONE
    assert found.guesses


def weight_gib(config: dict[str, Any], gpu: str = "RTX5090") -> float:
    plan = plan_memory(spec(config), parse_settings({"max-model-len": 8192}), gpu_named(gpu))
    return sum(term.size_bytes for term in plan.worst.terms if term.name.startswith("weights")) / 2**30


def test_the_size_of_mixed_formats_is_between_those_of_their_parts() -> None:
    def quantized(**groups: dict[str, Any]) -> float:
        return weight_gib(
            {
                **QWEN_32B,
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": groups,
                    "ignore": ["lm_head"],
                },
            }
        )

    four, eight = quantized(g=group(FLOAT4)), quantized(g=group(FLOAT8))
    mixed = quantized(a=group(FLOAT8, "re:.*self_attn.*"), b=group(FLOAT4, "re:.*(gate|up|down)_proj"))
    assert 19 < four < 21  # 31.2 B weights in 4.5 bits, embedding and head in 16
    assert 31 < eight < 33
    attention = 64 * 5120 * (64 + 8) * 128 * 2
    assert mixed - four == pytest.approx(attention * 3.5 / 8 / 2**30, abs=0.01)


def test_a_wildcard_in_the_exceptions_names_the_attention() -> None:
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    whole = weight_gib({**QWEN_32B, "quantization_config": {"quant_method": "mxfp4"}})
    attention = 64 * 5120 * (64 + 8) * 128 * 2
    assert weight_gib({**QWEN_32B, "quantization_config": quantization}) - whole == pytest.approx(
        attention * (16 - 4.25) / 8 / 2**30, abs=0.01
    )
    assert parse_quantization(quantization).notes == ()
    single = parse_quantization({"quant_method": "fp8", "ignored_layers": ["model.layers.3.mlp.down_proj"]})
    assert "1 exceptions" in single.notes[0]


@pytest.mark.parametrize(
    ("raw", "args", "gpu", "size_bytes"),
    [
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": group(FLOAT8)},
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            },
            {},
            "L4",
            65536,
        ),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
            {},
            "L4",
            65536,
        ),
        (
            {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
            {"kv-cache-dtype": "bfloat16"},
            "L4",
            131072,
        ),
        ({"quant_method": "fp8"}, {}, "L4", 131072),
    ],
)
def test_the_kv_cache_has_the_checkpoints_format(
    raw: dict[str, Any], args: dict[str, Any], gpu: str, size_bytes: int
) -> None:
    model = spec({**LLAMA, "quantization_config": raw})
    plan = plan_memory(model, parse_settings({"max-model-len": 8192, **args}), gpu_named(gpu))
    assert token_bytes(plan) == size_bytes


def test_a_gpu_without_an_fp8_cache_gets_the_engines_dtype_suggested() -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    model = spec({**LLAMA, "num_hidden_layers": 8, "quantization_config": quantization})
    verdict = judge(
        plan_memory(model, parse_settings({"max-model-len": 2048, "dtype": "float16"}), gpu_named("T4"))
    )
    assert isinstance(verdict, Unfit)
    assert "an fp8 KV cache needs" in verdict.reasons[0]
    assert verdict.remedy == "kv-cache-dtype auto → float16"


POSITIONS = "max_position_embeddings"


@pytest.mark.parametrize(
    ("config", "longest", "default"),
    [
        ({POSITIONS: 4096}, 4096, 4096),
        ({"n_positions": 1024, POSITIONS: 2048}, 1024, 1024),
        ({}, 2048, 2048),
        ({POSITIONS: 8192, "model_max_length": 131072}, 131072, 131072),
        ({POSITIONS: 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384, 16384),
        ({POSITIONS: 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 8192, 8192),
        ({POSITIONS: 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, 131072, 131072),
        ({POSITIONS: 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, 32768, 32768),
        (
            {
                POSITIONS: 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
            131072,
            4096,
        ),
        ({POSITIONS: 4096, "rope_scaling": {"type": "linear", "factor": None}}, 4096, 4096),
        (
            {
                POSITIONS: 4096,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            32768,
            32768,
        ),
        (
            {
                "model_type": "gemma3_text",
                POSITIONS: 131072,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            131072,
            131072,
        ),
    ],
)
def test_lengths(config: dict[str, Any], longest: int, default: int) -> None:
    assert context_length(config, config) == (longest, default)


@pytest.mark.parametrize(
    ("name", "length", "own"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", 8192, 4096),
        ("meta-llama/Llama-3.1-8B-Instruct", 200000, 131072),
    ],
)
def test_a_length_over_the_models_own_does_not_fit(name: str, length: int, own: int) -> None:
    model = known_model(name)
    assert model is not None
    verdict = judge(plan_memory(model, parse_settings({"max-model-len": length}), gpu_named("H100-80G")))
    assert isinstance(verdict, Unfit)
    assert f"more than the model's own {own} tokens" in verdict.reasons[0]
    assert verdict.remedy == f"max-model-len {length} → {own}"
    changed = parse_settings({"max-model-len": length, "hf-overrides": "{}"})
    assert not plan_memory(model, changed, gpu_named("H100-80G")).problems


def test_every_scheme_has_its_hardware() -> None:
    from controlplane.core.sizing.quantization import HARDWARE

    assert set(HARDWARE) == set(Scheme)
