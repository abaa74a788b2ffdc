"""Builds the scenario of a simulation from a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.admission.queue import AdmissionSettings
from controlplane.core.domain.request import RequestShape
from controlplane.core.placement.topology import Node
from controlplane.core.recommendations.rules import latency_limit_ms
from controlplane.core.routing.endpoint_table import LoadSettings
from controlplane.planning.tier_gangs import tier_gangs
from controlplane.planning.tier_specs import scaling_plan
from controlplane.simulation.fleet import ReplicaModel
from controlplane.simulation.options import Options
from controlplane.simulation.outages import OutageModel
from controlplane.simulation.scenario import RecommendationSettings, Scenario, TierScenario
from controlplane.simulation.tier_engines import TierEngines, anywhere, on_nodes

MAX_REPLICAS: Final = 64
"""Maximum number of replicas of a tier without ``scaling``."""


def build_scenario(
    plane: PlaneConfig, options: Options, request: RequestShape, nodes: Sequence[Node] | None = None
) -> Scenario:
    """The scenario of a configuration.

    ``request`` is the approximate mean request. ``nodes`` are the machines on which replicas run; None means
    that there is always room. SetupError names the tier whose model doesn't fit the GPU, whose speed is
    unknown, or that doesn't fit the nodes.
    """
    queue = plane.gateway.queue
    if nodes is None:
        tiers = [_tier(tier, anywhere(tier, options, request), options, request) for tier in plane.tiers]
    else:
        tiers = [
            _tier(gang.tier, on_nodes(gang, nodes, options, request), options, request)
            for gang in tier_gangs(plane, nodes)
        ]
    mtbf_hours = options.node_mtbf_hours
    return Scenario(
        tuple(tiers),
        plane.gateway.default_tier,
        AdmissionSettings(queue.capacity, queue.age_after_s, queue.aged_ratio),
        LoadSettings(reserved_ratio=queue.reserved_ratio),
        deadline_s=min(plane.gateway.request_timeout_s, queue.timeout_s),
        max_attempts=plane.gateway.retry.max_attempts,
        gpus=plane.controller.scaling.gpus,
        nodes=None if nodes is None else tuple(nodes),
        outages=None if mtbf_hours is None else OutageModel(mtbf_hours * 3600, options.node_recovery_s),
        seed=options.seed,
        recommendations=RecommendationSettings(
            plane.controller.scaling.recommendation_rules(), plane.controller.scaling.window_s
        ),
    )


def _tier(tier: TierConfig, engines: TierEngines, options: Options, request: RequestShape) -> TierScenario:
    engine = engines.engine
    # Sequences that a replica runs at once: limited by the gateway, the KV cache and the engine.
    sequences = min(
        float(tier.concurrency_limit),
        engine.kv_tokens / (request.input_tokens + request.output_tokens / 2),
        engine.max_sequences,
    )
    plan = scaling_plan(tier, options.tick_s)
    rule = plan.rule if plan.autoscaled else replace(plan.rule, min_replicas=1, max_replicas=MAX_REPLICAS)
    lowest = rule.min_replicas if options.min_replicas is None else options.min_replicas
    highest = rule.max_replicas if options.max_replicas is None else options.max_replicas
    if tier.engine == "endpoint":
        # An external endpoint has no replicas to scale.
        lowest = highest = tier.replicas
    rule = replace(
        rule,
        prior=engines.prior,
        mean_request=request,
        min_replicas=lowest,
        max_replicas=highest,
        cold_start_s=options.cold_start_s,
        sequences=max(1.0, sequences),
        slo=options.slo or tier.slo.slo(),
    )
    replica = ReplicaModel(
        engine,
        tier.concurrency_limit,
        gpus=rule.gpus_per_replica,
        cost_per_gpu_hour=options.cost_per_gpu_hour,
        cold_start_s=options.cold_start_s,
        mtbf_s=None if options.mtbf_hours is None else options.mtbf_hours * 3600,
        shape=engines.shape,
        engines=engines.engines,
    )
    replicas = min(max(tier.replicas, rule.min_replicas), rule.max_replicas)
    return TierScenario(
        *(tier.policy, replica, rule, replicas),
        tensor_parallel=plan.tensor_parallel,
        latency_limit_ms=plan.latency_limit_ms if options.slo is None else latency_limit_ms(options.slo),
    )
