"""The node agent as a Ray actor: one per node, pinned to it, of no CPU and no GPU of its own.

The actor outlives whoever made it (a controller that restarts finds it again by name) and goes with its
node. :func:`ensure_node_agents` makes what is missing; calling it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ray
import ray.util
import structlog
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from controlplane.core.telemetry.node_updates import NO_INFOS, NodeUpdate
from controlplane.core.telemetry.samples import GpuEvent, NodeSample
from controlplane.node_agent.local import local_agent

log = structlog.get_logger(__name__)

NAME_PREFIX = "node-agent-"


class RayNodeAgent:
    """What the actor answers; see :class:`~controlplane.node_agent.agent.NodeAgent`."""

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

    def news(self, epoch: str, event_seq: int, infos: tuple[str, int] = NO_INFOS) -> NodeUpdate:
        """See :meth:`NodeAgent.news`."""
        return self._agent.news(epoch, event_seq, infos)


def alive_nodes() -> dict[str, int]:
    """The nodes that Ray has, by id, with the whole GPUs that it counts there. Blocks."""
    return {
        str(node["NodeID"]): int(node["Resources"].get("GPU", 0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }


def ensure_node_agents(
    namespace: str,
    *,
    interval_s: float = 1.0,
    known: Mapping[str, Any] | None = None,
    nodes: Collection[str] | None = None,
) -> dict[str, Any]:
    """Handles of the agents of every node that is alive, by node id; makes those that are missing.

    Nodes come and go: call it with every look at the cluster. It does not wait for new agents to start.
    ``known`` are handles from the last look, of nodes that are not asked for again; ``nodes`` are those
    that are alive, if the caller knows. Blocks.
    """
    agents: dict[str, Any] = {}
    for node_id in alive_nodes() if nodes is None else nodes:
        if known and node_id in known:
            agents[node_id] = known[node_id]
            continue
        try:
            agents[node_id] = _agent_of(node_id, namespace, interval_s)
        except (ray.exceptions.RayError, ValueError) as error:
            # a node that dies between the list and here; the next call sees it
            log.warning("no node agent", node_id=node_id, error=str(error))
    return agents


def stop_node_agents(namespace: str) -> int:
    """End all agents of the namespace; how many there were. Blocks."""
    stopped = 0
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace and actor["name"].startswith(NAME_PREFIX):
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=namespace))
                stopped += 1
            except ValueError:
                continue  # it has just ended
    return stopped


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
