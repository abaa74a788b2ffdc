"""What ``tierplane plan`` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from controlplane.cli.console import stdout
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape, Placement, PlacementPlan
from controlplane.core.placement.topology import Node
from controlplane.core.placement.what_if import ClusterChange
from controlplane.planning.tier_gangs import TierGang
from controlplane.ray_cluster.actor_options import accelerator_types, actor_options

_GIB = 1024**3
_SHOWN_REFUSALS = 20


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A plan, and what it is about."""

    demands: tuple[TierGang, ...]
    plan: PlacementPlan
    nodes: tuple[Node, ...]
    change: ClusterChange | None = None
    """Against what runs, or against the plan before ``--what-if``."""
    replica_of: Mapping[str, str] = field(default_factory=dict)
    """Endpoint ids of replicas that run."""
    notes: tuple[str, ...] = ()
    """About the cluster."""

    @property
    def complete(self) -> bool:
        """Whether every replica has its place."""
        return self.plan.complete and not any(map(_hopeless, self.demands))


def _hopeless(demand: TierGang) -> bool:
    return demand.shape is None and bool(demand.unfit) and demand.tier.replicas > 0


def show(answer: PlanResult) -> None:
    """For people."""
    console = stdout()
    if answer.change is not None:
        console.print(_difference_text(answer.change))
    console.print(_tier_table(answer))
    console.print(_placement_table(answer))
    console.print("Serve options")
    for demand in answer.demands:
        if demand.shape is not None:
            options = json.dumps(serve_options(demand, answer.nodes))
            console.print(f"  {demand.tier.name}: {options}", soft_wrap=True)
    if any(placement.gpu_uuids for placement in answer.plan.placements):
        console.print("Visible devices")
    for placement in answer.plan.placements:
        for node_id, devices in _by_node(answer, placement).items():
            if devices:
                text = f"  {placement.gang.gang_id} on {node_id}: CUDA_VISIBLE_DEVICES={devices}"
                console.print(text, soft_wrap=True)
    for note in answer.notes:
        console.print(note)
    for demand in answer.demands:
        for note in demand.notes:
            console.print(f"{demand.tier.name}: {note}")
        for model, why in demand.unfit:
            console.print(f"{demand.tier.name}: does not fit {model}: {why}")
    for infeasible in answer.plan.infeasible:
        console.print(f"[red]{infeasible.gang.gang_id} has no place[/red]: {infeasible.why}")
    for infeasible in answer.plan.infeasible[:1]:
        for refusal in infeasible.refusals[:_SHOWN_REFUSALS]:
            console.print(f"  {refusal}")
        if len(infeasible.refusals) > _SHOWN_REFUSALS:
            console.print(f"  and {len(infeasible.refusals) - _SHOWN_REFUSALS} more nodes: see --json")


def _difference_text(difference: ClusterChange) -> str:
    parts = [
        f"{name}: {', '.join(gangs)}"
        for name, gangs in (
            ("stay", difference.unchanged),
            ("move", difference.moved),
            ("come", difference.added),
            ("go", difference.removed),
            ("[red]lost[/red]", difference.lost),
        )
        if gangs
    ]
    return "\n".join(parts) + "\n"


def _tier_table(answer: PlanResult) -> Table:
    table = Table("tier", "model", "replicas", "placed", "a replica takes", "at least per GPU")
    for demand in answer.demands:
        placed = sum(p.gang.tier == demand.tier.name for p in answer.plan.placements)
        table.add_row(
            demand.tier.name,
            demand.tier.model_id,
            str(demand.tier.replicas),
            str(placed) if demand.shape else "-",
            _takes(demand.shape) if demand.shape else "-",
            f"{demand.gpu_bytes / _GIB:.1f} GiB" if demand.gpu_bytes else "-",
        )
    return table


def _takes(shape: GangShape) -> str:
    parts = []
    if shape.shared:
        parts.append(f"{shape.milli_gpu / WHOLE_MILLI:g} GPU")
    elif shape.gpus:
        stages = f" x {shape.stages} stages" if shape.stages > 1 else ""
        parts.append(f"{shape.gpus} GPU{'s' * (shape.gpus > 1)}{stages}")
    if shape.cpu_milli:
        parts.append(f"{shape.cpu_milli * shape.stages / 1000:g} CPUs")
    if shape.memory_bytes:
        parts.append(f"{shape.memory_bytes * shape.stages / _GIB:.1f} GiB of memory")
    return ", ".join(parts) or "nothing that is counted"


