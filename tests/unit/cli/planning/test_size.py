"""``tierplane size`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from controlplane.cli.planning.size import command
from controlplane.config import parse_plane
from controlplane.errors import ConfigError, SetupError
from tests.support.config_file import write_config

TYPES = [
    {"name": "small", "gpu": "L4", "gpus": 4, "cpus": 48, "memory_gib": 192, "cost_per_hour": 3},
    {"name": "big", "gpu": "H100-80G", "gpus": 8, "cpus": 192, "memory_gib": 1024, "cost_per_hour": 30},
]
LIGHT: dict[str, Any] = {
    "name": "light",
    "model": "Qwen/Qwen2.5-1.5B-Instruct",
    "engine_args": {"max-model-len": 8192},
    "expected": {"requests_per_s": 20, "input_tokens": 500, "output_tokens": 150},
}
HEAVY: dict[str, Any] = {
    "name": "heavy",
    "model": "Qwen/Qwen2.5-72B-Instruct",
    "engine_args": {"max-model-len": 8192},
    "expected": {
        "requests_per_s": 1,
        "input_tokens": 1000,
        "output_tokens": 200,
        "quantizations": ["none", "fp8"],
    },
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(folder: Path, *tiers: dict[str, Any], types: Any = TYPES, nodes: Any = None) -> Result:
    config, cluster = write_config(folder, {"tiers": list(tiers)}), folder / "cluster.yaml"
    nodes = nodes or [{"type": "small", "count": 2}, {"type": "big"}]
    cluster.write_text(yaml.safe_dump({"node_types": types, "nodes": nodes}))
    return CliRunner().invoke(command, [str(config), "--cluster", str(cluster), "--json"])


def sized(folder: Path, *tiers: dict[str, Any], **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(folder, *tiers, **more).stdout)
    return found


def test_the_cheapest_gpus_that_carry_the_load_are_chosen(tmp_path: Path) -> None:
    found = sized(tmp_path, LIGHT, HEAVY)
    assert found["fits"]
    light, heavy = found["tiers"]
    assert light["chosen"]["gpu"] == "L4"
    assert heavy["chosen"]["gpu"] == "H100-80G"
    assert heavy["chosen"]["quantization"] == "fp8"
    assert heavy["settings"]["engine_args"] == {"quantization": "fp8"}
    assert found["cost_per_hour"] == pytest.approx(
        light["chosen"]["gpus"] * 0.75 + heavy["chosen"]["gpus"] * 3.75
    )
    assert light["next_best"]["cost_per_hour"] >= light["chosen"]["cost_per_hour"]
    assert "requests/s" in light["why"]
    # What was chosen is a configuration.
    parse_plane({"tiers": [{**HEAVY, **heavy["settings"]}]})


def test_a_format_that_needs_another_checkpoint_is_noted(tmp_path: Path) -> None:
    awq = {**HEAVY, "expected": {**HEAVY["expected"], "quantizations": ["awq"]}}
    assert "needs a checkpoint of the model in awq" in sized(tmp_path, awq)["tiers"][0]["note"]
    assert sized(tmp_path, HEAVY)["tiers"][0]["note"] == ""  # fp8 is made while loading


def test_without_prices_all_gpus_cost_the_same(tmp_path: Path) -> None:
    types = [{key: value for key, value in kind.items() if key != "cost_per_hour"} for kind in TYPES]
    found = sized(tmp_path, LIGHT, types=types)
    assert not found["priced"]
    assert found["tiers"][0]["chosen"]["gpu"] == "H100-80G"
    some = run(tmp_path, LIGHT, types=[TYPES[0], types[1]])
    assert isinstance(some.exception, SetupError)
    assert "big have no cost_per_hour" in str(some.exception)


def test_gpus_that_are_out_of_use_are_not_counted(tmp_path: Path) -> None:
    nodes = [{"type": "big", "broken_gpus": dict.fromkeys(range(8), "XID 79")}, {"type": "small"}]
    result = run(tmp_path, HEAVY, nodes=nodes)
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert "tier 'heavy'" in found["reasons"][0]
    assert {each["gpu"] for each in found["ruled_out"]["heavy"]} == {"L4"}


def test_gpus_of_other_tiers_are_taken_into_account(tmp_path: Path) -> None:
    other = {"name": "other", "model": "Qwen/Qwen2.5-32B-Instruct", "tensor_parallel_size": 8}
    result = run(tmp_path, {**other, "engine_args": {"max-model-len": 8192}}, HEAVY)
    assert result.exit_code == 3
    assert [each["replica"] for each in json.loads(result.stdout)["without_a_place"]] == ["heavy-0"]


def test_at_least_one_tier_needs_an_expected_load(tmp_path: Path) -> None:
    result = run(tmp_path, {key: value for key, value in LIGHT.items() if key != "expected"})
    assert isinstance(result.exception, SetupError)
    assert "requests_per_s" in str(result.exception)
    with pytest.raises(ConfigError, match="'fp7' is not a weight format"):
        parse_plane({"tiers": [{**LIGHT, "expected": {**LIGHT["expected"], "quantizations": ["fp7"]}}]})


def test_output_as_text(tmp_path: Path) -> None:
    run(tmp_path, LIGHT, HEAVY)
    files = [str(tmp_path / "plane.yaml"), "--cluster", str(tmp_path / "cluster.yaml")]
    text = CliRunner().invoke(command, files, terminal_width=200).output
    assert "next best: " in text
    assert "engine_args: {quantization: fp8}" in text
    assert "ruled out: 6 options on L4" in text
