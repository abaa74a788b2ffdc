"""``tierplane plan`` as a user runs it, and what it makes of tiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.adapters.tier_gangs import TierDemand, tier_demands
from controlplane.cli.plan import command
from controlplane.config import PlaneConfig
from controlplane.core.topology import Gpu, Node

CLUSTER = """
node_types:
  - {name: small, gpu: L4, gpus: 4, cpus: 48, memory_gib: 192}
  - {name: big, gpu: H100-80G, gpus: 8, nvlink_island: 8, sockets: 2, cpus: 192, memory_gib: 1024}
nodes:
  - {type: small, count: 2}
  - {type: big, name: big}
"""
CONFIG = """
applications:
  - name: tierplane
    route_prefix: /
    import_path: deployments.app:build
    args:
      tiers:
        - name: lightweight
          model: Qwen/Qwen2.5-1.5B-Instruct
          replicas: 2
          gpu_share: 0.5
          engine_args: {max-model-len: 8192, gpu-memory-utilization: 0.42}
        - name: balanced
          model: Qwen/Qwen2.5-7B-Instruct
          cpus: 4
          engine_args: {max-model-len: 16384}
        - name: capable
          model: Qwen/Qwen2.5-32B-Instruct
          tensor_parallel_size: 2
          engine_args: {max-model-len: 16384}
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    config, cluster = tmp_path / "plane.yaml", tmp_path / "cluster.yaml"
    config.write_text(CONFIG)
    cluster.write_text(CLUSTER)
    return str(config), str(cluster)


def run(files: tuple[str, str], *args: str) -> Result:
    config, cluster = files
    return CliRunner().invoke(
        command, [config, "--cluster", cluster, *args], prog_name="tierplane plan", terminal_width=200
    )


def as_json(files: tuple[str, str], *args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(files, "--json", *args).output)
    return found


def test_the_plan_for_a_described_cluster(files: tuple[str, str]) -> None:
    result = run(files)
    assert result.exit_code == 0, result.output
    found = as_json(files)
    where = {item["replica"]: item for item in found["placements"]}
    assert where["capable-0"]["nodes"] == ["big"]
    assert where["capable-0"]["distance"] == "island"
    assert where["capable-0"]["visible_devices"] == "big/gpu0,big/gpu1"
    # A 7 B model fits an L4: the H100s are left to who needs them.
    assert where["balanced-0"]["nodes"][0].startswith("small-")
    assert "CUDA_VISIBLE_DEVICES=big/gpu0,big/gpu1" in result.output
    tiers = {item["tier"]: item for item in found["tiers"]}
    assert tiers["lightweight"]["serve_options"]["ray_actor_options"]["num_gpus"] == 0.5
    assert tiers["capable"]["serve_options"]["placement_group_strategy"] == "STRICT_PACK"
    assert tiers["capable"]["serve_options"]["placement_group_bundles"] == [{"CPU": 0.0, "GPU": 2}]
    assert tiers["capable"]["serve_options"]["ray_actor_options"]["label_selector"] == {
        "ray.io/accelerator-type": "in(H100)"
    }
    assert tiers["balanced"]["gpu_bytes"] > 15 * 2**30
    assert [item["gpu"] for item in tiers["capable"]["unfit"]] == ["L4"]
    assert "What would" in tiers["capable"]["unfit"][0]["why"]


def test_losing_the_node_that_a_tier_needs(files: tuple[str, str]) -> None:
    result = run(files, "--what-if", "lose-node big")
    assert result.exit_code == 3
    assert "lost: capable-0" in result.output
    assert "capable: does not fit L4" in result.output
    found = as_json(files, "--what-if", "lose-node big")
    assert found["complete"] is False
    assert found["change"]["lost"] == ["capable-0"]
    assert found["infeasible"][0]["nodes"]["small-0"]["reason"] == (
        "small-0: needs 2 GPUs of an accepted model, has 0"
    )
    assert sorted(found["change"]["kept"]) == ["balanced-0", "lightweight-0", "lightweight-1"]


