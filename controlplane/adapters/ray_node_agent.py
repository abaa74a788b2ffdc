"""The node agent as a Ray actor: one per node, pinned to it, of no CPU and no GPU of its own.

The actor outlives whoever made it (a controller that restarts finds it again by name) and goes with its
node. :func:`ensure_node_agents` makes what is missing; calling it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import structlog
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from controlplane.adapters.nvml_agent import local_agent
from controlplane.core.samples import GpuEvent, NodeSample

log = structlog.get_logger(__name__)

NAME_PREFIX = "node-agent-"


class RayNodeAgent:
    """What the actor answers; see :class:`~controlplane.node_agent.NodeAgent`."""

    def __init__(self, node_id: str, interval_s: float) -> None:
        self._agent = local_agent(node_id, interval_s=interval_s)
        self._agent.start()

    def latest(self) -> NodeSample | None:
        """The newest sample."""
        return self._agent.latest()

    def since(self, seq: int = 0, epoch: str | None = None) -> list[NodeSample]:
        """Samples after ``seq`` of ``epoch``."""
        return self._agent.since(seq, epoch)

    def events(self, since_seq: int = 0, epoch: str | None = None) -> list[GpuEvent]:
        """Events after ``since_seq`` of ``epoch``."""
        return self._agent.events(since_seq, epoch)


def ensure_node_agents(namespace: str, *, interval_s: float = 1.0) -> Mapping[str, Any]:
    """Handles of the agents of every node that is alive, by node id; makes those that are missing.

    Nodes come and go: call it with every look at the cluster. It does not wait for new agents to start.
    """
    agents: dict[str, Any] = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not node["Alive"]:
            continue
        node_id = str(node["NodeID"])
        try:
            agents[node_id] = _agent_of(node_id, namespace, interval_s)
        except (ray.exceptions.RayError, ValueError) as error:
            # a node that dies between the list and here; the next call sees it
            log.warning("no node agent", node_id=node_id, error=str(error))
    return agents


def _agent_of(node_id: str, namespace: str, interval_s: float) -> Any:
    actor = ray.remote(num_cpus=0, num_gpus=0)(RayNodeAgent)
    return actor.options(
        name=NAME_PREFIX + node_id,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        # no restarts by Ray: on a node that is gone they would wait for ever; the next call makes a new one
        max_restarts=0,
        max_concurrency=4,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(node_id, interval_s)
