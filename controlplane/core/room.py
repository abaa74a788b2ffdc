"""Is there room for one more replica like this one? The placement's answer, on the nodes that could do."""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.core.domain import Endpoint
from controlplane.core.gangs import Infeasible, Placement, Shape
from controlplane.core.gpu_choice import held, room_for
from controlplane.core.gpu_fleet import GpuFleet
from controlplane.core.leases import WHOLE_MILLI, Lease, LeaseBook
from controlplane.core.placement import ClusterState
from controlplane.core.revalidation import revalidate

_LOOKED_AT = 8
"""Nodes with enough free GPUs that the placement chooses among: whether there is room is known from one."""


def shape_of(lease: Lease) -> Shape:
    """What a holder has, as something to ask for."""
    first = lease.parts[0]
    if len(lease.parts) == 1:
        return Shape(milli_gpu=first.milli, gpu_memory_bytes=first.memory_bytes)
    return Shape(gpus=len(lease.parts), gpu_memory_bytes=max(part.memory_bytes for part in lease.parts))


def room(
    fleet: GpuFleet, book: LeaseBook, shape: Shape, tier: str, endpoints: Mapping[str, Endpoint]
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


def still_room(fleet: GpuFleet, book: LeaseBook, placement: Placement) -> bool:
    """Whether what :func:`room` found a while ago is still there: the GPUs in use and free."""
    nodes = [node for node_id in placement.node_ids if (node := fleet.node(node_id)) is not None]
    leases = [lease for node in nodes for lease in book.on_node(node.node_id)]
    return not revalidate([placement], ClusterState(tuple(nodes), held(leases)))


def _may_do(fleet: GpuFleet, book: LeaseBook, node_id: str, shape: Shape) -> bool:
    """Whether enough GPUs of the node are in use and free."""
    free, wanted, records = 0, shape.total_gpus, fleet.records
    for uuid in fleet.gpus_of(node_id):
        if WHOLE_MILLI - book.used(uuid)[0] >= shape.milli_gpu:
            record = records.get(uuid)
            free += record is not None and not record.out_of_use
            if free >= wanted:
                return True
    return free >= wanted
