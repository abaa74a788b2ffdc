"""The effect of a change to a cluster: the production planning code, run on a changed copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang, GangShape, Infeasible, Placement, PlacementPlan
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.topology import Node


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """The effect of a change on the running gangs, as gang ids."""

    plan: PlacementPlan
    """All gangs after the change."""
    unchanged: tuple[str, ...]
    """Gangs that stay on their nodes and GPUs."""
    moved: tuple[str, ...]
    """Gangs that lose their nodes or GPUs and get others."""
    added: tuple[str, ...]
    removed: tuple[str, ...]
    lost: tuple[str, ...]
    """Gangs that lose their nodes or GPUs and find no others."""


def lose_node(state: PlacedCluster, node_id: str) -> PlacedCluster:
    """The cluster without that node. KeyError if it has no such node."""
    if all(node.node_id != node_id for node in state.nodes):
        raise KeyError(node_id)
    return replace(state, nodes=tuple(node for node in state.nodes if node.node_id != node_id))


def add_node(state: PlacedCluster, like: Node) -> PlacedCluster:
    """The cluster with one more node of that kind, under a new name and with everything usable."""
    taken = {node.node_id for node in state.nodes}
    stem = like.node_type or like.node_id
    name = next(f"{stem}-new{i}" for i in range(len(taken) + 1) if f"{stem}-new{i}" not in taken)
    new_name = {gpu.uuid: f"{name}/{gpu.index}" for gpu in like.gpus}
    gpus = tuple(
        replace(
            gpu,
            uuid=new_name[gpu.uuid],
            nvlink_peers=frozenset(new_name[peer] for peer in gpu.nvlink_peers if peer in new_name),
            unavailable="",
        )
        for gpu in like.gpus
    )
    return replace(state, nodes=(*state.nodes, replace(like, node_id=name, gpus=gpus, unavailable="")))


def change(state: PlacedCluster, before: PlacementPlan, gangs: Sequence[Gang]) -> ClusterChange:
    """What has to change so that ``gangs`` run on ``state``, if the placements of ``before`` ran until now.

    A gang stays if its size is unchanged and its nodes and GPUs still exist and may be used. The other gangs
    are placed anew, besides those that stay and the placements of ``state``.
    """
    wanted = {gang.gang_id: gang for gang in gangs}
    usable = {
        node.node_id: {gpu.uuid for gpu in node.gpus if not gpu.unavailable}
        for node in state.nodes
        if not node.unavailable
    }
    ran = {placement.gang.gang_id: placement for placement in before.placements}
    staying = [
        placement
        for gang_id, placement in ran.items()
        if gang_id in wanted
        and _same_size(placement.gang.shape, wanted[gang_id].shape)
        and all(set(stage.gpu_uuids) <= usable.get(stage.node_id, set()) for stage in placement.stages)
        and all(stage.node_id in usable for stage in placement.stages)
    ]
    staying_ids = {placement.gang.gang_id for placement in staying}
    fresh = plan(
        replace(state, placements=(*state.placements, *staying)),
        [gang for gang in gangs if gang.gang_id not in staying_ids],
    )
    found = {placement.gang.gang_id: placement for placement in (*staying, *fresh.placements)}
    refused = {infeasible.gang.gang_id: infeasible for infeasible in fresh.infeasible}
    placements: list[Placement] = [found[gang.gang_id] for gang in gangs if gang.gang_id in found]
    infeasible: list[Infeasible] = [refused[gang.gang_id] for gang in gangs if gang.gang_id in refused]
    return ClusterChange(
        PlacementPlan(tuple(placements), tuple(infeasible)),
        unchanged=tuple(gang_id for gang_id in wanted if gang_id in staying_ids),
        moved=tuple(p.gang.gang_id for p in fresh.placements if p.gang.gang_id in ran),
        added=tuple(p.gang.gang_id for p in fresh.placements if p.gang.gang_id not in ran),
        removed=tuple(gang_id for gang_id in ran if gang_id not in wanted),
        lost=tuple(i.gang.gang_id for i in fresh.infeasible if i.gang.gang_id in ran),
    )


def _same_size(before: GangShape, now: GangShape) -> bool:
    """Whether a running gang may stay. Accepted models and memory are not compared: they are derived from the
    cluster's GPUs and may change with them."""
    return (before.gpus, before.stages, before.milli_gpu) == (now.gpus, now.stages, now.milli_gpu)
