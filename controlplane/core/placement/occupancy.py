"""What runs on a cluster, as placements, so that a plan can start from the real cluster, not an empty one.

Two sources are combined: the controller knows the replicas and maybe their GPUs, and Ray knows how much of
each node is reserved in total. What Ray has reserved beyond tierplane's replicas belongs to other programs.
If it is unknown which GPUs are used, those that the placement planner would choose are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from controlplane.core.placement.gangs import (
    WHOLE_MILLI,
    Gang,
    GangShape,
    GangStage,
    Placement,
    PlacementPlan,
)
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.topology import Node, spread_of


@dataclass(frozen=True, slots=True)
class RunningReplica:
    """One replica that runs, starts or drains, and so occupies its GPUs."""

    endpoint_id: str
    tier: str
    node_id: str
    gpu_uuids: tuple[str, ...] = ()
    """In the order of the ranks; empty if unknown."""
    gpus_by_node: tuple[tuple[str, int], ...] = ()
    """(node, number of GPUs) if the engine reserved its GPUs itself, possibly on several nodes; else
    empty."""
    leaving: bool = False
    """Whether it is draining, so that its GPUs will soon be free."""


@dataclass(frozen=True, slots=True)
class ReservedResources:
    """What all programs together use on a node: GPUs and CPUs as Ray counts them, memory as the machine
    reports it."""

    gpu_milli: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Occupancy:
    """A cluster and what runs on it."""

    state: PlacedCluster
    """The nodes, without the CPUs and memory that other programs use; the GPUs that other programs use are
    placements."""
    running: PlacementPlan
    """tierplane's replicas, each under the id of a configured gang of its tier, or under its own id if there
    are more replicas than gangs."""
    replica_of: Mapping[str, str]
    """Gang id → endpoint id, for each running gang."""
    notes: tuple[str, ...] = ()


def occupancy(
    nodes: Sequence[Node],
    gangs: Sequence[Gang],
    replicas: Sequence[RunningReplica],
    reserved: Mapping[str, ReservedResources],
    *,
    replica_cpu_milli: Mapping[str, int],
) -> Occupancy:
    """What runs on ``nodes``: replicas of the tiers, matched with ``gangs`` (the configured ones), and other
    programs.

    ``reserved`` is by node; ``replica_cpu_milli`` (by tier) is what Ray has reserved for one replica.
    Replicas on nodes that don't exist are left out.
    """
    by_id = {node.node_id: node for node in nodes}
    here = [replica for replica in replicas if replica.node_id in by_id]
    matched = _matched(here, gangs)
    running: list[Placement] = []
    assumed: list[tuple[RunningReplica, Gang]] = []
    for replica, gang in matched:
        placement = _exact(replica, gang, by_id[replica.node_id])
        if placement is not None:
            running.append(placement)
        else:
            assumed.append((replica, gang))
    notes: list[str] = []
    for replica, gang in assumed:
        if replica.gpus_by_node:
            found = _on_several(gang, replica.gpus_by_node, by_id, running)
        else:
            found = _anywhere(gang, by_id[replica.node_id], running)
        if found is None:
            notes.append(f"{replica.endpoint_id} runs on {replica.node_id}, where its size does not fit")
        else:
            running.append(replace(found, stays=True))
            where = ", ".join(found.node_ids)
            notes.append(f"the GPUs of {replica.endpoint_id} on {where} are an assumption")
    others: list[Placement] = []
    left: list[Node] = []
    for node in nodes:
        total = reserved.get(node.node_id, ReservedResources())
        ours_gpu = sum(_milli_on(placement, node.node_id) for placement in running)
        ours_cpu = sum(replica_cpu_milli.get(r.tier, 0) for r in here if r.node_id == node.node_id)
        foreign = _foreign(node, total.gpu_milli - ours_gpu, [*running, *others])
        if foreign:
            taken = sum(placement.gang.shape.total_milli for placement in foreign) / WHOLE_MILLI
            notes.append(f"other programs use {taken:g} GPUs of {node.node_id}; which ones is an assumption")
        others += foreign
        cpu_milli = max(0, total.cpu_milli - ours_cpu)
        if cpu_milli:
            notes.append(f"other programs use {cpu_milli / 1000:g} CPUs of {node.node_id}")
        memory_bytes = max(0, total.memory_bytes - sum(_bytes_on(p, node.node_id) for p in running))
        left.append(
            replace(
                node,
                cpu_milli=max(0, node.cpu_milli - cpu_milli),
                memory_bytes=max(0, node.memory_bytes - memory_bytes),
            )
        )
    return Occupancy(
        PlacedCluster(tuple(left), tuple(others)),
        PlacementPlan(tuple(running)),
        {gang.gang_id: replica.endpoint_id for replica, gang in matched},
        tuple(notes),
    )


def _matched(replicas: Sequence[RunningReplica], gangs: Sequence[Gang]) -> list[tuple[RunningReplica, Gang]]:
    """Each replica with a configured gang of its tier; draining and surplus replicas with their own gang."""
    free: dict[str, list[Gang]] = {}
    for gang in gangs:
        free.setdefault(gang.tier, []).append(gang)
    shapes = {gang.tier: gang.shape for gang in gangs}
    found = []
    for replica in sorted(replicas, key=lambda each: (each.leaving, each.tier, each.endpoint_id)):
        wanted = free.get(replica.tier, [])
        if wanted and not replica.leaving:
            found.append((replica, wanted.pop(0)))
        else:
            shape = shapes.get(replica.tier, GangShape(gpus=len(replica.gpu_uuids)))
            found.append((replica, Gang(replica.endpoint_id, shape, replica.tier)))
    return found


def _exact(replica: RunningReplica, gang: Gang, node: Node) -> Placement | None:
    """The placement of a replica whose GPUs are known; None if they are unknown."""
    shape = gang.shape
    if not shape.gpus:
        return Placement(gang, (GangStage(node.node_id),) * shape.stages, stays=True)
    uuids = replica.gpu_uuids
    if not uuids or not set(uuids) <= {gpu.uuid for gpu in node.gpus}:
        return None
    if len(uuids) != shape.total_gpus:
        # It was started with another size and will be replaced by a replica of the new size.
        gang = replace(gang, shape=GangShape(gpus=len(uuids)))
        return Placement(gang, (GangStage(node.node_id, uuids),), spread_of(node, uuids), stays=True)
    size = shape.gpus
    parts = [uuids[i * size : (i + 1) * size] for i in range(shape.stages)]
    return Placement(
        gang,
        tuple(GangStage(node.node_id, part) for part in parts),
        max(spread_of(node, part) for part in parts),
        stays=True,
    )


def _anywhere(gang: Gang, node: Node, running: Sequence[Placement]) -> Placement | None:
    """A placement of a gang that runs on that node, even if the node or its GPUs are out of use."""
    open_node = replace(node, unavailable="", gpus=tuple(replace(gpu, unavailable="") for gpu in node.gpus))
    shape = replace(gang.shape, cpu_milli=0, memory_bytes=0, across_nodes=False, models=frozenset())
    found = Planner(PlacedCluster((open_node,), tuple(running))).place(replace(gang, shape=shape))
    return replace(found, gang=gang) if isinstance(found, Placement) else None


def _on_several(
    gang: Gang,
    gpus_by_node: Sequence[tuple[str, int]],
    nodes: Mapping[str, Node],
    running: Sequence[Placement],
) -> Placement | None:
    """A placement on the given number of GPUs of each node, with stages in the order of the ranks."""
    ranks: list[tuple[str, str]] = []
    for node_id, gpus in gpus_by_node:
        part = Gang(gang.gang_id, GangShape(gpus=gpus))
        found = _anywhere(part, nodes[node_id], running) if node_id in nodes else None
        if found is None:
            return None
        ranks += [(node_id, uuid) for uuid in found.gpu_uuids]
    size = gang.shape.gpus
    parts = [ranks[i : i + size] for i in range(0, len(ranks), size)]
    stages = tuple(GangStage(part[0][0], tuple(uuid for _, uuid in part)) for part in parts)
    return Placement(gang, stages) if len(ranks) == gang.shape.total_gpus else None


def _foreign(node: Node, gpu_milli: int, running: Sequence[Placement]) -> list[Placement]:
    """Placements for the GPU capacity that other programs use: whole GPUs, then a share."""
    found: list[Placement] = []
    whole, share = divmod(max(0, gpu_milli), WHOLE_MILLI)
    for number, milli in enumerate([WHOLE_MILLI] * whole + [share] * bool(share)):
        gang = Gang(f"others on {node.node_id}/{number}", GangShape(milli_gpu=milli))
        placement = _anywhere(gang, node, [*running, *found])
        if placement is not None:
            found.append(placement)
    return found


def _milli_on(placement: Placement, node_id: str) -> int:
    shape = placement.gang.shape
    return sum(
        shape.milli_gpu * len(stage.gpu_uuids) for stage in placement.stages if stage.node_id == node_id
    )


def _bytes_on(placement: Placement, node_id: str) -> int:
    return placement.gang.shape.memory_bytes * sum(stage.node_id == node_id for stage in placement.stages)
