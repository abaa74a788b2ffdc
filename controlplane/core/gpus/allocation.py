"""Which GPUs a replica gets, and whether there is room for one more: the placement's answers for leases.

The controller asks :func:`choose_gpus` when a replica that Ray has put on a node wants a lease of exact GPUs
there (Ray knows how many it has reserved, not which are linked), and :func:`room_for` before it moves a
replica away from a GPU or a node. Both are the :class:`~controlplane.core.placement.planner.Planner` on a
copy of what is leased, so that a lease, a move and ``tierplane plan`` never disagree. Nothing is changed
here: the lease is the :class:`~controlplane.core.gpus.leases.LeaseBook`'s to grant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import WHOLE_MILLI, GpuLease, GpuPart, LeaseBook
from controlplane.core.placement.gangs import Gang, GangShape, GangStage, Infeasible, Placement
from controlplane.core.placement.planner import PlacedCluster, Planner, demand_of
from controlplane.core.placement.revalidation import revalidate
from controlplane.core.placement.topology import Node

_ASKING = "asking"


def choose_gpus(
    node: Node, shape: GangShape, leases: Iterable[GpuLease] = (), *, expected: Iterable[GangShape] = ()
) -> Placement | Infeasible:
    """The GPUs of ``node`` that suit ``shape`` best, beside what is leased there.

    Each stage in one NVLink island, else on one NUMA node, else anywhere on the node; then where least is
    stranded of what ``expected`` replicas (by default: more like those that are here) could use. ``node``
    says which GPUs must not be used, ``leases`` which are taken, of this node or of others too. The answer's
    ``why`` is the reason; :func:`parts_of` makes of it what a lease book takes.
    """
    here = [lease for lease in leases if lease.node_id == node.node_id]
    # CPUs and memory are Ray's to count: it has put the replica there.
    shape = replace(shape, cpu_milli=0, memory_bytes=0, across_nodes=False)
    return _place(Gang(_ASKING, shape), (node,), here, {}, expected)


def room_for(
    nodes: Sequence[Node],
    shape: GangShape,
    leases: Iterable[GpuLease],
    *,
    tier: str = "",
    tier_of: Mapping[str, str] | None = None,
    avoid: Collection[str] = (),
    expected: Iterable[GangShape] = (),
) -> Placement | Infeasible:
    """Where one more replica of ``tier`` would go beside what is leased, or why nowhere.

    ``avoid`` are ids of nodes that won't do, those that are to be emptied; a GPU that won't do is marked
    ``unavailable`` in its node. ``tier_of`` (holder → tier) keeps replicas of one tier apart. To ask whether
    a replica fits anew once it has let go of what it holds, leave its lease out. Takes about 50 ms on
    10,000 GPUs.
    """
    nodes = [
        replace(node, unavailable=node.unavailable or "to be emptied") if node.node_id in avoid else node
        for node in nodes
    ]
    return _place(Gang(_ASKING, shape, tier), nodes, leases, tier_of or {}, expected)


def parts_of(placement: Placement) -> tuple[GpuPart, ...]:
    """What of each GPU a lease for ``placement`` is to hold, in the order of the ranks."""
    shape = placement.gang.shape
    return tuple(GpuPart(uuid, shape.milli_gpu, shape.gpu_memory_bytes) for uuid in placement.gpu_uuids)


def held(leases: Iterable[GpuLease], tier_of: Mapping[str, str] | None = None) -> tuple[Placement, ...]:
    """Leases as placements of what runs. A lease counts once as a replica of its tier."""
    tiers = tier_of or {}
    return tuple(
        Placement(
            Gang(
                f"{lease.holder}/{number}",
                GangShape(milli_gpu=part.milli, gpu_memory_bytes=part.memory_bytes),
                "" if number else tiers.get(lease.holder, ""),
            ),
            (GangStage(lease.node_id, (part.gpu_uuid,)),),
        )
        for lease in leases
        for number, part in enumerate(lease.parts)
    )


def _place(
    gang: Gang,
    nodes: Sequence[Node],
    leases: Iterable[GpuLease],
    tier_of: Mapping[str, str],
    expected: Iterable[GangShape],
) -> Placement | Infeasible:
    leases = tuple(leases)
    likely = list(expected) or [gang.shape, *map(_shape_of, leases)]
    state = PlacedCluster(tuple(nodes), held(leases, tier_of))
    return Planner(state, demand_of(likely)).place(gang)


def _shape_of(lease: GpuLease) -> GangShape:
    """What the holder asked for, as far as a lease tells: the GPUs of all its stages are one stage's."""
    first = lease.parts[0]
    if len(lease.parts) == 1:
        return GangShape(milli_gpu=first.milli, gpu_memory_bytes=first.memory_bytes)
    return GangShape(gpus=len(lease.parts), gpu_memory_bytes=max(part.memory_bytes for part in lease.parts))


_LOOKED_AT = 8
"""Nodes with enough free GPUs that the placement chooses among: whether there is room is known from one."""


def shape_of(lease: GpuLease) -> GangShape:
    """What a holder has, as something to ask for."""
    first = lease.parts[0]
    if len(lease.parts) == 1:
        return GangShape(milli_gpu=first.milli, gpu_memory_bytes=first.memory_bytes)
    return GangShape(gpus=len(lease.parts), gpu_memory_bytes=max(part.memory_bytes for part in lease.parts))


def room(
    fleet: GpuInventory, book: LeaseBook, shape: GangShape, tier: str, endpoints: Mapping[str, Endpoint]
) -> Placement | None:
    """Where one more would go; None: nowhere."""
    nodes = []
    for node_id in sorted(fleet.nodes):
        if node_id in fleet.holds or not _may_do(fleet, book, node_id, shape):
            continue
        node = fleet.node(node_id)
        if node is not None:
            nodes.append(node)
        if len(nodes) == _LOOKED_AT:
            break
    leases = [lease for node in nodes for lease in book.on_node(node.node_id)]
    tier_of = {lease.holder: endpoints[lease.holder].tier for lease in leases if lease.holder in endpoints}
    found = room_for(nodes, shape, leases, tier=tier, tier_of=tier_of)
    return None if isinstance(found, Infeasible) else found


def still_room(fleet: GpuInventory, book: LeaseBook, placement: Placement) -> bool:
    """Whether what :func:`room` found a while ago is still there: the GPUs in use and free."""
    nodes = [node for node_id in placement.node_ids if (node := fleet.node(node_id)) is not None]
    leases = [lease for node in nodes for lease in book.on_node(node.node_id)]
    return not revalidate([placement], PlacedCluster(tuple(nodes), held(leases)))


def _may_do(fleet: GpuInventory, book: LeaseBook, node_id: str, shape: GangShape) -> bool:
    """Whether enough GPUs of the node are in use and free."""
    free, wanted, records = 0, shape.total_gpus, fleet.records
    for uuid in fleet.gpus_of(node_id):
        if WHOLE_MILLI - book.used(uuid)[0] >= shape.milli_gpu:
            record = records.get(uuid)
            free += record is not None and not record.out_of_use
            if free >= wanted:
                return True
    return free >= wanted
