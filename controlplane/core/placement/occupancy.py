"""What runs on a cluster, as placements: so that a plan starts from it and not from an empty cluster.

Two accounts meet here: the controller's, which knows replicas and perhaps their GPUs, and Ray's, which knows
how much of each node is reserved by anybody. What Ray has reserved beyond tierplane's replicas is held by
others. Where nobody says which GPUs are meant, those that the placement itself would take are assumed.
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
    """One replica that runs, or holds its place while it starts or drains."""

    endpoint_id: str
    tier: str
    node_id: str
    gpu_uuids: tuple[str, ...] = ()
    """In the order of the ranks; empty: not known."""
    gpus_by_node: tuple[tuple[str, int], ...] = ()
    """Of an engine that has reserved its GPUs itself, on several nodes perhaps; empty: it has not."""
    leaving: bool = False
    """It drains: it still holds its place and won't stay."""


@dataclass(frozen=True, slots=True)
class ReservedResources:
    """What anybody has of a node: GPUs and CPUs as Ray counts, memory as the machine does."""

    gpu_milli: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Occupancy:
    """A cluster and what runs on it."""

    state: PlacedCluster
    """The nodes, less the CPUs and memory that others have; the GPUs that others have as placements."""
    running: PlacementPlan
    """tierplane's replicas: under the names of the gangs that they answer to, or their own if they are too
    many."""
    replica_of: Mapping[str, str]
    """Endpoint id of each running gang."""
    notes: tuple[str, ...] = ()


def occupancy(
    nodes: Sequence[Node],
    gangs: Sequence[Gang],
    replicas: Sequence[RunningReplica],
    reserved: Mapping[str, ReservedResources],
    *,
    replica_cpu_milli: Mapping[str, int],
) -> Occupancy:
    """What runs on ``nodes``, as far as ``gangs`` (what is wanted) and others are concerned.

    ``reserved`` is by node; ``replica_cpu_milli`` (by tier) is what Ray has reserved for one replica.
    Replicas on a node that is not there are left out.
    """
    by_id = {node.node_id: node for node in nodes}
    here = [replica for replica in replicas if replica.node_id in by_id]
    named = _named(here, gangs)
    running: list[Placement] = []
    assumed: list[tuple[RunningReplica, Gang]] = []
    for replica, gang in named:
        placement = _exact(replica, gang, by_id[replica.node_id])
        if placement is not None:
            running.append(placement)
        else:
            assumed.append((replica, gang))
    notes: list[str] = []
    for replica, gang in assumed:
        if replica.gpus_by_node:
            found = _on_each(gang, replica.gpus_by_node, by_id, running)
        else:
            found = _somewhere(gang, by_id[replica.node_id], running)
        if found is None:
            notes.append(
                f"{replica.endpoint_id} runs on {replica.node_id}, but has no room there by its size"
            )
        else:
            running.append(replace(found, stays=True))
            where = ", ".join(found.node_ids)
            notes.append(f"which GPUs of {where} {replica.endpoint_id} has is not known: assumed")
    others: list[Placement] = []
    left: list[Node] = []
    for node in nodes:
        held = reserved.get(node.node_id, ReservedResources())
        ours_gpu = sum(_milli_on(placement, node.node_id) for placement in running)
        ours_cpu = sum(replica_cpu_milli.get(r.tier, 0) for r in here if r.node_id == node.node_id)
        foreign = _foreign(node, held.gpu_milli - ours_gpu, [*running, *others])
        if foreign:
            taken = sum(placement.gang.shape.total_milli for placement in foreign) / WHOLE_MILLI
            notes.append(f"others hold {taken:g} GPUs of {node.node_id}; which ones is assumed")
        others += foreign
        cpu_milli = max(0, held.cpu_milli - ours_cpu)
        if cpu_milli:
            notes.append(f"others hold {cpu_milli / 1000:g} CPUs of {node.node_id}")
        memory_bytes = max(0, held.memory_bytes - sum(_bytes_on(p, node.node_id) for p in running))
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
        {gang.gang_id: replica.endpoint_id for replica, gang in named},
        tuple(notes),
    )


def _named(replicas: Sequence[RunningReplica], gangs: Sequence[Gang]) -> list[tuple[RunningReplica, Gang]]:
    """Each replica with the gang that it answers to. Those that leave, or are too many, keep their name."""
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
    """Where it is known to run; None if its GPUs are not known."""
    shape = gang.shape
    if not shape.gpus:
        return Placement(gang, (GangStage(node.node_id),) * shape.stages, stays=True)
    uuids = replica.gpu_uuids
    if not uuids or not set(uuids) <= {gpu.uuid for gpu in node.gpus}:
        return None
    if len(uuids) != shape.total_gpus:
        # It was started with another size, and will be replaced by one of the new size.
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


def _somewhere(gang: Gang, node: Node, running: Sequence[Placement]) -> Placement | None:
    """A place on that node, whatever the node's state: it does run there."""
    open_node = replace(
        node,
        unavailable="",
        gpus=tuple(replace(gpu, unavailable="") for gpu in node.gpus),
    )
    shape = replace(gang.shape, cpu_milli=0, memory_bytes=0, across_nodes=False, models=frozenset())
    answer = Planner(PlacedCluster((open_node,), tuple(running))).place(replace(gang, shape=shape))
    return replace(answer, gang=gang) if isinstance(answer, Placement) else None


def _on_each(
    gang: Gang,
    gpus_by_node: Sequence[tuple[str, int]],
    nodes: Mapping[str, Node],
    running: Sequence[Placement],
) -> Placement | None:
    """So many GPUs on each node, as stages in the order of the ranks."""
    ranks: list[tuple[str, str]] = []
    for node_id, gpus in gpus_by_node:
        part = Gang(gang.gang_id, GangShape(gpus=gpus))
        found = _somewhere(part, nodes[node_id], running) if node_id in nodes else None
        if found is None:
            return None
        ranks += [(node_id, uuid) for uuid in found.gpu_uuids]
    size = gang.shape.gpus
    parts = [ranks[i : i + size] for i in range(0, len(ranks), size)]
    stages = tuple(GangStage(part[0][0], tuple(uuid for _, uuid in part)) for part in parts)
    return Placement(gang, stages) if len(ranks) == gang.shape.total_gpus else None


def _foreign(node: Node, gpu_milli: int, beside: Sequence[Placement]) -> list[Placement]:
    """GPUs for what others hold of a node: whole ones, then a share."""
    found: list[Placement] = []
    whole, share = divmod(max(0, gpu_milli), WHOLE_MILLI)
    for number, milli in enumerate([WHOLE_MILLI] * whole + [share] * bool(share)):
        gang = Gang(f"others on {node.node_id}/{number}", GangShape(milli_gpu=milli))
        placement = _somewhere(gang, node, [*beside, *found])
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
