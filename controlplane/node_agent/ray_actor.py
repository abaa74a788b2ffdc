"""The node agent as a Ray actor: one per node, pinned to it, with no CPU or GPU reserved.

The actor outlives the process that created it (a restarted controller finds it again by name) and lives as
long as its node. :func:`ensure_node_agents` creates the missing ones; calling it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ray
import ray.util
import structlog
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from controlplane.core.telemetry.node_updates import NodeUpdate
from controlplane.core.telemetry.samples import NodeSample
from controlplane.node_agent.local import local_agent

log = structlog.get_logger(__name__)

NAME_PREFIX = "node-agent-"


class RayNodeAgent:
    """The actor's methods; see :class:`~controlplane.node_agent.agent.NodeAgent`."""

    def __init__(self, node_id: str, interval_s: float) -> None:
        self._agent = local_agent(node_id, interval_s=interval_s)
        self._agent.start()

    def latest(self) -> NodeSample | None:
        """See :meth:`NodeAgent.latest`."""
        return self._agent.latest()

    def update(self, epoch: str, event_seq: int, cached: tuple[str, int]) -> NodeUpdate:
        """See :meth:`NodeAgent.update`."""
        return self._agent.update(epoch, event_seq, cached)


def alive_nodes() -> dict[str, int]:
    """Node id → number of GPUs, of Ray's living nodes. Blocks."""
    return {
        str(node["NodeID"]): int(node["Resources"].get("GPU", 0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }


def living_replicas(witness: str) -> frozenset[str] | None:
    """The unique ids of the Serve replicas whose processes live: the last part of their actors' names. None
    if Ray's list is not complete, which it is only with the actor named ``witness`` in it. Blocks."""
    if not ray.is_initialized():
        return None  # A call would start a cluster.
    names = {str(actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)}
    if witness not in names:
        return None
    return frozenset(name.rpartition("#")[2] for name in names if "#" in name)


def ensure_node_agents(
    namespace: str,
    *,
    interval_s: float,
    known: Mapping[str, Any],
    nodes: Collection[str],
) -> dict[str, Any]:
    """Handles of the agents of ``nodes``, by node id; creates the missing ones.

    Call it again whenever nodes come or go. It does not wait for new agents to start. ``known`` are handles
    from the previous call, reused without asking Ray. Blocks.
    """
    agents: dict[str, Any] = {}
    for node_id in nodes:
        if node_id in known:
            agents[node_id] = known[node_id]
            continue
        try:
            agents[node_id] = _agent_of(node_id, namespace, interval_s)
        except (ray.exceptions.RayError, ValueError) as error:
            # The node may have died since the list was made; the next call will not list it.
            log.warning("no node agent", node_id=node_id, error=str(error))
    return agents


def stop_node_agents(namespace: str) -> None:
    """Kills all agents of the namespace. Blocks."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace and actor["name"].startswith(NAME_PREFIX):
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=namespace))
            except ValueError:
                continue  # It has just exited.


def _agent_of(node_id: str, namespace: str, interval_s: float) -> Any:
    actor = ray.remote(num_cpus=0, num_gpus=0)(RayNodeAgent)
    return actor.options(
        name=NAME_PREFIX + node_id,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        # Ray would keep trying to restart it on a node that is gone; the next call creates a new one.
        max_restarts=0,
        max_concurrency=4,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(node_id, interval_s)
