"""The context length, dtype and KV format of a configuration, beside what vLLM's own ModelConfig says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from controlplane.core.sizing.architecture import ModelSpec
from controlplane.core.sizing.hf_config import parse_config
from controlplane.models.catalog import config_defaults

pytest.importorskip("vllm")

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 1000,
}
KV_FP8 = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": LLAMA,
    "float32": {**LLAMA, "torch_dtype": "float32"},
    "linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {
        **LLAMA,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "yarn": {
        **LLAMA,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    },
    "left out": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "num_hidden_layers": 2,
    },
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64},
    "longrope": {
        **LLAMA,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
        "pad_token_id": 0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "bfloat16",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "fp8 KV cache": {**LLAMA, "quantization_config": KV_FP8},
}
PROGRAM = """
import json, sys
from vllm.config import ModelConfig
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
found = {}
for name, folder in json.load(sys.stdin).items():
    made = ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True)
    refused = False
    try:
        ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True, max_model_len=LENGTHS[name] + 1)
    except ValueError as error:
        refused = "greater" in str(error)
    kv = resolve_kv_cache_dtype_string("auto", made)
    found[name] = (made.max_model_len, str(made.dtype).removeprefix("torch."), kv, refused)
print("FOUND" + json.dumps(found))
"""


def expected(spec: ModelSpec) -> list[Any]:
    dtype = "bfloat16" if spec.dtype == "float32" else spec.dtype
    return [spec.default_length, dtype, "fp8_e4m3" if spec.kv_dtype == "fp8" else "auto", True]


def test_lengths_and_dtypes_are_those_of_vllm(tmp_path: Path) -> None:
    folders = {}
    for name, config in CONFIGS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        folders[name] = str(folder)
    specs = {name: parse_config(config, name, config_defaults()) for name, config in CONFIGS.items()}
    lengths = {name: spec.max_length for name, spec in specs.items()}
    done = subprocess.run(
        [sys.executable, "-c", f"LENGTHS = {lengths!r}\n{PROGRAM}"],
        input=json.dumps(folders),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert found == {name: expected(spec) for name, spec in specs.items()}
