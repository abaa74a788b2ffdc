"""``tierplane plan`` as a user runs it, and what it makes of tiers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.cli.planning import plan as plan_module
from controlplane.cli.planning.plan import command
from controlplane.cli.planning.plan_view import serve_options
from controlplane.config import PlaneConfig
from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.occupancy import ReservedResources, RunningReplica
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.topology import Gpu, Node
from controlplane.planning.live_cluster import LiveCluster
from controlplane.planning.tier_gangs import TierGang, tier_gangs

CLUSTER = """
node_types:
  - {name: small, gpu: L4, gpus: 4, cpus: 48, memory_gib: 192}
  - {name: big, gpu: H100-80G, gpus: 8, nvlink_island: 8, sockets: 2, cpus: 192, memory_gib: 1024}
nodes:
  - {type: small, count: 2}
  - {type: big, name: big}
"""
APPLICATION = """
applications:
  - name: tierplane
    route_prefix: /
    import_path: deployments.app:build
    args:
"""
CONFIG = f"""{APPLICATION}
      tiers:
        - name: lightweight
          model: Qwen/Qwen2.5-1.5B-Instruct
          replicas: 2
          gpu_share: 0.5
          engine_args: {{max-model-len: 8192, gpu-memory-utilization: 0.42}}
        - name: balanced
          model: Qwen/Qwen2.5-7B-Instruct
          cpus: 4
          engine_args: {{max-model-len: 16384}}
        - name: capable
          model: Qwen/Qwen2.5-32B-Instruct
          tensor_parallel_size: 2
          engine_args: {{max-model-len: 16384}}
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
    assert where["capable-0"]["visible_devices"] == {"big": "0,1"}
    # A 7 B model fits an L4: the H100s are left to who needs them.
    assert where["balanced-0"]["nodes"][0].startswith("small-")
    assert "capable-0 on big: CUDA_VISIBLE_DEVICES=0,1" in result.output
    tiers = {item["tier"]: item for item in found["tiers"]}
    assert tiers["lightweight"]["serve_options"]["ray_actor_options"]["num_gpus"] == 0.5
    assert tiers["capable"]["serve_options"]["ray_actor_options"] == {"num_cpus": 0.0, "num_gpus": 2.0}
    assert tiers["capable"]["notes"] == [
        "set gpu_models to [H100-80G] in the tier, so that Ray puts it on no others"
    ]
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


def test_changes_are_applied_one_after_another(files: tuple[str, str]) -> None:
    found = as_json(files, "--what-if", "scale capable 5")
    assert found["complete"] is False
    assert [item["replica"] for item in found["infeasible"]] == ["capable-4"]
    assert found["infeasible"][0]["nodes"]["big"]["cause"] == "gpu_busy"
    assert found["infeasible"][0]["nodes"]["small-0"]["cause"] == "no_such_gpu"
    more = as_json(files, "--what-if", "scale capable 5", "--what-if", "add-node big")
    assert more["complete"] is True
    assert more["change"]["added"] == [f"capable-{i}" for i in range(1, 5)]
    text = run(files, "--what-if", "scale capable 5").output
    assert "capable-4 can't be placed" in text
    assert "big: needs 2 free GPUs, has 0" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lose-node nowhere", "there is no node 'nowhere'; known: small-0, small-1, big"),
        ("add-node huge", "there is no node type 'huge'; known: small, big"),
        ("scale middle 3", "there is no tier 'middle'; known: lightweight"),
        ("explode", "--what-if takes"),
    ],
)
def test_wrong_changes(files: tuple[str, str], change: str, message: str) -> None:
    result = run(files, "--what-if", change)
    assert result.exit_code == 2
    assert message in result.output


def test_ray_is_imported_only_once_its_token_is_known() -> None:
    script = "import sys, controlplane.cli.planning.plan; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_a_cluster(files: tuple[str, str]) -> None:
    result = CliRunner().invoke(command, [files[0]])
    assert result.exit_code == 1
    assert "describe one with --cluster" in str(result.exception)


WIDE = f"""{APPLICATION}
      tiers:
        - name: wide
          model: Qwen/Qwen2.5-72B-Instruct
          tensor_parallel_size: 2
          pipeline_parallel_size: 2
          pipeline_across_nodes: ASKED
          engine_args: {{max-model-len: 16384}}
"""
PAIRS = """
node_types:
  - {name: pair, gpu: H100-80G, gpus: 2, nvlink_island: 2, cpus: 48, memory_gib: 512}
nodes:
  - {type: pair, count: 2}
"""


def test_a_pipeline_spans_several_nodes_only_if_configured(tmp_path: Path) -> None:
    config, cluster = tmp_path / "plane.yaml", tmp_path / "cluster.yaml"
    cluster.write_text(PAIRS)
    config.write_text(WIDE.replace("ASKED", "false"))
    refused = run((str(config), str(cluster)))
    assert refused.exit_code == 3
    assert "pair-0: needs 4 GPUs of an accepted model, has 2" in refused.output
    config.write_text(WIDE.replace("ASKED", "true"))
    text = run((str(config), str(cluster)))
    assert text.exit_code == 0, text.output
    assert "vLLM's Ray executor chooses the GPUs" in text.output
    found = as_json((str(config), str(cluster)))
    (placement,) = found["placements"]
    assert placement["nodes"] == ["pair-0", "pair-1"]
    assert placement["visible_devices"] == {"pair-0": "0,1", "pair-1": "0,1"}
    assert found["tiers"][0]["serve_options"] == {
        "num_replicas": 1,
        # The replica itself holds no GPU, but its node has to have some.
        "ray_actor_options": {
            "num_cpus": 0.0,
            "num_gpus": 0.0,
            "label_selector": {"ray.io/accelerator-type": "in(H100)"},
        },
        "engine_placement_group": {"bundles": [{"GPU": 1}] * 4, "strategy": "PACK"},
    }


