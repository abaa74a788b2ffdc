"""``tierplane plan``: where each replica would run, why, and what a change to the cluster would do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from controlplane.cli.checking.configuration import load_checked
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
from controlplane.ray_cluster import session

if TYPE_CHECKING:
    from controlplane.planning.live_cluster import LiveCluster

_WHAT_IF = "lose-node NODE | add-node TYPE | scale TIER REPLICAS"


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("--cluster", type=click.Path(dir_okay=False, path_type=Path), help="A cluster file.")
@click.option("--what-if", "question", multiple=True, metavar="CHANGE", help=f"{_WHAT_IF}; repeatable.")
@click.option("--address", help="The Ray to plan for; by default the one `tierplane up` started.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    config: str, cluster: Path | None, question: tuple[str, ...], address: str | None, as_json: bool
) -> None:
    """Plan where the replicas of CONFIG run: on the cluster of a file, or on the one that runs.

    On the one that runs, replicas that are there stay where they are, what others have reserved is taken,
    and GPUs and nodes that are out of use are left out. With --what-if the same plan is made on a changed
    copy, and the difference is shown. Nothing is done.
    Exit status 3 if a replica has no place.
    """
    plane = load_checked(config).plane
    described = load_cluster(cluster) if cluster else None
    if described is not None:
        nodes = described.to_nodes()
        demands = tier_gangs(plane, nodes)
        state = PlacedCluster(nodes)
        answer = PlanResult(demands, plan(state, _gangs(demands)), nodes)
    else:
        state, answer = _beside_what_runs(plane, _live(address, plane))
    for text in question:
        state, demands = _changed(text, state, answer.demands, described)
        answer = replace(answer, demands=demands)
    if question:
        answer = _once_changed(plane, state, answer)
    if as_json:
        click.echo(json.dumps(to_json(answer), indent=2))
    else:
        show(answer)
    if not answer.complete:
        raise SystemExit(3)


def _gangs(demands: Sequence[TierGang]) -> list[Gang]:
    return [gang for demand in demands for gang in demand.gangs()]


def _beside_what_runs(plane: PlaneConfig, live: LiveCluster) -> tuple[PlacedCluster, PlanResult]:
    """What the configuration needs on a cluster where some of it runs, and others may too."""
    demands = tier_gangs(plane, live.nodes)
    gangs = _gangs(demands)
    now = occupancy(
        live.nodes,
        gangs,
        live.replicas,
        live.reserved or {},
        replica_cpu_milli={tier.name: ceil(tier.cpus * 1000) for tier in plane.tiers},
    )
    found = change(now.state, now.running, gangs)
    notes = (*live.notes, *now.notes)
    return now.state, PlanResult(demands, found.plan, now.state.nodes, found, now.replica_of, notes)


def _once_changed(plane: PlaneConfig, state: PlacedCluster, before: PlanResult) -> PlanResult:
    """The same on the changed cluster, and the difference."""
    # GPU models may have come or gone with the nodes.
    demands = tuple(
        demand.scaled(old.tier.replicas)
        for demand, old in zip(tier_gangs(plane, state.nodes), before.demands, strict=True)
    )
    found = change(state, before.plan, _gangs(demands))
    return replace(before, demands=demands, plan=found.plan, nodes=state.nodes, change=found)


def _live(address: str | None, config: PlaneConfig) -> LiveCluster:
    record = session.load_record()
    where = address or (record.ray_address if record else "") or os.environ.get("RAY_ADDRESS")
    if not where:
        raise SetupError(
            "no cluster runs here: describe one with --cluster FILE, or name a Ray with --address"
        )
    if record is not None and where == record.ray_address:
        session.authenticate(record)
    from controlplane.planning import live_cluster
    from controlplane.ray_cluster import plane

    click.echo(f"asking the cluster at {where}", err=True)
    plane.connect(where)
    try:
        return live_cluster.live_cluster(config)
    finally:
        plane.disconnect()


def _changed(
    text: str, state: PlacedCluster, demands: tuple[TierGang, ...], described: ClusterFile | None
) -> tuple[PlacedCluster, tuple[TierGang, ...]]:
    words = text.split()
    if len(words) == 2 and words[0] == "lose-node":
        try:
            return lose_node(state, words[1]), demands
        except KeyError:
            known = ", ".join(node.node_id for node in state.nodes[:20])
            raise click.UsageError(f"--what-if: no node '{words[1]}'; there is {known}") from None
    if len(words) == 2 and words[0] == "add-node":
        return add_node(state, _like(words[1], state, described)), demands
    if len(words) == 3 and words[0] == "scale" and words[2].isdigit():
        if all(demand.tier.name != words[1] for demand in demands):
            known = ", ".join(demand.tier.name for demand in demands)
            raise click.UsageError(f"--what-if: no tier '{words[1]}'; there is {known}")
        count = int(words[2])
        return state, tuple(d.scaled(count) if d.tier.name == words[1] else d for d in demands)
    raise click.UsageError(f"--what-if takes {_WHAT_IF}, not '{text}'")


def _like(name: str, state: PlacedCluster, described: ClusterFile | None) -> Node:
    kind = described.type_named(name) if described else None
    if kind is not None:
        return kind.node(kind.name)
    for node in state.nodes:
        if name in {node.node_type, node.node_id}:
            return node
    known = [kind.name for kind in described.node_types] if described else [n.node_id for n in state.nodes]
    raise click.UsageError(f"--what-if: no node type '{name}'; there is {', '.join(known[:20])}")
