"""From a configuration file to a scenario: how fast its tiers' engines are, and what they are promised.

Speeds come from the roofline of the tier's model on a GPU, from the timing model of engine ``simulated``, or,
for engines on CPUs and elsewhere, from two figures of :class:`Options`, which are a guess until measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from controlplane.adapters.catalog import gpu_named
from controlplane.adapters.model_config import load_model
from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.admission import AdmissionSettings
from controlplane.core.autoscaling import ScalingSettings, Slo
from controlplane.core.capacity import EngineSpeed, Work, speed_of
from controlplane.core.engine_settings import parse_settings
from controlplane.core.fleet import FleetSettings
from controlplane.core.memory import plan_memory
from controlplane.core.roofline import roofline
from controlplane.engines.simulated import settings_of
from controlplane.errors import SetupError
from controlplane.gateway.app import tier_policy
from controlplane.simulation.engine import RooflineTiming, SimulatedTiming, Timing
from controlplane.simulation.fleet import ReplicaModel
from controlplane.simulation.simulator import Scenario, TierScenario
from controlplane.tier_specs import plain_speed, scaling_plan

MOST_REPLICAS: Final = 64
"""Of a tier without bounds."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration does not say."""

    gpu: str | None = None
    """The GPU model that ``vllm`` tiers run on."""
    engine_ratio: float = 0.8
    """Share of the roofline's speed that engines really reach; the scaler is told the roofline's."""
    cold_start_s: float = 60.0
    cold_start_jitter: float = 0.0
    mtbf_hours: float | None = None
    cost_per_gpu_hour: float = 0.0
    min_replicas: int | None = None
    """None: as the tier's ``scaling`` has it, or 1."""
    max_replicas: int | None = None
    """None: as the tier's ``scaling`` has it, or 64."""
    slo: Slo | None = None
    """None: each tier's own."""
    itl_s: float = 0.05
    """Time per token of an engine whose speed is not known."""
    prefill_tokens_per_s: float = 500.0
    """Of such an engine."""
    tick_s: float = 5.0
    """How often targets are worked out."""
    seed: int = 0


def build(plane: PlaneConfig, options: Options, work: Work) -> Scenario:
    """The scenario of a configuration; ``work`` is about what a request is like.

    SetupError names the tier whose model does not fit the GPU or whose speed can't be told.
    """
    queue = plane.gateway.queue
    return Scenario(
        tuple(_tier(tier, options, work) for tier in plane.tiers),
        plane.gateway.default_tier,
        AdmissionSettings(queue.capacity, queue.age_after_s, queue.aged_ratio),
        FleetSettings(reserved_ratio=queue.reserved_ratio),
        deadline_s=min(plane.gateway.request_timeout_s, queue.timeout_s),
        max_attempts=plane.gateway.retry.max_attempts,
        seed=options.seed,
    )


def _tier(tier: TierConfig, options: Options, work: Work) -> TierScenario:
    timing, kv_tokens, sequences, prior = _engine(tier, options, work)
    # What the gateway sends at once, and what the engine can hold of it.
    held = min(
        float(tier.concurrency_limit), kv_tokens / (work.input_tokens + work.output_tokens / 2), sequences
    )
    plan = scaling_plan(tier, ScalingSettings().tick_s)
    asked = plan.rule.settings if plan.follows else ScalingSettings(max_replicas=MOST_REPLICAS)
    scaling = replace(
        asked,
        min_replicas=asked.min_replicas if options.min_replicas is None else options.min_replicas,
        max_replicas=asked.max_replicas if options.max_replicas is None else options.max_replicas,
        cold_start_s=options.cold_start_s,
        tick_s=options.tick_s,
        sequences=max(1.0, held),
        slo=options.slo or tier.slo.slo(),
    )
    replica = ReplicaModel(
        timing,
        kv_tokens,
        sequences,
        tier.concurrency_limit,
        gpus=tier.gpus,
        cost_per_gpu_hour=options.cost_per_gpu_hour,
        cold_start_s=options.cold_start_s,
        cold_start_jitter=options.cold_start_jitter,
        mtbf_s=None if options.mtbf_hours is None else options.mtbf_hours * 3600,
    )
    replicas = min(max(tier.replicas, scaling.min_replicas), scaling.max_replicas)
    return TierScenario(tier_policy(tier), replica, scaling, prior, work, replicas)


def _engine(tier: TierConfig, options: Options, work: Work) -> tuple[Timing, float, int, EngineSpeed]:
    """Timing, KV tokens, sequences at once, and what the scaler is told beforehand."""
    if tier.engine == "simulated":
        made = settings_of(tier)
        timing = SimulatedTiming(
            made.ttft_ms / 1000, made.itl_ms / 1000, made.batch_slowdown, made.prefill_tokens_per_s
        )
        return timing, float(made.kv_cache_tokens), made.max_running, _plain_prior(timing)
    if tier.engine == "vllm" and (options.gpu or tier.device == "gpu"):
        return _on_gpu(tier, options, work)
    timing = SimulatedTiming(0.0, options.itl_s, 0.0, options.prefill_tokens_per_s)
    return timing, 1e9, 10_000, _plain_prior(timing)


def _plain_prior(timing: SimulatedTiming) -> EngineSpeed:
    return plain_speed(timing.itl_s, timing.batch_slowdown)


def _on_gpu(tier: TierConfig, options: Options, work: Work) -> tuple[Timing, float, int, EngineSpeed]:
    if not options.gpu:
        raise SetupError(
            f"tier '{tier.name}' runs on GPUs: say on which, as --gpu L4; `tierplane fit --gpus` lists them"
        )
    gpu = gpu_named(options.gpu)
    args: dict[str, Any] = dict(tier.engine_args)
    loaded = load_model(tier.model)
    try:
        settings = parse_settings(args, tp=tier.tensor_parallel_size, pp=tier.pipeline_parallel_size)
        line = roofline(loaded.spec, settings, gpu)
    except ValueError as error:
        raise SetupError(f"tier '{tier.name}': {error}") from error
    plan = plan_memory(loaded.spec, settings, gpu, loaded.extra)
    if plan.kv_tokens < work.input_tokens:
        raise SetupError(
            f"tier '{tier.name}': {tier.model} leaves room for {plan.kv_tokens} tokens on {gpu.name}, and a "
            f"prompt of this trace has {work.input_tokens:.0f}: take a larger --gpu, or see `tierplane fit`"
        )
    prior = speed_of(line, work.input_tokens, work.output_tokens, float(tier.concurrency_limit))
    sequences = settings.batch(loaded.spec, gpu)[1]
    return RooflineTiming(line, options.engine_ratio), float(plan.kv_tokens), sequences, prior
