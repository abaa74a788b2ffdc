"""Creates the specification of each tier for the controller: scaling settings, the assumed speed of its
engines and the assumed mean request. The controller later replaces the assumptions by measurements
(:mod:`controlplane.core.autoscaling.capacity`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from controlplane.config import PlaneConfig, TierConfig
from controlplane.config.scaling import DEFAULT_MAX, ScalingConfig
from controlplane.core.autoscaling.capacity import EngineSpeed, linear_speed
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.cluster.tier_spec import ScalingPlan, TierSpec
from controlplane.core.domain.request import RequestShape
from controlplane.core.recommendations.rules import latency_limit_ms
from controlplane.core.sizing.roofline import roofline
from controlplane.engines.simulated.engine import settings_of
from controlplane.errors import TierplaneError
from controlplane.models.catalog import gpu_named, gpu_table
from controlplane.models.model_config import load_model
from controlplane.planning.tier_memory import tier_settings

DEFAULT_REQUEST: Final = RequestShape(500.0, 200.0)
"""The mean request of a tier without ``expected``."""
FIRST_COLD_START_S: Final = 60.0
"""Assumed until a cold start has been measured, unless the configuration sets one."""
EXPECTED_START_S: Final = {"simulated": 5.0, "endpoint": 5.0, "llamacpp": 30.0, "vllm": 120.0}
"""How long an engine of each kind usually loads when the plane is started, without a download."""
DEFAULT_SPEED: Final = EngineSpeed(0.03, 0.001, 0.0005)
"""Assumed if nothing is known about an engine: 30 ms per token, 2,000 prompt tokens per second."""


def expected_request(tier: TierConfig) -> RequestShape:
    """The mean request that the configuration expects."""
    if tier.expected is None:
        return DEFAULT_REQUEST
    return RequestShape(float(tier.expected.input_tokens), float(tier.expected.output_tokens))


def plain_speed(itl_s: float, batch_slowdown: float) -> EngineSpeed:
    """The speed of an engine whose step takes ``itl_s`` for one sequence, and ``batch_slowdown`` times
    ``itl_s`` more for each further sequence."""
    step_s = max(itl_s, 1e-6)
    return EngineSpeed(step_s, max(step_s * batch_slowdown, step_s * 1e-3), 1e-6)


def gpu_priors(tier: TierConfig, request: RequestShape) -> tuple[tuple[str, EngineSpeed], ...]:
    """(GPU model, roofline speed) of a ``vllm`` tier for each GPU model on which it may run: those of
    ``gpu_models`` in their order, or else all in the table. Empty if the model's configuration can't be
    read."""
    if tier.engine != "vllm" or tier.device != "gpu":
        return ()
    found = []
    try:
        spec = load_model(tier.model).spec
        settings = tier_settings(tier)
        for gpu in [gpu_named(name) for name in tier.gpu_models] or gpu_table():
            line = roofline(spec, settings, gpu)
            speed = linear_speed(line.step_s, line.prefill_s, request, tier.concurrency_limit)
            found.append((gpu.name, speed))
    except (TierplaneError, ValueError, OSError):
        return ()  # the start of the engine reports the problem
    return tuple(found)


def prior_speed(tier: TierConfig, by_gpu: Sequence[tuple[str, EngineSpeed]]) -> EngineSpeed:
    """The speed of the tier's engines that is assumed until the controller knows the GPUs of the cluster:
    that of the timing model for engine ``simulated``, that of the first of ``gpu_models`` (in ``by_gpu``), or
    a default."""
    if tier.engine == "simulated":
        settings = settings_of(tier)
        return plain_speed(settings.itl_ms / 1000, settings.batch_slowdown)
    return by_gpu[0][1] if by_gpu and tier.gpu_models else DEFAULT_SPEED


def scaling_plan(tier: TierConfig, tick_s: float) -> ScalingPlan:
    """The scaling of a tier. Blocks: it reads the model's configuration."""
    request = expected_request(tier)
    scaling = tier.scaling or ScalingConfig(
        min_replicas=min(1, tier.replicas), max_replicas=max(tier.replicas, DEFAULT_MAX)
    )
    by_gpu = gpu_priors(tier, request)
    rule = ScalingRule(
        tier=tier.name,
        prior=prior_speed(tier, by_gpu),
        mean_request=request,
        gpus_per_replica=tier.engine_gpus,
        priority=scaling.priority,
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        step_up=scaling.step_up,
        step_down=scaling.step_down,
        cool_down_up_s=scaling.cool_down_up_s,
        cool_down_down_s=scaling.cool_down_down_s,
        hold_s=scaling.hold_s,
        cold_start_s=scaling.cold_start_s or FIRST_COLD_START_S,
        idle_to_zero_s=scaling.idle_to_zero_s,
        tick_s=tick_s,
        sequences=float(tier.concurrency_limit),
        slo=tier.slo.slo(),
        schedules=tuple(item.schedule() for item in scaling.schedules),
    )
    return ScalingPlan(
        rule,
        autoscaled=tier.scaling is not None,
        ceiling=tier.ceiling,
        cold_start_fixed=scaling.cold_start_s is not None,
        tensor_parallel=tier.tensor_parallel_size,
        latency_limit_ms=latency_limit_ms(None if tier.configured_slo is None else tier.configured_slo.slo()),
        gpu_priors=by_gpu,
    )


def tier_specs(config: PlaneConfig) -> tuple[TierSpec, ...]:
    """The specifications of the configuration's tiers. Blocks: it reads the models' configurations."""
    tick_s = config.controller.scaling.tick_s
    return tuple(
        TierSpec(
            tier.name,
            tier.model_id,
            tier.engine,
            tier.replicas,
            tier.concurrency_limit,
            tier.slo.attainment,
            # An external endpoint has no replicas to scale.
            None if tier.engine == "endpoint" else scaling_plan(tier, tick_s),
            expected_start_s=EXPECTED_START_S.get(tier.engine, FIRST_COLD_START_S),
            start_limit_s=tier.startup_timeout_s,
        )
        for tier in config.tiers
    )