def _placement_table(answer: PlanResult) -> Table:
    table = Table("replica", "node", "GPUs", "why")
    for placement in answer.plan.placements:
        endpoint = answer.replica_of.get(placement.gang.gang_id, "") if placement.stays else ""
        table.add_row(
            placement.gang.gang_id,
            ", ".join(placement.node_ids),
            _devices(answer, placement, " | "),
            f"{placement.why} ({endpoint})" if endpoint else placement.why,
        )
    return table


def _devices(answer: PlanResult, placement: Placement, between: str = ",") -> str:
    """Indices of its GPUs, stage by stage: values for ``CUDA_VISIBLE_DEVICES``."""
    index = {gpu.uuid: gpu.index for node in answer.nodes for gpu in node.gpus}
    return between.join(
        ",".join(str(index.get(uuid, uuid)) for uuid in stage.gpu_uuids) for stage in placement.stages
    )


def _by_node(answer: PlanResult, placement: Placement) -> dict[str, str]:
    """Values for ``CUDA_VISIBLE_DEVICES`` on each node."""
    index = {gpu.uuid: gpu.index for node in answer.nodes for gpu in node.gpus}
    found: dict[str, list[str]] = {}
    for stage in placement.stages:
        found.setdefault(stage.node_id, []).extend(str(index.get(uuid, uuid)) for uuid in stage.gpu_uuids)
    return {node_id: ",".join(values) for node_id, values in found.items()}


def serve_options(demand: TierGang, nodes: Sequence[Node]) -> dict[str, Any]:
    """What the tier's Serve deployment asks Ray for, and what its engine asks for itself."""
    tier = demand.tier
    kinds = accelerator_types(gpu.model for node in nodes for gpu in node.gpus)
    options: dict[str, Any] = {
        "num_replicas": tier.replicas,
        "ray_actor_options": actor_options(tier, kinds),
    }
    if tier.pipeline_across_nodes:
        options["engine_placement_group"] = {"bundles": [{"GPU": 1}] * tier.world_size, "strategy": "PACK"}
    return options


def to_json(answer: PlanResult) -> dict[str, Any]:
    """For programs."""
    result: dict[str, Any] = {
        "complete": answer.complete,
        "nodes": [
            {"node": n.node_id, "type": n.node_type, "gpus": len(n.gpus), "unavailable": n.unavailable}
            for n in answer.nodes
        ],
        "tiers": [_tier_json(demand, answer.nodes) for demand in answer.demands],
        "placements": [_replica_json(answer, placement) for placement in answer.plan.placements],
        "infeasible": [
            {
                "replica": infeasible.gang.gang_id,
                "why": infeasible.why,
                "nodes": {
                    refusal.node_id: {"cause": refusal.cause.name.lower(), "reason": str(refusal)}
                    for refusal in infeasible.refusals
                },
            }
            for infeasible in answer.plan.infeasible
        ],
        "notes": list(answer.notes),
    }
    if answer.change is not None:
        result["change"] = {
            "kept": list(answer.change.unchanged),
            "moved": list(answer.change.moved),
            "added": list(answer.change.added),
            "removed": list(answer.change.removed),
            "lost": list(answer.change.lost),
        }
    return result


def _tier_json(demand: TierGang, nodes: Sequence[Node]) -> dict[str, Any]:
    return {
        "tier": demand.tier.name,
        "model": demand.tier.model,
        "replicas": demand.tier.replicas,
        "gpu_bytes": demand.gpu_bytes,
        "host_bytes": demand.shape.memory_bytes * demand.shape.stages if demand.shape else 0,
        "serve_options": serve_options(demand, nodes) if demand.shape else None,
        "unfit": [{"gpu": model, "why": why} for model, why in demand.unfit],
        "notes": list(demand.notes),
    }


def _replica_json(answer: PlanResult, placement: Placement) -> dict[str, Any]:
    return {
        "replica": placement.gang.gang_id,
        "tier": placement.gang.tier,
        "runs": placement.stays,
        "endpoint": answer.replica_of.get(placement.gang.gang_id, "") if placement.stays else "",
        "nodes": list(placement.node_ids),
        "stages": [{"node": stage.node_id, "gpus": list(stage.gpu_uuids)} for stage in placement.stages],
        "visible_devices": _by_node(answer, placement),
        "distance": placement.distance.name.lower(),
        "stranded_gpus": round(placement.stranded_milli / WHOLE_MILLI, 3),
        "why": placement.why,
    }
