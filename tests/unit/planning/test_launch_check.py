"""Launches that can't fit are refused with figures and a remedy; what is unknown never refuses a launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.core.sizing.gpu_models import GIB
from controlplane.errors import EngineError, EngineStartError
from controlplane.planning import launch_check
from controlplane.planning.cpu_info import NodeMemory, node_memory, packs_16_bit
from controlplane.planning.launch_check import check_launch, launchable_model
from tests.support.gpu_reader import FakeGpuReader, memory_sample

SMALL = "bundled:smollm2-135m"
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def tier(**fields: Any) -> TierConfig:
    return TierConfig(**{"name": "t", "model": "m", "device": "cpu", **fields})


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_check, "node_memory", lambda: NodeMemory(16 * GIB, 12 * GIB))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def gpus(
    name: str = "NVIDIA L4",
    mib: int = 23034,
    free_mib: int = 22500,
    *,
    capability: tuple[int, int] = (8, 9),
    count: int = 1,
) -> FakeGpuReader:
    return FakeGpuReader(*(memory_sample(index, name, mib, free_mib, capability) for index in range(count)))


def test_a_launch_that_fits_reports_the_kv_cache() -> None:
    found = check_launch(tier(), SMALL)
    assert found.checked
    assert "23,296 tokens" in found.text


@pytest.mark.parametrize(
    ("fields", "model", "kind", "words"),
    [
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "30"}}, SMALL, EngineStartError, "VLLM_CPU_KVCACHE_SPACE to 13"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "11"}}, SMALL, EngineError, "12.00 GiB available"),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "1.5"}}, SMALL, EngineStartError, "whole number"),
        ({"tensor_parallel_size": 2}, SMALL, EngineStartError, "2 → 1"),
        ({"engine_args": {"max-model-len": 131072}}, SMALL, EngineStartError, "lower max-model-len to"),
        ({}, "meta-llama/Llama-3.1-70B-Instruct", EngineStartError, "smaller model"),
    ],
)
def test_on_cpu(fields: dict[str, Any], model: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        check_launch(tier(**fields), model)
    assert type(caught.value) is kind
    assert "GiB" in str(caught.value) or "heads" in str(caught.value)


def test_on_gpus() -> None:
    small = tier(device="gpu", engine_args={"max-model-len": 8192})
    found = check_launch(small, "Qwen/Qwen2.5-7B-Instruct", reader=gpus())
    assert found.checked
    assert "KV cache for about" in found.text
    with pytest.raises(EngineStartError, match=r"30\.\d+ GiB|61\.\d+ GiB") as caught:
        check_launch(small, "Qwen/Qwen2.5-32B-Instruct", reader=gpus())
    assert "The smallest change: tensor-parallel-size 1 → 4" in str(caught.value)


def test_estimates_alone_never_refuse_a_launch() -> None:
    # Weights and one sequence fit; activations and CUDA graphs by estimate do not.
    tight = tier(device="gpu", engine_args={"max-model-len": 8192, "gpu-memory-utilization": 0.72})
    found = check_launch(tight, "Qwen/Qwen2.5-7B-Instruct", reader=gpus())
    assert found.checked
    assert "tight" in found.text


def test_gpus_that_vllm_chooses_on_several_nodes_are_not_checked() -> None:
    wide = tier(device="gpu", pipeline_parallel_size=2, pipeline_across_nodes=True)
    found = check_launch(wide, SMALL, reader=gpus(free_mib=10))
    assert not found.checked
    assert "on several nodes" in found.text
    with pytest.raises(EngineStartError, match="9 attention heads"):
        check_launch(wide.model_copy(update={"tensor_parallel_size": 2}), SMALL, reader=gpus())


def test_memory_that_other_programs_use() -> None:
    with pytest.raises(EngineError, match=r"gpu-memory-utilization to 0\.4") as caught:
        check_launch(tier(device="gpu"), SMALL, reader=gpus(free_mib=10000))
    assert not isinstance(caught.value, EngineStartError)


def test_only_the_gpus_of_the_replica_count() -> None:
    reader = gpus(count=2)
    assert check_launch(tier(device="gpu"), SMALL, ("GPU-1",), reader=reader).checked
    assert not check_launch(tier(device="gpu"), SMALL, ("7",), reader=reader).checked


def test_a_gpu_that_is_not_in_the_table() -> None:
    reader = gpus("NVIDIA New", 16384, 16000, capability=(9, 0))
    assert check_launch(tier(device="gpu"), SMALL, reader=reader).checked
    with pytest.raises(EngineStartError, match="NVIDIA New"):
        check_launch(tier(device="gpu"), "Qwen/Qwen2.5-14B-Instruct", reader=reader)


def test_without_a_driver_divisibility_is_still_checked() -> None:
    assert not check_launch(tier(device="gpu"), SMALL).checked
    with pytest.raises(EngineStartError, match="9 attention heads"):
        check_launch(tier(device="gpu", tensor_parallel_size=2), SMALL)


def test_an_unknown_model_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = check_launch(tier(), "someone/unknown-model")
    assert not found.checked
    assert "not checked" in found.text
    assert not check_launch(tier(engine_args={"kv-cache-dtype": "fp8_inc"}), SMALL).checked
    assert not check_launch(tier(engine="simulated"), SMALL).checked


def test_an_engine_gets_a_model_only_if_it_can_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    phases: list[str] = []
    with pytest.raises(EngineStartError, match=r"needs \d+.*smaller model"):
        launchable_model(tier(), (), str(tmp_path), phases.append)
    assert phases == ["checking that it fits"]
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA_70B | {"num_hidden_layers": 1, "vocab_size": 32000})
    )
    assert launchable_model(tier(), (), str(tmp_path), phases.append) == str(tmp_path)


@pytest.mark.parametrize(
    "odd", [{"quantization_config": {"quant_method": "quark"}}, {"model_type": "not_yet_known"}]
)
def test_a_model_whose_size_is_guessed_is_not_refused(tmp_path: Path, odd: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | odd))
    found = check_launch(tier(device="gpu"), str(tmp_path), reader=gpus())
    assert not found.checked
    assert "memory was not checked" in found.text


@pytest.mark.parametrize("saving", [{"cpu-offload-gb": 60}, {"hf-overrides": '{"num_hidden_layers": 2}'}])
def test_with_an_argument_that_may_reduce_memory_nothing_is_refused(saving: dict[str, Any]) -> None:
    args = {"max-model-len": 8192}
    with pytest.raises(EngineStartError):
        check_launch(tier(device="gpu", engine_args=args), "Qwen/Qwen2.5-32B-Instruct", reader=gpus())
    reduced = tier(device="gpu", engine_args=args | saving)
    assert not check_launch(reduced, "Qwen/Qwen2.5-32B-Instruct", reader=gpus()).checked


def test_a_model_that_breaks_the_check_is_left_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))

    def broken(*_args: Any, **_more: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(launch_check, "cpu_plan", broken)
    assert launchable_model(tier(), (), str(tmp_path), lambda _: None) == str(tmp_path)


def test_this_machine() -> None:
    memory = node_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert isinstance(packs_16_bit(), bool)
