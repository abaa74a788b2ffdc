"""The cluster that runs, as the placement sees it: Ray's nodes, with GPUs from Ray or from node agents."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

SCRIPT = """
import json, time
import ray
from ray.cluster_utils import Cluster
from controlplane.adapters.live_cluster import live_nodes
from controlplane.adapters.ray_node_agent import ensure_node_agents
from controlplane.core.gangs import Gang, Shape
from controlplane.core.placement import ClusterState
from controlplane.core.planning import plan

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=4, num_gpus=8, resources={"accelerator_type:H100": 1})
gone = cluster.add_node(num_cpus=1, num_gpus=1)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
cluster.remove_node(gone)
while len([n for n in ray.nodes() if n["Alive"]]) > 2:
    time.sleep(0.05)
nodes = sorted(live_nodes("telemetry"), key=lambda node: len(node.gpus))
answer = {
    "gpus": [len(node.gpus) for node in nodes],
    "cpus": [node.cpu_milli for node in nodes],
    "memory": [node.memory_bytes > 0 for node in nodes],
    "placed": len(plan(ClusterState(tuple(nodes)), [Gang("g", Shape(gpus=8, cpu_milli=4000))]).placements),
}
agents = ensure_node_agents("telemetry", interval_s=0.1)
while not all(ray.get(agent.latest.remote()) for agent in agents.values()):
    time.sleep(0.05)
answer["with_agents"] = sorted(len(node.gpus) for node in live_nodes("telemetry"))
print("ANSWER", json.dumps(answer))
ray.shutdown()
cluster.shutdown()
"""


def test_nodes_of_a_running_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[-1].removeprefix("ANSWER ")) == {
        "gpus": [0, 8],
        "cpus": [2000, 4000],
        "memory": [True, True],
        "placed": 1,
        # No driver on this machine: the agents see no GPU, Ray's count stands.
        "with_agents": [0, 8],
    }
