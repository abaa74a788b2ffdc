"""Verdicts, and the smallest change that would fit."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.core.sizing.engine_args import EngineArgs
from controlplane.core.sizing.feasibility import Fit, FitLimits, Unfit, judge, shortfalls
from controlplane.core.sizing.gpu_memory import plan_memory
from controlplane.core.sizing.quantization import preset
from controlplane.models.catalog import gpu_named, gpu_table, known_model

ALLOWED = ("fp8", "awq")


def verdict(model: str, gpu: str, settings: EngineArgs, **limits: Any) -> Fit | Unfit:
    spec = known_model(model)
    assert spec is not None
    return judge(plan_memory(spec, settings, gpu_named(gpu)), FitLimits(**limits))


def test_a_fit_reports_sequences_and_length() -> None:
    found = verdict("qwen3-8b", "H100", EngineArgs(max_length=8192), length=4096)
    assert isinstance(found, Fit)
    assert found.length == 4096
    assert found.sequences == min(found.plan.usable_blocks // 256, 1024)


@pytest.mark.parametrize(
    ("model", "gpu", "settings", "limits", "flags"),
    [
        # A setting that the GPU doesn't support is removed before another GPU is suggested.
        (
            "qwen2.5-1.5b-instruct",
            "T4",
            {"kv_dtype": "fp8", "max_length": 8192},
            {"alternatives": gpu_table()},
            ["kv-cache-dtype"],
        ),
        (
            "qwen2.5-7b-instruct",
            "V100-32G",
            {"quantization": preset("fp8"), "max_length": 8192},
            {"alternatives": gpu_table()},
            ["quantization"],
        ),
        # Changes without a cost first: here the engine doesn't use the whole GPU.
        ("qwen2.5-7b-instruct", "L4", {"memory_ratio": 0.7}, {"length": 8192}, ["gpu-memory-utilization"]),
        ("llama-3.1-8b-instruct", "L4", {}, {}, ["max-model-len"]),
        # The length is fixed: an fp8 cache makes room for that many sequences.
        (
            "llama-3.1-8b-instruct",
            "L4",
            {"max_length": 16384, "memory_ratio": 0.97, "max_sequences": 8, "eager": True},
            {"sequences": 4, "length": 16384},
            ["kv-cache-dtype"],
        ),
        (
            "llama-3.1-8b-instruct",
            "V100-16G",
            {"dtype": "bfloat16", "max_length": 8192},
            {"count": 2},
            ["dtype", "tensor-"],
        ),
        ("qwen2.5-32b-instruct", "L4", {}, {"count": 4}, ["tensor-parallel-size"]),
        ("qwen2.5-32b-instruct", "L40S", {}, {"count": 1, "quantizations": ALLOWED}, ["quantization"]),
        ("smollm2-135m-instruct", "T4", {"tp": 2}, {}, ["tensor-parallel-size"]),
        (
            "llama-3.1-70b-instruct",
            "T4",
            {"max_length": 4096},
            {"count": 1, "alternatives": gpu_table()},
            ["gpu"],
        ),
    ],
)
def test_the_smallest_change(
    model: str, gpu: str, settings: dict[str, Any], limits: dict[str, Any], flags: list[str]
) -> None:
    found = verdict(model, gpu, EngineArgs(**settings), **limits)
    assert isinstance(found, Unfit)
    assert found.reasons
    assert len(found.changes) == len(flags), found.remedy
    for change, flag in zip(found.changes, flags, strict=True):
        assert change.setting.startswith(flag)
    assert found.changed is not None
    assert shortfalls(found.changed, FitLimits(**limits)) == ()


def test_a_reason_contains_the_figures() -> None:
    found = verdict("llama-3.1-70b-instruct", "H100", EngineArgs())
    assert isinstance(found, Unfit)
    assert "GiB" in found.reasons[0]
    assert found.needed_bytes > found.available_bytes > 0


def test_a_verdict_says_that_no_change_helps() -> None:
    found = verdict("deepseek-v3", "T4", EngineArgs(), count=1)
    assert isinstance(found, Unfit)
    assert found.changes == ()
    assert found.remedy.startswith("no ")


def test_more_parallel_than_there_are_gpus() -> None:
    found = verdict("qwen3-8b", "H100", EngineArgs(tp=4), count=2)
    assert isinstance(found, Unfit)
    assert "more than 2 GPUs" in found.reasons[0]
    assert str(found.changes[0]) == "tensor-parallel-size 4 → 2"


def test_a_gpu_that_vllm_does_not_support() -> None:
    found = verdict("smollm2-135m-instruct", "P100", EngineArgs(), alternatives=gpu_table())
    assert isinstance(found, Unfit)
    assert "7.0" in found.reasons[0]
    assert found.changes[0].setting == "gpu"


def test_a_whole_gpu_leaves_no_room_for_cuda() -> None:
    found = verdict("qwen3-0.6b", "T4", EngineArgs(memory_ratio=1.0))
    assert isinstance(found, Unfit)
    assert "CUDA context" in found.reasons[0]
    assert found.changes[0].setting == "gpu-memory-utilization"
