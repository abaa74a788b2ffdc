"""The output of ``tierplane plan``, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from controlplane.cli.console import stdout
from controlplane.cli.fitting_table import FittingTable
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape, Placement, PlacementPlan
from controlplane.core.placement.topology import Node
from controlplane.core.placement.what_if import ClusterChange
from controlplane.planning.tier_gangs import TierGang
from controlplane.ray_cluster.actor_options import accelerator_types, actor_options

_GIB = 1024**3
_SHOWN_REFUSALS = 20


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A plan with the tiers and the nodes that it was made for."""

    tiers: tuple[TierGang, ...]
    plan: PlacementPlan
    nodes: tuple[Node, ...]
    change: ClusterChange | None = None
    """The difference from the running replicas, or from the plan before ``--what-if``."""
    replica_of: Mapping[str, str] = field(default_factory=dict)
    """Gang id → endpoint id, for replicas that are running."""
    notes: tuple[str, ...] = ()
    """Remarks on the cluster."""

    @property
    def complete(self) -> bool:
        """Whether every replica could be placed."""
        return self.plan.complete and not any(map(_fits_no_gpu, self.tiers))


def _fits_no_gpu(tier: TierGang) -> bool:
    return tier.shape is None and bool(tier.unfit) and tier.tier.replicas > 0


def show(result: PlanResult) -> None:
    """Print the result as text."""
    console = stdout()
    if result.change is not None:
        console.print(_difference_text(result.change))
    console.print(_tier_table(result))
    console.print(_placement_table(result))
    console.print("Serve options")
    for tier_gang in result.tiers:
        if tier_gang.shape is not None:
            options = json.dumps(serve_options(tier_gang, result.nodes))
            console.print(f"  {tier_gang.tier.name}: {options}", soft_wrap=True)
    if any(placement.gpu_uuids for placement in result.plan.placements):
        console.print("Visible devices")
    for placement in result.plan.placements:
        for node_id, devices in _by_node(result, placement).items():
            if devices:
                text = f"  {placement.gang.gang_id} on {node_id}: CUDA_VISIBLE_DEVICES={devices}"
                console.print(text, soft_wrap=True)
    for note in result.notes:
        console.print(note)
    for tier_gang in result.tiers:
        for note in tier_gang.notes:
            console.print(f"{tier_gang.tier.name}: {note}")
        for model, why in tier_gang.unfit:
            console.print(f"{tier_gang.tier.name}: does not fit {model}: {why}")
    for infeasible in result.plan.infeasible:
        console.print(f"[red]{infeasible.gang.gang_id} can't be placed[/red]: {infeasible.why}")
    for infeasible in result.plan.infeasible[:1]:
        for refusal in infeasible.refusals[:_SHOWN_REFUSALS]:
            console.print(f"  {refusal}")
        if len(infeasible.refusals) > _SHOWN_REFUSALS:
            console.print(f"  and {len(infeasible.refusals) - _SHOWN_REFUSALS} more nodes: see --json")


def _difference_text(difference: ClusterChange) -> str:
    parts = [
        f"{name}: {', '.join(gangs)}"
        for name, gangs in (
            ("unchanged", difference.unchanged),
            ("moved", difference.moved),
            ("added", difference.added),
            ("removed", difference.removed),
            ("[red]lost[/red]", difference.lost),
        )
        if gangs
    ]
    return "\n".join(parts) + "\n"


