"""From a configuration file to a scenario: what its tiers' replicas are like, and what they are promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from controlplane.config import PlaneConfig, TierConfig
from controlplane.core.admission.queue import AdmissionSettings
from controlplane.core.autoscaling.capacity import RequestShape
from controlplane.core.placement.topology import Node
from controlplane.core.recommendations.rules import latency_limit_ms
from controlplane.core.routing.endpoint_table import LoadSettings
from controlplane.gateway.gateway import tier_policy
from controlplane.planning.tier_gangs import tier_gangs
from controlplane.planning.tier_specs import scaling_plan
from controlplane.simulation.fleet import ReplicaModel
from controlplane.simulation.options import Options
from controlplane.simulation.outages import OutageModel
from controlplane.simulation.recommendations import RecommendationSettings
from controlplane.simulation.simulator import Scenario, TierScenario
from controlplane.simulation.tier_engines import TierEngines, anywhere, on_nodes

MOST_REPLICAS: Final = 64
"""Of a tier without bounds."""


def build(
    plane: PlaneConfig, options: Options, request: RequestShape, nodes: Sequence[Node] | None = None
) -> Scenario:
    """The scenario of a configuration; ``request`` is the expected mean request, ``nodes`` are the machines
    that replicas find their places on, None: there is always room.

    SetupError names the tier whose model does not fit the GPU, whose speed can't be told, or that has no
    place on the nodes.
    """
    queue = plane.gateway.queue
    if nodes is None:
        tiers = [_tier(tier, anywhere(tier, options, request), options, request) for tier in plane.tiers]
    else:
        tiers = [
            _tier(demand.tier, on_nodes(demand, nodes, options, request), options, request)
            for demand in tier_gangs(plane, nodes)
        ]
    lasts_hours = options.node_mtbf_hours
    return Scenario(
        tuple(tiers),
        plane.gateway.default_tier,
        AdmissionSettings(queue.capacity, queue.age_after_s, queue.aged_ratio),
        LoadSettings(reserved_ratio=queue.reserved_ratio),
        deadline_s=min(plane.gateway.request_timeout_s, queue.timeout_s),
        max_attempts=plane.gateway.retry.max_attempts,
        gpus=plane.controller.scaling.gpus,
        nodes=None if nodes is None else tuple(nodes),
        outages=None if lasts_hours is None else OutageModel(lasts_hours * 3600, options.node_recovery_s),
        seed=options.seed,
        recommendations=RecommendationSettings(
            plane.controller.scaling.recommendation_rules(), plane.controller.scaling.window_s
        ),
    )


def _tier(tier: TierConfig, found: TierEngines, options: Options, request: RequestShape) -> TierScenario:
    # What the gateway sends at once, and what the engine can hold of it.
    engine = found.engine
    held = min(
        float(tier.concurrency_limit),
        engine.kv_tokens / (request.input_tokens + request.output_tokens / 2),
        engine.max_sequences,
    )
    plan = scaling_plan(tier, options.tick_s)
    rule = plan.rule if plan.autoscaled else replace(plan.rule, min_replicas=1, max_replicas=MOST_REPLICAS)
    lowest = rule.min_replicas if options.min_replicas is None else options.min_replicas
    highest = rule.max_replicas if options.max_replicas is None else options.max_replicas
    if tier.engine == "endpoint":
        # What runs elsewhere has no replicas to add.
        lowest = highest = tier.replicas
    rule = replace(
        rule,
        prior=found.prior,
        mean_request=request,
        min_replicas=lowest,
        max_replicas=highest,
        cold_start_s=options.cold_start_s,
        sequences=max(1.0, held),
        slo=options.slo or tier.slo.slo(),
    )
    replica = ReplicaModel(
        engine,
        tier.concurrency_limit,
        gpus=rule.gpus_per_replica,
        cost_per_gpu_hour=options.cost_per_gpu_hour,
        cold_start_s=options.cold_start_s,
        cold_start_jitter=options.cold_start_jitter,
        mtbf_s=None if options.mtbf_hours is None else options.mtbf_hours * 3600,
        shape=found.shape,
        engines=found.engines,
    )
    replicas = min(max(tier.replicas, rule.min_replicas), rule.max_replicas)
    return TierScenario(
        *(tier_policy(tier), replica, rule, replicas),
        tensor_parallel=plan.tensor_parallel,
        latency_limit_ms=plan.latency_limit_ms if options.slo is None else latency_limit_ms(options.slo),
    )
