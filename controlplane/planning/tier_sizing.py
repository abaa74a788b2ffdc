"""Turns a configuration and a cluster file into the input of fleet sizing, and its result into settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.domain.request import RequestShape
from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import PlacementPlan
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.sizing.fleet_sizing import FleetGpu, ServingOption, TierChoice, TierNeed
from controlplane.core.sizing.gpu_models import GpuModel, find_gpu
from controlplane.core.sizing.quantization import preset
from controlplane.core.sizing.roofline import LatencyTargets
from controlplane.errors import SetupError
from controlplane.models.catalog import gpu_table
from controlplane.models.model_config import load_model
from controlplane.planning.cluster_file import ClusterFile
from controlplane.planning.tier_gangs import tier_gangs
from controlplane.planning.tier_memory import tier_settings


@dataclass(frozen=True, slots=True)
class GpuFleet:
    """GPUs that may be chosen."""

    gpus: tuple[FleetGpu, ...]
    priced: bool
    """Whether the cluster file gives the cost of machines."""
    unknown: tuple[str, ...] = ()
    """GPU models whose speed is unknown because they are not in the table."""


def fleet_of(cluster: ClusterFile) -> GpuFleet:
    """The usable GPUs of a cluster by model, each at the highest price of a machine with that model."""
    counts: dict[str, int] = {}
    for node in cluster.to_nodes():
        for gpu in node.gpus:
            if not (node.unavailable or gpu.unavailable):
                counts[gpu.model] = counts.get(gpu.model, 0) + 1
    kinds = [kind for kind in cluster.node_types if kind.gpus and counts.get(kind.model)]
    priced = any(kind.cost_per_hour for kind in kinds)
    unpriced = [kind.name for kind in kinds if not kind.cost_per_hour]
    if priced and unpriced:
        raise SetupError(f"node types {', '.join(unpriced)} have no cost_per_hour, others do: set it for all")
    found = []
    for model, count in sorted(counts.items()):
        of_model = [kind for kind in kinds if kind.model == model]
        known: GpuModel | None = find_gpu(gpu_table(), model)
        if known is not None:
            cost = max((kind.cost_per_hour or kind.gpus) / kind.gpus for kind in of_model)
            found.append(FleetGpu(known, count, cost, max(kind.gpus for kind in of_model)))
    unknown = tuple(model for model in sorted(counts) if find_gpu(gpu_table(), model) is None)
    return GpuFleet(tuple(found), priced, unknown)


def needs_of(config: PlaneConfig) -> tuple[TierNeed, ...]:
    """The needs of the tiers that have ``expected``. SetupError if a model or an argument can't be read."""
    return tuple(_need(tier) for tier in config.tiers if tier.expected and tier.engine == "vllm")


def _need(tier: TierConfig) -> TierNeed:
    expected = tier.expected
    assert expected is not None
    try:
        settings = tier_settings(tier.model_copy(update={"device": "gpu"}))
    except ValueError as error:
        raise SetupError(f"tier '{tier.name}': {error}") from error
    return TierNeed(
        tier.name,
        load_model(tier.model).spec,
        RequestShape(expected.input_tokens, expected.output_tokens),
        expected.requests_per_s,
        LatencyTargets(expected.ttft_s * 1000, expected.itl_s * 1000),
        tuple(expected.quantizations),
        settings,
        pipeline=expected.pipeline,
    )


def settings_of(choice: TierChoice) -> dict[str, object]:
    """The settings of the tier that implement the choice."""
    option = choice.option
    found: dict[str, object] = {
        "replicas": option.replicas,
        "gpu_models": [option.gpu],
        "tensor_parallel_size": option.tp,
    }
    if option.pp > 1:
        found["pipeline_parallel_size"] = option.pp
    if option.quantization != "none":
        found["engine_args"] = {"quantization": option.quantization}
    return found


def checkpoint_note(choice: TierChoice) -> str:
    """A note if the choice needs a quantised checkpoint, because engines can create only few formats while
    loading; otherwise empty."""
    chosen = preset(choice.option.quantization)
    if not chosen.quantized or chosen.online:
        return ""
    return f"needs a checkpoint of the model in {choice.option.quantization}: name it as the tier's model"


def placed(config: PlaneConfig, choices: Sequence[TierChoice], cluster: ClusterFile) -> PlacementPlan:
    """The placement of the chosen replicas, together with the other tiers as configured."""
    chosen = {choice.tier: choice.option for choice in choices}
    tiers = [_with(tier, chosen[tier.name]) if tier.name in chosen else tier for tier in config.tiers]
    nodes = cluster.to_nodes()
    groups = tier_gangs(config.model_copy(update={"tiers": tiers}), nodes)
    return plan(PlacedCluster(nodes), [gang for group in groups for gang in group.gangs()])


def _with(tier: TierConfig, option: ServingOption) -> TierConfig:
    args = dict(tier.engine_args)
    if option.quantization != "none":
        args["quantization"] = option.quantization
    update = {
        "device": "gpu",
        "replicas": option.replicas,
        "gpu_models": [option.gpu],
        "gpu_share": 1.0,
        "tensor_parallel_size": option.tp,
        "pipeline_parallel_size": option.pp,
        "engine_args": args,
    }
    return tier.model_copy(update=update)
