"""``tierplane plan``: where each replica would run, why, and what a change to the cluster would do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from controlplane.adapters import ray_session
from controlplane.adapters.catalog import gpu_table
from controlplane.adapters.tier_gangs import TierDemand, tier_demands
from controlplane.cli.configuration import load_checked
from controlplane.cluster_file import ClusterFile, load_cluster
from controlplane.core.gangs import WHOLE_MILLI, Gang, Placement, Plan, Shape
from controlplane.core.gpus import find_gpu
from controlplane.core.placement import ClusterState
from controlplane.core.planning import plan
from controlplane.core.topology import Node
from controlplane.core.what_if import Change, add_node, change, lose_node
from controlplane.errors import SetupError

_GIB = 1024**3
_RAY_GPU_NAME = re.compile(r"\w+\s+([A-Z0-9]+)")
"""How Ray takes its accelerator type from the driver's name of a GPU."""
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

    With --what-if the same plan is made on a changed copy, and the difference is shown; nothing is done.
    Exit status 3 if a replica has no place.
    """
    plane = load_checked(config).plane
    described = load_cluster(cluster) if cluster else None
    nodes = described.to_nodes() if described else _live(address, plane.controller.namespace)
    demands = tier_demands(plane, nodes)
    state = ClusterState(nodes)
    answer = plan(state, _gangs(demands))
    if not question:
        _show(demands, answer, nodes, None, as_json)
    else:
        for text in question:
            state, demands = _changed(text, state, demands, described)
        # GPU models may have come or gone with the nodes.
        replicas = [demand.tier.replicas for demand in demands]
        demands = tuple(
            demand.scaled(count)
            for demand, count in zip(tier_demands(plane, state.nodes), replicas, strict=True)
        )
        answer_then = change(state, answer, _gangs(demands))
        _show(demands, answer_then.plan, state.nodes, answer_then, as_json)
        answer = answer_then.plan
    if not answer.complete or any(_hopeless(demand) for demand in demands):
        raise SystemExit(3)


def _hopeless(demand: TierDemand) -> bool:
    return demand.shape is None and bool(demand.unfit) and demand.tier.replicas > 0


def _gangs(demands: Sequence[TierDemand]) -> list[Gang]:
    return [gang for demand in demands for gang in demand.gangs()]


def _live(address: str | None, namespace: str) -> tuple[Node, ...]:
    record = ray_session.load_record()
    where = address or (record.ray_address if record else "") or os.environ.get("RAY_ADDRESS")
    if not where:
        raise SetupError(
            "no cluster runs here: describe one with --cluster FILE, or name a Ray with --address"
        )
    if record is not None and where == record.ray_address:
        ray_session.enter(record)
    from controlplane.adapters import live_cluster, plane

    plane.connect(where)
    try:
        return live_cluster.live_nodes(namespace)
    finally:
        plane.disconnect()


def _changed(
    text: str, state: ClusterState, demands: tuple[TierDemand, ...], described: ClusterFile | None
) -> tuple[ClusterState, tuple[TierDemand, ...]]:
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


def _like(name: str, state: ClusterState, described: ClusterFile | None) -> Node:
    kind = described.type_named(name) if described else None
    if kind is not None:
        return kind.node(kind.name)
    for node in state.nodes:
        if name in {node.node_type, node.node_id}:
            return node
    known = [kind.name for kind in described.node_types] if described else [n.node_id for n in state.nodes]
    raise click.UsageError(f"--what-if: no node type '{name}'; there is {', '.join(known[:20])}")


def _show(
    demands: Sequence[TierDemand],
    answer: Plan,
    nodes: Sequence[Node],
    difference: Change | None,
    as_json: bool,
) -> None:
    if as_json:
        click.echo(json.dumps(_json(demands, answer, nodes, difference), indent=2))
        return
    console = Console(highlight=False)
    if difference is not None:
        console.print(_difference_text(difference))
    console.print(_tier_table(demands, answer))
    console.print(_placement_table(answer, nodes))
    console.print("Serve options")
    for demand in demands:
        if demand.shape is not None:
            console.print(f"  {demand.tier.name}: {json.dumps(serve_options(demand))}", soft_wrap=True)
    console.print("Visible devices")
    for placement in answer.placements:
        if placement.gpu_uuids:
            devices = ",".join(placement.gpu_uuids)
            console.print(f"  {placement.gang.gang_id}: CUDA_VISIBLE_DEVICES={devices}", soft_wrap=True)
    for demand in demands:
        for note in demand.notes:
            console.print(f"{demand.tier.name}: {note}")
        for model, why in demand.unfit:
            console.print(f"{demand.tier.name}: does not fit {model}: {why}")
    for infeasible in answer.infeasible:
        console.print(f"[red]{infeasible.gang.gang_id} has no place[/red]: {infeasible.why}")
    for refusal in answer.infeasible[0].refusals[:20] if answer.infeasible else ():
        console.print(f"  {refusal}")


def _difference_text(difference: Change) -> str:
    parts = [
        f"{name}: {', '.join(gangs)}"
        for name, gangs in (
            ("stay", difference.kept),
            ("move", difference.moved),
            ("come", difference.added),
            ("go", difference.removed),
            ("[red]lost[/red]", difference.lost),
        )
        if gangs
    ]
    return "\n".join(parts) + "\n"


def _tier_table(demands: Sequence[TierDemand], answer: Plan) -> Table:
    table = Table("tier", "model", "replicas", "placed", "a replica takes", "at least per GPU")
    for demand in demands:
        placed = sum(p.gang.tier == demand.tier.name for p in answer.placements)
        table.add_row(
            demand.tier.name,
            demand.tier.model_id,
            str(demand.tier.replicas),
            str(placed) if demand.shape else "-",
            _takes(demand.shape) if demand.shape else "-",
            f"{demand.gpu_bytes / _GIB:.1f} GiB" if demand.gpu_bytes else "-",
        )
    return table


def _takes(shape: Shape) -> str:
    parts = []
    if shape.shared:
        parts.append(f"{shape.milli_gpu / WHOLE_MILLI:g} GPU")
    elif shape.gpus:
        stages = f" x {shape.stages} stages" if shape.stages > 1 else ""
        parts.append(f"{shape.gpus} GPU{'s' * (shape.gpus > 1)}{stages}")
    if shape.cpu_milli:
        parts.append(f"{shape.cpu_milli * shape.stages / 1000:g} CPUs")
    return ", ".join(parts) or "nothing that is counted"


def _placement_table(answer: Plan, nodes: Sequence[Node]) -> Table:
    index = {gpu.uuid: gpu.index for node in nodes for gpu in node.gpus}
    table = Table("replica", "node", "GPUs", "why")
    for placement in answer.placements:
        table.add_row(
            placement.gang.gang_id,
            ", ".join(placement.node_ids),
            " | ".join(
                ",".join(str(index.get(uuid, uuid)) for uuid in stage.gpu_uuids) for stage in placement.stages
            ),
            placement.why,
        )
    return table


def serve_options(demand: TierDemand) -> dict[str, Any]:
    """The options of the tier's Serve deployment that make Ray reserve what the plan counts with."""
    tier, shape = demand.tier, demand.shape
    assert shape is not None
    gpus = shape.milli_gpu / WHOLE_MILLI if shape.shared else shape.total_gpus
    options: dict[str, Any] = {
        "num_replicas": tier.replicas,
        "ray_actor_options": {"num_cpus": tier.cpus, "num_gpus": gpus},
    }
    if shape.total_gpus > 1:
        options["placement_group_bundles"] = [{"CPU": tier.cpus, "GPU": gpus}]
        options["placement_group_strategy"] = "STRICT_PACK"
    kinds = sorted({kind for model in shape.models if (kind := _ray_type(model))})
    if kinds:
        options["ray_actor_options"]["label_selector"] = {
            "ray.io/accelerator-type": f"in({', '.join(kinds)})"
        }
    return options


