"""The cluster that runs, as the placement sees it: Ray's nodes, with GPUs from Ray or from node agents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

SCRIPT = """
import json
import ray
from ray.cluster_utils import Cluster
from controlplane.planning.live_cluster import live_cluster
from controlplane.node_agent.ray_actor import alive_nodes, ensure_node_agents
from controlplane.config import PlaneConfig
from controlplane.core.placement.gangs import Gang, GangShape
from controlplane.core.placement.occupancy import occupancy
from controlplane.core.placement.what_if import change
from tests.support.waiting import until

config = PlaneConfig.model_validate(
    {"tiers": [{"name": "t", "engine": "simulated"}], "controller": {"namespace": "telemetry"}}
)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=4, num_gpus=8, resources={"accelerator_type:H100": 1})
gone = cluster.add_node(num_cpus=1, num_gpus=1)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
cluster.remove_node(gone)
until(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 2, 60)

@ray.remote(num_gpus=3, num_cpus=3)
class Somebody:
    def there(self):
        return True

def look():
    live = live_cluster(config)
    return live, sorted(live.nodes, key=lambda node: len(node.gpus))

def placed(live, gpus):
    gangs = [Gang("g", GangShape(gpus=gpus))]
    now = occupancy(live.nodes, gangs, live.replicas, live.reserved, replica_cpu_milli={})
    return len(change(now.state, now.running, gangs).plan.placements), sorted(now.notes)

live, nodes = look()
answer = {
    "gpus": [len(node.gpus) for node in nodes],
    "model": nodes[1].gpus[0].model,
    "cpus": [node.cpu_milli for node in nodes],
    "memory": [node.memory_bytes > 0 for node in nodes],
    "notes": live.notes,
    "free": placed(live, 8),
}
somebody = Somebody.remote()
ray.get(somebody.there.remote())
until(lambda: not placed(look()[0], 8)[0], 60)  # Ray's tables follow in their own time
live, nodes = look()
answer["beside somebody"] = placed(live, 5), placed(live, 6)[0]
agents = ensure_node_agents("telemetry", interval_s=0.1, known={}, nodes=alive_nodes())
until(lambda: all(ray.get(agent.latest.remote()) for agent in agents.values()), 60)
answer["with agents"] = [len(node.gpus) for node in look()[1]]
print("ANSWER", json.dumps(answer).replace(nodes[1].node_id, "NODE"))
ray.shutdown()
cluster.shutdown()
"""


def test_nodes_of_a_running_ray(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        # A folder of its own: Ray keeps there which cluster runs on this machine, and joins it.
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(run_dir)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[-1].removeprefix("ANSWER ")) == {
        "gpus": [0, 8],
        "model": "H100-80G",
        "cpus": [2000, 4000],
        "memory": [True, True],
        "notes": ["no plane responds in namespace telemetry: its replicas are not counted"],
        "free": [1, []],
        "beside somebody": [
            [
                1,
                [
                    "other programs use 3 CPUs of NODE",
                    "other programs use 3 GPUs of NODE; which ones is an assumption",
                ],
            ],
            0,
        ],
        # No driver on this machine: the agents see no GPU, Ray's count stands.
        "with agents": [0, 8],
    }
