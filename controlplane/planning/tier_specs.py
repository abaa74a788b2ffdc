"""What the controller is told of each tier, its scaling included: what its engines are believed to do before
they were watched, and what its requests are like. It learns both from what runs
(:mod:`controlplane.core.autoscaling.capacity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from controlplane.config import PlaneConfig, TierConfig
from controlplane.config.scaling import DEFAULT_MAX, ScalingConfig
from controlplane.core.autoscaling.capacity import EngineSpeed, RequestShape, speed_of
from controlplane.core.autoscaling.policy import ScalingSettings
from controlplane.core.autoscaling.round import TierRule
from controlplane.core.cluster.tier_spec import ScalingPlan, TierSpec
from controlplane.core.recommendations.rules import latency_limit_ms
from controlplane.core.sizing.engine_args import parse_settings
from controlplane.core.sizing.roofline import roofline
from controlplane.engines.simulated.engine import settings_of
from controlplane.errors import TierplaneError
from controlplane.models.catalog import gpu_named, gpu_table
from controlplane.models.model_config import load_model

USUAL: Final = RequestShape(500.0, 200.0)
"""A mean request where the configuration expects nothing."""
FIRST_COLD_START_S: Final = 60.0
GUESS: Final = EngineSpeed(0.03, 0.001, 0.0005)
"""Of an engine of which nothing is known: 30 ms a token, 2,000 prompt tokens a second."""


def usual_work(tier: TierConfig) -> RequestShape:
    """The mean request that the configuration expects."""
    if tier.expected is None:
        return USUAL
    return RequestShape(float(tier.expected.input_tokens), float(tier.expected.output_tokens))


def plain_speed(itl_s: float, batch_slowdown: float) -> EngineSpeed:
    """Of an engine whose step takes ``itl_s`` and the share ``batch_slowdown`` more with each sequence."""
    step_s = max(itl_s, 1e-6)
    return EngineSpeed(step_s, max(step_s * batch_slowdown, step_s * 1e-3), 1e-6)


def gpu_priors(tier: TierConfig, work: RequestShape) -> tuple[tuple[str, EngineSpeed], ...]:
    """The roofline's of a ``vllm`` tier, for each GPU model that it may run on: those of ``gpu_models`` in
    their order, else all of the table. Nothing where the model's configuration can't be read."""
    if tier.engine != "vllm" or tier.device != "gpu":
        return ()
    args: dict[str, Any] = dict(tier.engine_args)
    found = []
    try:
        spec = load_model(tier.model).spec
        settings = parse_settings(args, tp=tier.tensor_parallel_size, pp=tier.pipeline_parallel_size)
        for gpu in [gpu_named(name) for name in tier.gpu_models] or gpu_table():
            line = roofline(spec, settings, gpu)
            speed = speed_of(line, work.input_tokens, work.output_tokens, float(tier.concurrency_limit))
            found.append((gpu.name, speed))
    except (TierplaneError, ValueError, OSError):
        return ()  # what is wrong with it is said where the engine is started
    return tuple(found)


def prior_speed(tier: TierConfig, by_gpu: Sequence[tuple[str, EngineSpeed]]) -> EngineSpeed:
    """The timing model's of engine ``simulated``, the roofline's (``by_gpu``) of the first GPU model that the
    configuration names, or a guess: the controller knows better once it sees the GPUs that are there."""
    if tier.engine == "simulated":
        made = settings_of(tier)
        return plain_speed(made.itl_ms / 1000, made.batch_slowdown)
    return by_gpu[0][1] if by_gpu and tier.gpu_models else GUESS


def scaling_plan(tier: TierConfig, tick_s: float) -> ScalingPlan:
    """What the controller is told of a tier's scaling. Reads the model's configuration: not for an event
    loop."""
    work = usual_work(tier)
    asked = tier.scaling or ScalingConfig(
        min_replicas=min(1, tier.replicas), max_replicas=max(tier.replicas, DEFAULT_MAX)
    )
    settings = ScalingSettings(
        min_replicas=asked.min_replicas,
        max_replicas=asked.max_replicas,
        step_up=asked.step_up,
        step_down=asked.step_down,
        cool_down_up_s=asked.cool_down_up_s,
        cool_down_down_s=asked.cool_down_down_s,
        hold_s=asked.hold_s,
        cold_start_s=asked.cold_start_s or FIRST_COLD_START_S,
        idle_to_zero_s=asked.idle_to_zero_s,
        tick_s=tick_s,
        sequences=float(tier.concurrency_limit),
        slo=tier.slo.slo(),
        schedules=tuple(item.schedule() for item in asked.schedules),
    )
    by_gpu = gpu_priors(tier, work)
    rule = TierRule(
        tier.name,
        settings,
        prior_speed(tier, by_gpu),
        work,
        gpus_per_replica=tier.engine_gpus,
        priority=asked.priority,
    )
    return ScalingPlan(
        rule,
        follows=tier.scaling is not None,
        ceiling=tier.ceiling,
        cold_start_fixed=asked.cold_start_s is not None,
        tensor_parallel=tier.tensor_parallel_size,
        latency_limit_ms=latency_limit_ms(None if tier.given_slo is None else tier.given_slo.slo()),
        gpu_priors=by_gpu,
    )


def tier_specs(config: PlaneConfig) -> tuple[TierSpec, ...]:
    """What the controller needs to know of the configuration's tiers. Reads models' configurations:
    blocks."""
    tick_s = config.controller.scaling.tick_s
    return tuple(
        TierSpec(
            tier.name,
            tier.model_id,
            tier.engine,
            tier.replicas,
            tier.concurrency_limit,
            tier.slo.attainment,
            # What runs elsewhere has no replicas to add.
            None if tier.engine == "endpoint" else scaling_plan(tier, tick_s),
        )
        for tier in config.tiers
    )
