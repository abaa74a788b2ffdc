"""``tierplane plan``: where each replica would run and why, and what a change to the cluster would do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from controlplane.cli.checking.configuration import load_checked
from controlplane.cli.controller_access import connected_ray, ray_address
from controlplane.cli.planning.plan_view import PlanResult, show, to_json
from controlplane.config import PlaneConfig
from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang
from controlplane.core.placement.occupancy import occupancy
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.topology import Node
from controlplane.core.placement.what_if import add_node, change, lose_node
from controlplane.errors import SetupError
from controlplane.planning.cluster_file import ClusterFile, load_cluster
from controlplane.planning.tier_gangs import TierGang, tier_gangs

if TYPE_CHECKING:
    from controlplane.planning.live_cluster import LiveCluster

_WHAT_IF = "lose-node NODE | add-node TYPE | scale TIER REPLICAS"


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option(
    "--cluster",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A cluster file; by default the running cluster.",
)
@click.option("--what-if", "changes", multiple=True, metavar="CHANGE", help=f"{_WHAT_IF}; repeatable.")
@click.option(
    "--address", help="The running Ray; by default the one that `tierplane up` started, or RAY_ADDRESS."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    config: str, cluster: Path | None, changes: tuple[str, ...], address: str | None, as_json: bool
) -> None:
    """Plan which GPUs the replicas of CONFIG run on, in a described or in the running cluster.

    In the running cluster, existing replicas stay where they are, resources that others have reserved count
    as used, and GPUs and nodes that are out of use are left out. With --what-if the plan is for a changed
    cluster, and the differences are shown. Nothing is changed.

    Exit status 3 if a replica can't be placed.
    """
    plane = load_checked(config).plane
    described = load_cluster(cluster) if cluster else None
    if described is not None:
        nodes = described.to_nodes()
        tiers = tier_gangs(plane, nodes)
        state = PlacedCluster(nodes)
        result = PlanResult(tiers, plan(state, _gangs(tiers)), nodes)
    else:
        state, result = _plan_live(plane, _live(address, plane))
    for text in changes:
        state, tiers = _changed(text, state, result.tiers, described)
        result = replace(result, tiers=tiers)
    if changes:
        result = _plan_changed(plane, state, result)
    if as_json:
        click.echo(json.dumps(to_json(result), indent=2))
    else:
        show(result)
    if not result.complete:
        raise SystemExit(3)


def _gangs(tiers: Sequence[TierGang]) -> list[Gang]:
    return [gang for tier in tiers for gang in tier.gangs()]


def _plan_live(plane: PlaneConfig, live: LiveCluster) -> tuple[PlacedCluster, PlanResult]:
    """The plan for a cluster where replicas of the configuration, and others' processes, may be running."""
    tiers = tier_gangs(plane, live.nodes)
    gangs = _gangs(tiers)
    now = occupancy(
        live.nodes,
        gangs,
        live.replicas,
        live.reserved or {},
        replica_cpu_milli={tier.name: ceil(tier.cpus * 1000) for tier in plane.tiers},
    )
    found = change(now.state, now.running, gangs)
    notes = (*live.notes, *now.notes)
    result = PlanResult(
        tiers=tiers,
        plan=found.plan,
        nodes=now.state.nodes,
        change=found,
        replica_of=now.replica_of,
        notes=notes,
    )
    return now.state, result


def _plan_changed(plane: PlaneConfig, state: PlacedCluster, before: PlanResult) -> PlanResult:
    """The plan for the changed cluster, with the differences from ``before``."""
    # The nodes' GPU models may have changed.
    tiers = tuple(
        tier.scaled(old.tier.replicas)
        for tier, old in zip(tier_gangs(plane, state.nodes), before.tiers, strict=True)
    )
    found = change(state, before.plan, _gangs(tiers))
    return replace(before, tiers=tiers, plan=found.plan, nodes=state.nodes, change=found)


def _live(address: str | None, config: PlaneConfig) -> LiveCluster:
    ray = ray_address(address)
    if not ray:
        raise SetupError(
            "no cluster runs here: describe one with --cluster FILE, or name its Ray with --address"
        )
    click.echo(f"connecting to the cluster at {ray}", err=True)
    with connected_ray(ray):
        from controlplane.planning import live_cluster

        return live_cluster.live_cluster(config)


def _changed(
    text: str, state: PlacedCluster, tiers: tuple[TierGang, ...], described: ClusterFile | None
) -> tuple[PlacedCluster, tuple[TierGang, ...]]:
    words = text.split()
    if len(words) == 2 and words[0] == "lose-node":
        try:
            return lose_node(state, words[1]), tiers
        except KeyError:
            known = ", ".join(node.node_id for node in state.nodes[:20])
            raise click.UsageError(f"--what-if: there is no node '{words[1]}'; known: {known}") from None
    if len(words) == 2 and words[0] == "add-node":
        return add_node(state, _node_like(words[1], state, described)), tiers
    if len(words) == 3 and words[0] == "scale" and words[2].isdigit():
        if all(each.tier.name != words[1] for each in tiers):
            known = ", ".join(each.tier.name for each in tiers)
            raise click.UsageError(f"--what-if: there is no tier '{words[1]}'; known: {known}")
        count = int(words[2])
        return state, tuple(each.scaled(count) if each.tier.name == words[1] else each for each in tiers)
    raise click.UsageError(f"--what-if takes {_WHAT_IF}, not '{text}'")


def _node_like(name: str, state: PlacedCluster, described: ClusterFile | None) -> Node:
    """A node of a type in the cluster file, or like an existing node."""
    kind = described.type_named(name) if described else None
    if kind is not None:
        return kind.node(kind.name)
    for node in state.nodes:
        if name in {node.node_type, node.node_id}:
            return node
    known = [kind.name for kind in described.node_types] if described else [n.node_id for n in state.nodes]
    raise click.UsageError(f"--what-if: there is no node type '{name}'; known: {', '.join(known[:20])}")
