"""What the controller is told of each tier, its scaling included: what its engines are believed to do before
they were watched, and what its requests are like. It learns both from what runs
(:mod:`controlplane.core.capacity`).
"""

from __future__ import annotations

from typing import Any, Final

from controlplane.adapters.catalog import gpu_named
from controlplane.adapters.model_config import load_model
from controlplane.config import PlaneConfig, TierConfig
from controlplane.config.scaling import DEFAULT_MAX, ScalingConfig
from controlplane.core.autoscaling import ScalingSettings
from controlplane.core.capacity import EngineSpeed, Work, speed_of
from controlplane.core.domain import TierSpec
from controlplane.core.engine_settings import parse_settings
from controlplane.core.roofline import roofline
from controlplane.core.scaling_plan import ScalingPlan
from controlplane.core.scaling_round import TierRule
from controlplane.engines.simulated import settings_of
from controlplane.errors import TierplaneError

USUAL: Final = Work(500.0, 200.0)
"""A mean request where the configuration expects nothing."""
FIRST_COLD_START_S: Final = 60.0
GUESS: Final = EngineSpeed(0.03, 0.001, 0.0005)
"""Of an engine of which nothing is known: 30 ms a token, 2,000 prompt tokens a second."""


def usual_work(tier: TierConfig) -> Work:
    """The mean request that the configuration expects."""
    if tier.expected is None:
        return USUAL
    return Work(float(tier.expected.input_tokens), float(tier.expected.output_tokens))


def plain_speed(itl_s: float, batch_slowdown: float) -> EngineSpeed:
    """Of an engine whose step takes ``itl_s`` and the share ``batch_slowdown`` more with each sequence."""
    step_s = max(itl_s, 1e-6)
    return EngineSpeed(step_s, max(step_s * batch_slowdown, step_s * 1e-3), 1e-6)


def prior_speed(tier: TierConfig, work: Work) -> EngineSpeed:
    """The timing model's of engine ``simulated``, the roofline's of a ``vllm`` tier whose GPU model is named,
    or a guess."""
    if tier.engine == "simulated":
        made = settings_of(tier)
        return plain_speed(made.itl_ms / 1000, made.batch_slowdown)
    if tier.engine == "vllm" and tier.device == "gpu" and tier.gpu_models:
        args: dict[str, Any] = dict(tier.engine_args)
        try:
            spec = load_model(tier.model).spec
            settings = parse_settings(args, tp=tier.tensor_parallel_size, pp=tier.pipeline_parallel_size)
            line = roofline(spec, settings, gpu_named(tier.gpu_models[0]))
        except (TierplaneError, ValueError, OSError):
            return GUESS  # what is wrong with it is said where the engine is started
        return speed_of(line, work.input_tokens, work.output_tokens, float(tier.concurrency_limit))
    return GUESS


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
    rule = TierRule(
        tier.name,
        settings,
        prior_speed(tier, work),
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
            # What runs elsewhere has no replicas to add.
            None if tier.engine == "endpoint" else scaling_plan(tier, tick_s),
        )
        for tier in config.tiers
    )
