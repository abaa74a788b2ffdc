"""Ray on top of the scripted driver: its own GPU detection, and node agents as actors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nvml_driver.driver import FakeDriver

pytestmark = pytest.mark.ray

DETECTION = """
import json, ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
[node] = ray.nodes()
print("ANSWER", json.dumps({"resources": node["Resources"], "labels": node["Labels"]}))
ray.shutdown()
"""

AGENTS = """
import json
import ray
from ray.cluster_utils import Cluster
from controlplane.node_agent.ray_actor import alive_nodes, ensure_node_agents
from tests.support.waiting import until

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
answer = {}

def latest(agents):
    return {node: ray.get(agent.latest.remote(), timeout=60) for node, agent in agents.items()}

def node_agents():
    return ensure_node_agents("telemetry", interval_s=0.1, known={}, nodes=alive_nodes())

agents = node_agents()
until(lambda: all(latest(agents).values()), 60)
first = latest(agents)
answer["nodes"] = sorted(agents) == sorted(node["NodeID"] for node in ray.nodes())
answer["own_samples"] = all(sample.node_id == node for node, sample in first.items())
answer["gpus"] = [len(sample.gpus) for sample in first.values()]
again = latest(node_agents())
answer["same_agents"] = all(again[node].epoch == first[node].epoch for node in first)

ray.kill(agents[second.node_id])
def replaced():
    try:
        sample = latest(node_agents())[second.node_id]
    except ray.exceptions.RayActorError:
        return False
    return sample is not None and sample.epoch != first[second.node_id].epoch
until(replaced, 60)

cluster.remove_node(second)
until(lambda: len(node_agents()) == 1, 60)
print("ANSWER", json.dumps(answer))
ray.shutdown()
cluster.shutdown()
"""


def run(script: str, driver: FakeDriver, temp_dir: Path) -> dict[str, object]:
    """The script's answer. ``temp_dir`` is its Ray's alone: there it keeps which cluster runs here, and joins
    that one."""
    env = {
        **os.environ,
        **driver.env(),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": str(temp_dir),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    answer: dict[str, object] = json.loads(line.removeprefix("ANSWER "))
    return answer


def test_ray_itself_sees_the_devices(tmp_path: Path, run_dir: Path) -> None:
    answer = run(DETECTION, FakeDriver(tmp_path, devices=8), run_dir)
    resources = answer["resources"]
    assert isinstance(resources, dict)
    assert resources["GPU"] == 8
    assert resources["accelerator_type:H100"] == 1


def test_one_agent_per_node_made_once_and_made_again(tmp_path: Path, run_dir: Path) -> None:
    answer = run(AGENTS, FakeDriver(tmp_path, devices=8), run_dir)
    assert answer == {"nodes": True, "own_samples": True, "gpus": [8, 8], "same_agents": True}
