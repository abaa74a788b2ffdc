"""Values of vLLM's flags that can't be right are refused before an engine is started."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.config import parse_plane
from controlplane.errors import ConfigError


def problems(**engine_args: Any) -> dict[str, str]:
    args = {name.replace("_", "-"): value for name, value in engine_args.items()}
    try:
        parse_plane({"tiers": [{"name": "a", "model": "m", "engine_args": args}]})
    except ConfigError as error:
        return {
            problem.path.removeprefix("tiers[0].engine_args."): f"{problem.message} ({problem.remedy})"
            for problem in error.problems
        }
    return {}


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("gpu-memory-utilization", 95, "did you mean 0.95?"),
        ("gpu-memory-utilization", 90.5, "did you mean 0.905?"),
        ("gpu-memory-utilization", "95", "did you mean 0.95?"),
        ("gpu-memory-utilization", 1.01, "must be at most 1"),
        ("gpu-memory-utilization", 0, "must be above 0"),
        ("gpu-memory-utilization", -0.5, "must be above 0"),
        ("gpu-memory-utilization", "90%", "a number"),
        ("gpu-memory-utilization", float("nan"), "finite"),
        ("device-memory-utilization", 95, "did you mean 0.95?"),
        ("max-model-len", -5, "at least -1"),
        ("max-model-len", 0, "at least 1"),
        ("max-model-len", 4096.5, "a whole number"),
        ("max-model-len", "4.5K", "a whole number"),
        ("max-model-len", "4 k", "a whole number"),
        ("max-model-len", True, "needs a value"),
        ("max-num-seqs", 0, "at least 1"),
        ("max-num-seqs", -1, "at least 1"),
        ("max-num-seqs", "8k", "digits only"),
        ("max-num-seqs", [1, 2], "one value"),
        ("max-num-batched-tokens", -2048, "at least 1"),
        ("kv-cache-memory-bytes", -1, "at least 1"),
        ("num-gpu-blocks-override", 0, "at least 1"),
        ("block-size", 0, "above 0"),
        ("dtype", "fp16", "did you mean 'half'?"),
        ("dtype", "bf16", "did you mean 'bfloat16'?"),
        ("dtype", "torch.float16", "one of vLLM's choices"),
        ("dtype", "Float16", "did you mean 'float16'?"),
        ("dtype", 16, "one of vLLM's choices"),
        ("kv-cache-dtype", "fp9", "did you mean 'fp8'?"),
        ("quantization", "AWQ4", "one of vLLM's choices"),
        ("load-format", 1.5, "put it in quotes"),
        ("revision", 1e5, "put it in quotes"),
        ("enforce-eager", "yes", "write true or false"),
        ("enforce-eager", "true", "write true or false"),
        ("enforce-eager", 1, "write true or false"),
        ("no-enforce-eager", False, "write enforce-eager: true"),
        ("speculative-config", "{model: x}", "JSON"),
        ("compilation-config", "O3", "JSON"),
        ("seed", 1.5, "a whole number"),
        ("headless", True, "can't be set here"),
        ("uds", "/tmp/x", "can't be set here"),
        ("ssl-certfile", "x", "can't be set here"),
        ("config", "x.yaml", "can't be set here"),
        ("port", 8000, "can't be set here"),
        ("api-key", "sk-1", "can't be set here"),
        ("served-model-name", "x", "served_model_name"),
        ("tensor-parallel-size", 2, "tensor_parallel_size"),
        ("tp", 2, "no such flag"),
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(flag: str, value: Any, says: str) -> None:
    found = problems(**{flag: value})
    assert list(found) == [flag]
    assert says in found[flag]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("gpu-memory-utilization", 1), ("gpu-memory-utilization", "0.9"), ("max-model-len", "auto"),
        ("max-model-len", -1), ("max-model-len", "32k"), ("max-model-len", "32K"), ("max-model-len", "1.5k"),
        ("dtype", "half"), ("dtype", "float16"), ("dtype", None), ("enforce-eager", False),
        ("no-enable-prefix-caching", True), ("cudagraph-capture-sizes", [1, 2, 4]), ("seed", -3),
        ("compilation-config", '{"mode": 3}'), ("hf-overrides", "{}"), ("revision", "0755123"),
        ("revision", 17), ("quantization", "awq"),
        ("allowed-origins", '["*"]'), ("moe-backend", "Flashinfer-Cutlass"), ("lora-modules", ["a=b", "c=d"]),
        ("hf-token", True), ("disable-log-stats", True), ("max-logprobs", -1), ("tokenizer-revision", "None"),
    ],
)  # fmt: skip
def test_values_that_are_right(flag: str, value: Any) -> None:
    assert problems(**{flag: value}) == {}


@pytest.mark.parametrize(
    "engine_args",
    [
        {"gpu-memory-utilization": 0.5, "device-memory-utilization": 0.6},
        {"enable-prefix-caching": True, "no-enable-prefix-caching": True},
    ],
)
def test_one_setting_by_two_flags(engine_args: dict[str, Any]) -> None:
    found = problems(**engine_args)
    assert list(found) == [list(engine_args)[1]]
    assert "sets the same" in found[list(engine_args)[1]]


def test_a_flag_spelt_twice() -> None:
    args = {"max_num_seqs": 4, "max-num-seqs": 5}
    with pytest.raises(ConfigError, match="'max_num_seqs' is the same flag"):
        parse_plane({"tiers": [{"name": "a", "model": "m", "engine_args": args}]})


def test_a_step_must_hold_its_sequences() -> None:
    found = problems(max_num_batched_tokens=64, max_num_seqs=128)
    assert "max-num-seqs" in found["max-num-batched-tokens"]


def test_all_values_are_reported_at_once() -> None:
    found = problems(gpu_memory_utilization=95, max_model_len=-5, dtype="fp16", uds="x", enforce_eager="on")
    assert len(found) == 5