def _ray_type(model: str) -> str:
    known = find_gpu(gpu_table(), model)
    match = _RAY_GPU_NAME.match(known.nvml_name) if known else None
    return match[1] if match else ""


def _replica_json(placement: Placement) -> dict[str, Any]:
    return {
        "replica": placement.gang.gang_id,
        "tier": placement.gang.tier,
        "nodes": list(placement.node_ids),
        "stages": [{"node": stage.node_id, "gpus": list(stage.gpu_uuids)} for stage in placement.stages],
        "visible_devices": ",".join(placement.gpu_uuids),
        "distance": placement.distance.name.lower(),
        "stranded_gpus": round(placement.stranded_milli / WHOLE_MILLI, 3),
        "why": placement.why,
    }


def _json(
    demands: Sequence[TierDemand], answer: Plan, nodes: Sequence[Node], difference: Change | None
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "complete": answer.complete and not any(_hopeless(demand) for demand in demands),
        "nodes": [
            {"node": n.node_id, "type": n.node_type, "gpus": len(n.gpus), "unavailable": n.unavailable}
            for n in nodes
        ],
        "tiers": [
            {
                "tier": demand.tier.name,
                "model": demand.tier.model,
                "replicas": demand.tier.replicas,
                "gpu_bytes": demand.gpu_bytes,
                "serve_options": serve_options(demand) if demand.shape else None,
                "unfit": [{"gpu": model, "why": why} for model, why in demand.unfit],
                "notes": list(demand.notes),
            }
            for demand in demands
        ],
        "placements": [_replica_json(placement) for placement in answer.placements],
        "infeasible": [
            {
                "replica": infeasible.gang.gang_id,
                "why": infeasible.why,
                "nodes": {
                    refusal.node_id: {"cause": refusal.cause.name.lower(), "reason": str(refusal)}
                    for refusal in infeasible.refusals
                },
            }
            for infeasible in answer.infeasible
        ],
    }
    if difference is not None:
        result["change"] = {
            "kept": list(difference.kept),
            "moved": list(difference.moved),
            "added": list(difference.added),
            "removed": list(difference.removed),
            "lost": list(difference.lost),
        }
    return result
