"""Which GPUs a replica gets, and whether there is room for one more: the placement's answers for leases.

The controller asks :func:`choose_gpus` when a replica that Ray has put on a node wants a lease of exact GPUs
there (Ray knows how many it has reserved, not which are linked), and :func:`room_for` before it moves a
replica away from a GPU or a node. Both are the :class:`~controlplane.core.placement.Planner` on a copy of
what is leased, so that a lease, a move and ``tierplane plan`` never disagree. Nothing is changed here: the
lease is the :class:`~controlplane.core.leases.LeaseBook`'s to grant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from controlplane.core.gangs import Gang, Infeasible, Placement, Shape, Stage
from controlplane.core.leases import Lease, Part
from controlplane.core.placement import ClusterState, Planner, demand_of
from controlplane.core.topology import Node

_ASKING = "asking"


def choose_gpus(
    node: Node, shape: Shape, leases: Iterable[Lease] = (), *, expected: Iterable[Shape] = ()
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
    shape: Shape,
    leases: Iterable[Lease],
    *,
    tier: str = "",
    tier_of: Mapping[str, str] | None = None,
    avoid: Collection[str] = (),
    expected: Iterable[Shape] = (),
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


def parts_of(placement: Placement) -> tuple[Part, ...]:
    """What of each GPU a lease for ``placement`` is to hold, in the order of the ranks."""
    shape = placement.gang.shape
    return tuple(Part(uuid, shape.milli_gpu, shape.gpu_memory_bytes) for uuid in placement.gpu_uuids)


def held(leases: Iterable[Lease], tier_of: Mapping[str, str] | None = None) -> tuple[Placement, ...]:
    """Leases as placements of what runs. A lease counts once as a replica of its tier."""
    tiers = tier_of or {}
    return tuple(
        Placement(
            Gang(
                f"{lease.holder}/{number}",
                Shape(milli_gpu=part.milli, gpu_memory_bytes=part.memory_bytes),
                "" if number else tiers.get(lease.holder, ""),
            ),
            (Stage(lease.node_id, (part.gpu_uuid,)),),
        )
        for lease in leases
        for number, part in enumerate(lease.parts)
    )


def _place(
    gang: Gang,
    nodes: Sequence[Node],
    leases: Iterable[Lease],
    tier_of: Mapping[str, str],
    expected: Iterable[Shape],
) -> Placement | Infeasible:
    leases = tuple(leases)
    likely = list(expected) or [gang.shape, *map(_shape_of, leases)]
    state = ClusterState(tuple(nodes), held(leases, tier_of))
    return Planner(state, demand_of(likely)).place(gang)


def _shape_of(lease: Lease) -> Shape:
    """What the holder asked for, as far as a lease tells: the GPUs of all its stages are one stage's."""
    first = lease.parts[0]
    if len(lease.parts) == 1:
        return Shape(milli_gpu=first.milli, gpu_memory_bytes=first.memory_bytes)
    return Shape(gpus=len(lease.parts), gpu_memory_bytes=max(part.memory_bytes for part in lease.parts))