def live(*replicas: RunningReplica, **reserved: ReservedResources) -> LiveCluster:
    gpus = tuple(Gpu(f"GPU-{i}", i, "H100-80G", 79 * 2**30) for i in range(4))
    return LiveCluster((Node("n", gpus, 64_000, 2**38),), replicas, reserved, ("from the test",))


def plan_live(
    monkeypatch: pytest.MonkeyPatch, config: str, cluster: LiveCluster, *args: str
) -> dict[str, Any]:
    monkeypatch.setattr(plan_module, "_live", lambda *_: cluster)
    result = CliRunner().invoke(command, [config, "--json", *args])
    assert result.exit_code in (0, 3), result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_on_a_running_cluster_replicas_stay_and_resources_of_others_are_left_alone(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = live(
        RunningReplica("capable-x", "capable", "n", ("GPU-1", "GPU-2")),
        RunningReplica("lightweight-y", "lightweight", "n", ("GPU-0",)),
        n=ReservedResources(gpu_milli=2500),
    )
    found = plan_live(monkeypatch, files[0], cluster)
    assert found["complete"]
    assert found["change"] == {
        "kept": ["lightweight-0", "capable-0"],
        "moved": [],
        "added": ["lightweight-1", "balanced-0"],
        "removed": [],
        "lost": [],
    }
    where = {item["replica"]: item for item in found["placements"]}
    assert where["capable-0"]["endpoint"] == "capable-x"
    assert where["capable-0"]["visible_devices"] == {"n": "1,2"}
    assert where["lightweight-1"]["visible_devices"] == {"n": "0"}
    assert where["balanced-0"]["visible_devices"] == {"n": "3"}
    assert found["notes"] == ["from the test"]
    # Somebody else's GPU: nothing is left for balanced.
    taken = plan_live(monkeypatch, files[0], live(*cluster.replicas, n=ReservedResources(gpu_milli=3500)))
    assert [item["replica"] for item in taken["infeasible"]] == ["balanced-0"]
    assert taken["notes"][1:] == ["other programs use 1 GPUs of n; which ones is an assumption"]
    # What if: from what is planned now.
    more = plan_live(monkeypatch, files[0], cluster, "--what-if", "scale lightweight 1")
    assert more["change"]["removed"] == ["lightweight-1"]
    text = CliRunner().invoke(command, [files[0]], terminal_width=200).output
    assert "runs there (capable-x)" in text


def demands(*tiers: dict[str, Any], model: str = "H100-80G", gib: int = 79) -> dict[str, TierGang]:
    plane = PlaneConfig.model_validate({"tiers": list(tiers)})
    node = Node("n", (Gpu("n/0", 0, model, gib * 2**30),), 8000, 2**34)
    return {demand.tier.name: demand for demand in tier_gangs(plane, [node])}


def test_tiers_that_use_no_gpu() -> None:
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


def test_engines_on_the_cpu_take_memory() -> None:
    tier = {"name": "t", "device": "cpu", "model": "bundled:smollm2-135m", "replicas": 4}
    (demand,) = tier_gangs(PlaneConfig.model_validate({"tiers": [tier]}), [Node("n", (), 8000, 16 * 2**30)])
    assert demand.shape is not None
    assert 3.5 < demand.shape.memory_bytes / 2**30 < 4
    placed = plan(PlacedCluster((Node("n", (), 8000, 13 * 2**30),)), demand.gangs())
    assert len(placed.placements) == 3
    assert "GiB of memory, has 1." in str(placed.infeasible[0].refusals[0])
    large = demands({**tier, "model": "Qwen/Qwen2.5-7B-Instruct"})["t"]
    assert large.unfit[0][0] == "the largest node's memory"
    assert large.shape is not None
    odd = demands({**tier, "tensor_parallel_size": 2})["t"]
    assert odd.shape is None
    assert "tensor_parallel_size 2 → 1" in odd.unfit[0][1]
    cache = demands({**tier, "env": {"VLLM_CPU_KVCACHE_SPACE": "1.5"}})["t"]
    assert "whole number" in cache.unfit[0][1]


def test_only_the_gpu_models_of_the_tier_are_used() -> None:
    tier = {"name": "t", "model": "Qwen/Qwen2.5-1.5B-Instruct", "gpu_models": ["l4"]}
    found = demands(tier, model="H100-80G")["t"]
    assert found.shape is not None
    assert found.shape.models == {"L4"}
    assert found.unfit == ()
    options = serve_options(found, [])
    assert options["ray_actor_options"]["label_selector"] == {"ray.io/accelerator-type": "in(L4)"}


def test_a_gpu_share_has_at_least_the_memory_that_the_engine_takes() -> None:
    tier = {"name": "t", "model": "Qwen/Qwen2.5-1.5B-Instruct", "gpu_share": 0.5}
    greedy = demands(tier)["t"]
    assert greedy.shape is not None
    assert greedy.shape.milli_gpu > 800
    assert "set gpu-memory-utilization to less than 0.5" in greedy.notes[0]
    modest = demands({**tier, "engine_args": {"gpu-memory-utilization": 0.45, "max-model-len": 4096}})["t"]
    assert modest.shape is not None
    assert (modest.shape.milli_gpu, modest.notes) == (500, ())


def test_unknown_values_are_reported() -> None:
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