def test_changes_are_made_one_after_the_other(files: tuple[str, str]) -> None:
    found = as_json(files, "--what-if", "scale capable 5")
    assert found["complete"] is False
    assert [item["replica"] for item in found["infeasible"]] == ["capable-4"]
    assert found["infeasible"][0]["nodes"]["big"]["cause"] == "gpu_busy"
    assert found["infeasible"][0]["nodes"]["small-0"]["cause"] == "no_such_gpu"
    more = as_json(files, "--what-if", "scale capable 5", "--what-if", "add-node big")
    assert more["complete"] is True
    assert more["change"]["added"] == [f"capable-{i}" for i in range(1, 5)]
    text = run(files, "--what-if", "scale capable 5").output
    assert "capable-4 has no place" in text
    assert "big: needs 2 free GPUs, has 0" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lose-node nowhere", "no node 'nowhere'; there is small-0, small-1, big"),
        ("add-node huge", "no node type 'huge'; there is small, big"),
        ("scale middle 3", "no tier 'middle'; there is lightweight"),
        ("explode", "--what-if takes"),
    ],
)
def test_wrong_changes(files: tuple[str, str], change: str, message: str) -> None:
    result = run(files, "--what-if", change)
    assert result.exit_code == 2
    assert message in result.output


def test_without_a_cluster(files: tuple[str, str]) -> None:
    result = CliRunner().invoke(command, [files[0]])
    assert result.exit_code == 1
    assert "describe one with --cluster" in str(result.exception)


def demands(*tiers: dict[str, Any], model: str = "H100-80G", gib: int = 79) -> dict[str, TierDemand]:
    plane = PlaneConfig.model_validate({"tiers": list(tiers)})
    node = Node("n", (Gpu("n/0", 0, model, gib * 2**30),), 8000, 2**34)
    return {demand.tier.name: demand for demand in tier_demands(plane, [node])}


def test_tiers_that_take_no_gpu() -> None:
    found = demands(
        {"name": "cloud", "engine": "endpoint", "url": "http://elsewhere", "model": "m"},
        {"name": "cpu", "device": "cpu", "model": "m", "cpus": 2.5},
    )
    assert found["cloud"].gangs() == ()
    assert found["cloud"].notes == ("runs elsewhere: http://elsewhere",)
    shape = found["cpu"].shape
    assert shape is not None
    assert (shape.gpus, shape.cpu_milli) == (0, 2500)
    assert len(found["cpu"].scaled(3).gangs()) == 3


def test_a_share_is_no_less_than_the_memory_the_engine_takes() -> None:
    tier = {"name": "t", "model": "Qwen/Qwen2.5-1.5B-Instruct", "gpu_share": 0.5}
    greedy = demands(tier)["t"]
    assert greedy.shape is not None
    assert greedy.shape.milli_gpu > 800
    assert "set gpu-memory-utilization to less than 0.5" in greedy.notes[0]
    modest = demands({**tier, "engine_args": {"gpu-memory-utilization": 0.45, "max-model-len": 4096}})["t"]
    assert modest.shape is not None
    assert (modest.shape.milli_gpu, modest.notes) == (500, ())


def test_what_is_not_known_is_said() -> None:
    unknown = demands({"name": "t", "model": "nobody/knows-this"})["t"]
    assert unknown.shape is not None
    assert unknown.notes[0].startswith("memory is not checked: ")
    other_gpu = demands({"name": "t", "model": "Qwen/Qwen2.5-1.5B-Instruct"}, model="Homemade")["t"]
    assert other_gpu.shape is not None
    assert "GPUs that are not in the table: Homemade" in other_gpu.notes[0]
    too_small = demands({"name": "t", "model": "Qwen/Qwen2.5-32B-Instruct"}, model="L4")["t"]
    assert too_small.unfit[0][0] == "L4"
    assert too_small.shape is not None
    assert "H200-141G" in too_small.shape.models
    assert "L4" not in too_small.shape.models
    giant = {"name": "t", "model": "Qwen/Qwen2.5-32B-Instruct", "engine_args": {"max-model-len": 10**9}}
    assert demands(giant)["t"].shape is None