def _tier_table(result: PlanResult) -> FittingTable:
    table = FittingTable(
        *("tier", "model", "replicas", "placed", "per replica", "at least per GPU"),
        right=("replicas", "placed", "at least per GPU"),
        leave=("model",),
    )
    for tier_gang in result.tiers:
        placed = sum(p.gang.tier == tier_gang.tier.name for p in result.plan.placements)
        table.add_row(
            tier_gang.tier.name,
            tier_gang.tier.model_id,
            str(tier_gang.tier.replicas),
            str(placed) if tier_gang.shape else "-",
            _takes(tier_gang.shape) if tier_gang.shape else "-",
            f"{tier_gang.gpu_bytes / _GIB:.1f} GiB" if tier_gang.gpu_bytes else "-",
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
    return ", ".join(parts) or "no counted resource"


def _placement_table(result: PlanResult) -> FittingTable:
    table = FittingTable("replica", "node", "GPUs", "reason")
    for placement in result.plan.placements:
        endpoint = result.replica_of.get(placement.gang.gang_id, "") if placement.stays else ""
        table.add_row(
            placement.gang.gang_id,
            ", ".join(placement.node_ids),
            _devices(result, placement, " | "),
            f"{placement.why} ({endpoint})" if endpoint else placement.why,
        )
    return table


def _devices(result: PlanResult, placement: Placement, between: str = ",") -> str:
    """The indices of a replica's GPUs, stage by stage: values for ``CUDA_VISIBLE_DEVICES``."""
    index = {gpu.uuid: gpu.index for node in result.nodes for gpu in node.gpus}
    return between.join(
        ",".join(str(index.get(uuid, uuid)) for uuid in stage.gpu_uuids) for stage in placement.stages
    )


def _by_node(result: PlanResult, placement: Placement) -> dict[str, str]:
    """Node id → value for ``CUDA_VISIBLE_DEVICES``."""
    index = {gpu.uuid: gpu.index for node in result.nodes for gpu in node.gpus}
    found: dict[str, list[str]] = {}
    for stage in placement.stages:
        found.setdefault(stage.node_id, []).extend(str(index.get(uuid, uuid)) for uuid in stage.gpu_uuids)
    return {node_id: ",".join(values) for node_id, values in found.items()}


def serve_options(tier_gang: TierGang, nodes: Sequence[Node]) -> dict[str, Any]:
    """The resources that the tier's Serve deployment requests from Ray, and those that its engine requests
    itself."""
    tier = tier_gang.tier
    kinds = accelerator_types(gpu.model for node in nodes for gpu in node.gpus)
    options: dict[str, Any] = {
        "num_replicas": tier.replicas,
        "ray_actor_options": actor_options(tier, kinds),
    }
    if tier.pipeline_across_nodes:
        options["engine_placement_group"] = {"bundles": [{"GPU": 1}] * tier.world_size, "strategy": "PACK"}
    return options


def to_json(result: PlanResult) -> dict[str, Any]:
    """The result as JSON."""
    output: dict[str, Any] = {
        "complete": result.complete,
        "nodes": [
            {"node": n.node_id, "type": n.node_type, "gpus": len(n.gpus), "unavailable": n.unavailable}
            for n in result.nodes
        ],
        "tiers": [_tier_json(tier_gang, result.nodes) for tier_gang in result.tiers],
        "placements": [_replica_json(result, placement) for placement in result.plan.placements],
        "infeasible": [
            {
                "replica": infeasible.gang.gang_id,
                "why": infeasible.why,
                "nodes": {
                    refusal.node_id: {"cause": refusal.cause.name.lower(), "reason": str(refusal)}
                    for refusal in infeasible.refusals
                },
            }
            for infeasible in result.plan.infeasible
        ],
        "notes": list(result.notes),
    }
    if result.change is not None:
        output["change"] = {
            "kept": list(result.change.unchanged),
            "moved": list(result.change.moved),
            "added": list(result.change.added),
            "removed": list(result.change.removed),
            "lost": list(result.change.lost),
        }
    return output


def _tier_json(tier_gang: TierGang, nodes: Sequence[Node]) -> dict[str, Any]:
    return {
        "tier": tier_gang.tier.name,
        "model": tier_gang.tier.model,
        "replicas": tier_gang.tier.replicas,
        "gpu_bytes": tier_gang.gpu_bytes,
        "host_bytes": tier_gang.shape.memory_bytes * tier_gang.shape.stages if tier_gang.shape else 0,
        "serve_options": serve_options(tier_gang, nodes) if tier_gang.shape else None,
        "unfit": [{"gpu": model, "why": why} for model, why in tier_gang.unfit],
        "notes": list(tier_gang.notes),
    }


def _replica_json(result: PlanResult, placement: Placement) -> dict[str, Any]:
    return {
        "replica": placement.gang.gang_id,
        "tier": placement.gang.tier,
        "runs": placement.stays,
        "endpoint": result.replica_of.get(placement.gang.gang_id, "") if placement.stays else "",
        "nodes": list(placement.node_ids),
        "stages": [{"node": stage.node_id, "gpus": list(stage.gpu_uuids)} for stage in placement.stages],
        "visible_devices": _by_node(result, placement),
        "distance": placement.distance.name.lower(),
        "stranded_gpus": round(placement.stranded_milli / WHOLE_MILLI, 3),
        "why": placement.why,
    }
