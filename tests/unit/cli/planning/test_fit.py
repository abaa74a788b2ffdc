"""``tierplane fit`` as a user runs it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from controlplane.cli.planning.fit import command


def run(*args: str) -> Result:
    return CliRunner().invoke(command, list(args), prog_name="tierplane fit", terminal_width=200)


def test_a_model_that_fits() -> None:
    result = run("qwen3-8b", "--gpu", "H100-80G", "--length", "4096")
    assert result.exit_code == 0, result.output
    for text in (
        "8.191 B parameters",
        "weights: feed-forward",
        "KV cache",
        "fits",
        "sequences of 4,096 tokens",
    ):
        assert text in result.output


def test_a_model_that_does_not_fit_names_the_change() -> None:
    result = run("qwen2.5-32b-instruct", "--gpu", "L4", "--count", "4")
    assert result.exit_code == 1
    assert "does not fit" in result.output
    assert "smallest change: tensor-parallel-size 1 → 4" in result.output


def test_json() -> None:
    result = run("qwen2.5-32b-instruct", "--gpu", "L4", "--count", "4", "--json")
    found = json.loads(result.output)
    assert found["fits"] is False
    assert found["smallest_change"] == [{"setting": "tensor-parallel-size", "before": "1", "after": "4"}]
    assert found["needed_bytes"] > found["available_bytes"]
    result = run("qwen3-8b", "--gpu", "H100", "--engine-arg", "max-model-len=8192", "--json")
    found = json.loads(result.output)
    assert found["fits"] is True
    assert found["length"] == 8192
    (stage,) = found["stages"]
    weights = sum(t["size_bytes"] for t in stage["terms"] if t["name"].startswith("weights"))
    assert weights == found["params"] * 2
    assert all(term["source"] for term in stage["terms"])


def test_plain_numbers() -> None:
    numbers = ["--params", "7B", "--layers", "32", "--hidden", "4096", "--heads", "32", "--kv-heads", "8"]
    result = run(*numbers, "--gpu", "A10G", "--max-model-len", "8192")
    assert result.exit_code == 0, result.output
    assert "from plain numbers" in result.output


def test_pipeline_stages_are_shown_one_by_one() -> None:
    result = run("gemma-2-9b-it", "--gpu", "A10", "--pp", "2")
    assert "pipeline stage 1, layers 21 to 41" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["qwen3-8b"], "--gpu is missing"),
        (["--gpu", "T4"], "missing: --layers, --hidden, --heads"),
        (["qwen3-8b", "--gpu", "T4", "--engine-arg", "dtype=odd"], "dtype"),
        (["qwen3-8b", "--gpu", "T4", "--allow", "odd"], "unknown format 'odd'"),
        (["--gpu", "T4", "--params", "x"], "not a number"),
        (["--gpu", "T4", "--params", "1M", "--layers", "9", "--hidden", "999", "--heads", "9"], "fewer"),
    ],
)
def test_wrong_usage(args: list[str], words: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert words in result.output


def test_lists() -> None:
    gpus = json.loads(run("--gpus", "--json").output)["gpus"]
    by_name = {gpu["name"]: gpu for gpu in gpus}
    assert "awq" in by_name["T4"]["quantizations"]
    assert "awq" not in by_name["V100-16G"]["quantizations"]
    assert by_name["H100-80G"]["nvlink_bytes_per_s"] == 900e9
    assert "H100-80G" in run("--gpus").output
    models = json.loads(run("--models", "--json").output)["models"]
    assert {"name": "Qwen/Qwen3-8B", "params": 8190735360} in models
    assert "Qwen/Qwen3-8B" in run("--models").output


def test_arguments_whose_memory_is_not_counted_are_reported() -> None:
    result = run("qwen3-8b", "--gpu", "H100", "--engine-arg", "enable-lora", "--max-model-len", "auto")
    assert "the effect of --enable-lora on memory is not counted" in result.output


def test_a_gguf_type_by_name() -> None:
    result = run("meta-llama/Llama-3.1-8B-Instruct", "--gpu", "T4", "--quantization", "gguf:Q4_K_M",
                 "--max-model-len", "8192")  # fmt: skip
    assert "weights gguf Q4_K" in result.output
    assert result.exit_code == 0
