"""Changed copies of a cluster, to ask what would happen: the answer comes from the same planning code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang, GangShape, Infeasible, Placement, PlacementPlan
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.topology import Node


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """What a changed cluster does to what ran."""

    plan: PlacementPlan
    """Everything that then runs, and what finds no place."""
    kept: tuple[str, ...]
    """Gangs that stay where they are."""
    moved: tuple[str, ...]
    """Gangs that lose their place and find another."""
    added: tuple[str, ...]
    removed: tuple[str, ...]
    lost: tuple[str, ...]
    """Gangs that lose their place and find no other."""


def lose_node(state: PlacedCluster, node_id: str) -> PlacedCluster:
    """Without that node. KeyError if there is none."""
    if all(node.node_id != node_id for node in state.nodes):
        raise KeyError(node_id)
    return replace(state, nodes=tuple(node for node in state.nodes if node.node_id != node_id))


def add_node(state: PlacedCluster, like: Node) -> PlacedCluster:
    """With one more node of that kind, under a new name and in working order."""
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
    """What ``gangs`` need on ``state`` after they, or others, ran as ``before`` says.

    Nothing moves that can stay: gangs that ask for the same as before and whose nodes and GPUs are still
    there and in use keep them, the others are planned anew beside those and what ``state`` says that others
    run.
    """
    wanted = {gang.gang_id: gang for gang in gangs}
    there = {
        node.node_id: {gpu.uuid for gpu in node.gpus if not gpu.unavailable}
        for node in state.nodes
        if not node.unavailable
    }
    ran = {placement.gang.gang_id: placement for placement in before.placements}
    kept = [
        placement
        for gang_id, placement in ran.items()
        if gang_id in wanted
        and _asks_for_the_same(placement.gang.shape, wanted[gang_id].shape)
        and all(set(stage.gpu_uuids) <= there.get(stage.node_id, set()) for stage in placement.stages)
        and all(stage.node_id in there for stage in placement.stages)
    ]
    stays = {placement.gang.gang_id for placement in kept}
    fresh = plan(
        replace(state, placements=(*state.placements, *kept)),
        [gang for gang in gangs if gang.gang_id not in stays],
    )
    found = {placement.gang.gang_id: placement for placement in (*kept, *fresh.placements)}
    refused = {infeasible.gang.gang_id: infeasible for infeasible in fresh.infeasible}
    placements: list[Placement] = [found[gang.gang_id] for gang in gangs if gang.gang_id in found]
    infeasible: list[Infeasible] = [refused[gang.gang_id] for gang in gangs if gang.gang_id in refused]
    return ClusterChange(
        PlacementPlan(tuple(placements), tuple(infeasible)),
        kept=tuple(gang_id for gang_id in wanted if gang_id in stays),
        moved=tuple(p.gang.gang_id for p in fresh.placements if p.gang.gang_id in ran),
        added=tuple(p.gang.gang_id for p in fresh.placements if p.gang.gang_id not in ran),
        removed=tuple(gang_id for gang_id in ran if gang_id not in wanted),
        lost=tuple(i.gang.gang_id for i in fresh.infeasible if i.gang.gang_id in ran),
    )


def _asks_for_the_same(before: GangShape, now: GangShape) -> bool:
    """Whether a running gang may stay: which models are accepted and how much memory is asked for follow from
    the cluster's GPUs, and may change with them."""
    return (before.gpus, before.stages, before.milli_gpu) == (now.gpus, now.stages, now.milli_gpu)
