"""The bundled tables: published totals, and plausible rows."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.core.sizing.hf_config import parse_config
from controlplane.errors import SetupError
from controlplane.models.catalog import gpu_named, gpu_table, known_model, known_models


@pytest.mark.parametrize("entry", known_models(), ids=lambda entry: entry["name"])
def test_totals_are_the_published_ones(entry: dict[str, Any]) -> None:
    spec = parse_config(entry["config"], entry["name"])
    assert spec.params == entry["total_params"]
    assert not spec.notes
    if "active_params_billion" in entry:
        # Publishers count the input embedding as active.
        active = (spec.active_params + spec.embedding().params) / 1e9
        assert active == pytest.approx(entry["active_params_billion"], rel=0.02)


@pytest.mark.parametrize("gpu", gpu_table(), ids=lambda gpu: gpu.name)
def test_gpu_rows(gpu: Any) -> None:
    assert 0.95 < gpu.usable_mib / gpu.memory_mib <= 1
    assert gpu.source
    assert gpu.bandwidth_bytes_per_s > 1e11
    assert ("bfloat16" in gpu.flops) == gpu.bfloat16
    assert ("fp8" in gpu.flops) == (gpu.capability >= 89)
    assert ("int8" in gpu.flops) == (gpu.capability >= 75)


def test_names_and_aliases_identify_one_gpu() -> None:
    assert gpu_named("h100").name == gpu_named("NVIDIA H100 80GB HBM3").name == "H100-80G"
    assert gpu_named("V100M32").name == "V100-32G"
    names = [name.lower() for gpu in gpu_table() for name in (gpu.name, gpu.nvml_name, *gpu.aliases)]
    assert len(set(names)) == len(names)


def test_an_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(SetupError, match="H100-80G"):
        gpu_named("G2")


def test_models_by_short_name() -> None:
    spec = known_model("qwen3-8b")
    assert spec is not None
    assert spec.name == "Qwen/Qwen3-8B"
    assert known_model("no/such") is None
