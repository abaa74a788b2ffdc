"""The speed of a tier's engines, and the machines on which its replicas may run.

Speeds come from the roofline of the tier's model on a GPU, from the timing model of engine ``simulated``, or,
for engines on CPUs and external ones, from two settings of :class:`~controlplane.simulation.options.Options`.
On a cluster with several GPU models a replica has the speed of its own GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from controlplane.config import TierConfig
from controlplane.core.autoscaling.capacity import EngineSpeed, linear_speed
from controlplane.core.domain.request import RequestShape
from controlplane.core.placement.gangs import Gang, GangShape, Infeasible
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.topology import Node
from controlplane.core.sizing.gpu_memory import plan_memory
from controlplane.core.sizing.gpu_models import find_gpu
from controlplane.core.sizing.roofline import roofline
from controlplane.engines.simulated.engine import settings_of
from controlplane.errors import SetupError
from controlplane.models.catalog import gpu_named, gpu_table
from controlplane.models.model_config import load_model
from controlplane.planning.tier_gangs import TierGang
from controlplane.planning.tier_memory import tier_settings
from controlplane.planning.tier_specs import plain_speed
from controlplane.simulation.engine import RooflineTiming, SimulatedTiming
from controlplane.simulation.fleet import EngineModel
from controlplane.simulation.options import Options


@dataclass(frozen=True, slots=True)
class TierEngines:
    """The engines of a tier's replicas, and the resources of a replica."""

    engine: EngineModel
    prior: EngineSpeed
    """The speed that the scaler assumes at the beginning."""
    shape: GangShape | None = None
    """None means that there is always room."""
    engines: Mapping[str, EngineModel] = field(default_factory=dict)
    """GPU model → engine, if the tier may run on several GPU models."""


def anywhere(tier: TierConfig, options: Options, request: RequestShape) -> TierEngines:
    """The engines of a tier without nodes. SetupError if the tier's model doesn't fit the GPU, or no GPU
    model is given."""
    if tier.engine == "vllm" and (options.gpu or tier.device == "gpu"):
        if not options.gpu:
            raise SetupError(
                f"tier '{tier.name}' runs on GPUs: name the GPU model, such as --gpu L4 "
                "(`tierplane fit --gpus` lists them), or give the machines with --cluster FILE"
            )
        return _on_gpu(tier, options.gpu, options, request)
    return _plain(tier, options)


def _plain(tier: TierConfig, options: Options) -> TierEngines:
    """The engines of a tier whose speed doesn't depend on a GPU."""
    if tier.engine == "simulated":
        settings = settings_of(tier)
        timing = SimulatedTiming(
            ttft_s=settings.ttft_ms / 1000,
            itl_s=settings.itl_ms / 1000,
            batch_slowdown=settings.batch_slowdown,
            prefill_tokens_per_s=settings.prefill_tokens_per_s,
        )
        engine = EngineModel(timing, float(settings.kv_cache_tokens), settings.max_running)
    else:
        timing = SimulatedTiming(0.0, options.itl_s, 0.0, options.prefill_tokens_per_s, kv_bound=True)
        engine = EngineModel(timing, 1e9, 10_000)
    return TierEngines(engine, plain_speed(timing.itl_s, timing.batch_slowdown))


def on_nodes(
    tier_gang: TierGang, nodes: Sequence[Node], options: Options, request: RequestShape
) -> TierEngines:
    """The engines of a tier whose replicas run on ``nodes``. SetupError if a replica doesn't fit even the
    empty nodes, or its speed is unknown."""
    tier, shape = tier_gang.tier, tier_gang.shape
    if tier.engine == "endpoint":
        return _plain(tier, options)
    if shape is None:
        reasons = "; ".join(f"{where}: {why}" for where, why in tier_gang.unfit)
        raise SetupError(f"tier '{tier.name}' fits nowhere on this cluster: {reasons}")
    result = Planner(PlacedCluster(tuple(nodes))).place(Gang(tier.name, shape))
    if isinstance(result, Infeasible):
        raise SetupError(
            f"tier '{tier.name}' has no place on this cluster, not even when it is empty: {result.why}; "
            "`tierplane plan --cluster` shows the reason for each node"
        )
    if tier.engine != "vllm" or not tier.on_gpus:
        return replace(_plain(tier, options), shape=shape)
    models = _gpu_models(tier, shape, nodes)
    unknown = [name for name in models if find_gpu(gpu_table(), name) is None]
    if unknown:
        raise SetupError(
            f"tier '{tier.name}' may run on GPUs whose speed is not known: {', '.join(unknown)}. Name others "
            "in its gpu_models; `tierplane fit --gpus` lists the known ones"
        )
    by_model = {name: _on_gpu(tier, name, options, request) for name in models}
    first = by_model[models[0]]
    return replace(first, shape=shape, engines={name: found.engine for name, found in by_model.items()})


def _gpu_models(tier: TierConfig, shape: GangShape, nodes: Sequence[Node]) -> list[str]:
    """GPU models on which replicas may run; the scaler assumes the speed of the first."""
    counts = Counter(
        gpu.model
        for node in nodes
        for gpu in node.gpus
        if not (node.unavailable or gpu.unavailable)
        and shape.accepts(gpu.model)
        and (not gpu.memory_bytes or gpu.memory_bytes >= shape.gpu_memory_bytes)
    )
    preferred = list(tier.gpu_models)[:1]
    return sorted(counts, key=lambda name: (name not in preferred, -counts[name], name))


def _on_gpu(tier: TierConfig, gpu_model: str, options: Options, request: RequestShape) -> TierEngines:
    gpu = gpu_named(gpu_model)
    loaded = load_model(tier.model)
    try:
        settings = tier_settings(tier.model_copy(update={"device": "gpu"}))
        line = roofline(loaded.spec, settings, gpu)
    except ValueError as error:
        raise SetupError(f"tier '{tier.name}': {error}") from error
    plan = plan_memory(loaded.spec, settings, gpu, loaded.extra)
    if plan.kv_tokens < request.input_tokens:
        raise SetupError(
            f"tier '{tier.name}': {tier.model} leaves room for {plan.kv_tokens} tokens on {gpu.name}, and a "
            f"prompt of this trace has {request.input_tokens:.0f}: take a larger GPU (--gpu, or the tier's "
            "gpu_models), or see `tierplane fit`"
        )
    prior = linear_speed(line.step_s, line.prefill_s, request, tier.concurrency_limit)
    sequences = settings.batch(loaded.spec, gpu)[1]
    return TierEngines(
        EngineModel(RooflineTiming(line, options.engine_ratio), float(plan.kv_tokens), sequences), prior
    )
