"""Parameter counts of every known family against the model class in ``transformers``, on no device."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from controlplane.core.sizing.hf_config import FAMILIES, parse_config
from controlplane.core.sizing.quantization import Scheme
from controlplane.core.sizing.quantization_config import parse_quantization

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MLA = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 48}),
    ("ministral", {"head_dim": 48}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("phi3", {}),
    ("granite", {"attention_bias": True}),
    ("smollm3", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 320, "mlp_only_layers": [1]}),
    ("qwen3", {"head_dim": 64, "attention_bias": True}),
    ("qwen3_moe", {**MOE, "head_dim": 64, "decoder_sparse_step": 2}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 64}),
    ("gemma2", {"head_dim": 64, "sliding_window": 128}),
    ("gemma3_text", {"num_hidden_layers": 7, "head_dim": 64, "sliding_window": 128}),
    ("phi", {"num_key_value_heads": 8}),
    ("starcoder2", {}),
    ("deepseek_v2", {**MLA, "q_lora_rank": None}),
    ("deepseek_v3", {**MLA, "q_lora_rank": 96, "n_group": 2, "topk_group": 1}),
]


@pytest.mark.parametrize(("family", "change"), CASES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(CASES)])
def test_parameter_counts_equal_the_model_class(family: str, change: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.AutoConfig.for_model(family, **{**SMALL, **change})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    # DeepSeek-V3 keeps its router's correction as a buffer there and as a parameter in vLLM.
    counted += sum(buffer.numel() for name, buffer in model.named_buffers() if "correction" in name)
    written = json.loads(config.to_json_string(use_diff=False))
    assert parse_config(written, family).params == counted
    assert parse_config({"model_type": family, **SMALL, **change}, family).params == counted


def test_every_family_is_compared() -> None:
    assert {family for family, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, [64, 64, 64, 64]),
        ({"model_type": "mistral", "sliding_window": None}, [0, 0, 0, 0]),
        ({"model_type": "gemma2", "sliding_window": 64}, [64, 0, 64, 0]),
        ({"model_type": "gemma3_text", "sliding_window": 64, "sliding_window_pattern": 2}, [64, 0, 64, 0]),
        ({"model_type": "qwen2", "sliding_window": 64}, [0, 0, 0, 0]),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2},
            [0, 0, 64, 64],
        ),
        (
            {
                "model_type": "llama",
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            [0, 64, 0, 64],
        ),
    ],
)
def test_windows(change: dict[str, Any], windows: list[int]) -> None:
    spec = parse_config({**SMALL, **change}, "x")
    assert [kind.window for kind in spec.layers] == windows


def test_the_language_model_of_a_multimodal_config() -> None:
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "text_config": {**SMALL, "model_type": "gemma3_text", "head_dim": 64},
        "vision_config": {"hidden_size": 99},
    }
    spec = parse_config(config, "x")
    assert spec.qk_norm
    assert spec.dtype == "bfloat16"
    assert "only the language model" in spec.notes[0]


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_field_is_named(field: str) -> None:
    config = {**SMALL, "model_type": "llama"}
    del config[field]
    with pytest.raises(ValueError, match=field):
        parse_config(config, "x")


def test_an_unknown_family_says_how_it_was_read() -> None:
    spec = parse_config({**SMALL, "model_type": "new_llm"}, "x")
    assert "new_llm" in spec.notes[0]
    assert spec.params == parse_config({**SMALL, "model_type": "llama"}, "x").params


@pytest.mark.parametrize(
    ("raw", "scheme", "bits", "group"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, Scheme.AWQ, 4, 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True}, Scheme.GPTQ, 8, 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, Scheme.GPTQ, 4, 0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Scheme.FP8, 8, 128),
        ({"quant_method": "fp8"}, Scheme.FP8, 8, 0),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Scheme.BITSANDBYTES, 4, 64),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                        "input_activations": {"num_bits": 8},
                    }
                },
            },
            Scheme.INT8,
            8,
            0,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True},
                        "input_activations": None,
                    }
                },
            },
            Scheme.GPTQ,
            4,
            128,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            Scheme.FP8,
            8,
            0,
        ),
    ],
)
def test_quantization_configs(raw: dict[str, Any], scheme: Scheme, bits: int, group: int) -> None:
    found = parse_quantization(raw)
    assert (found.weights.scheme, found.weights.bits, found.weights.group_size) == (scheme, bits, group)
    assert (found.notes, found.guesses) == ((), ())


def test_an_unknown_quantization_is_reported_and_not_guessed() -> None:
    found = parse_quantization({"quant_method": "tomorrow"})
    assert not found.weights.quantized
    assert "tomorrow" in found.guesses[0]
