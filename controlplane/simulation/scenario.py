"""The scenario of a simulation: tiers with their replicas and scaling, machines and their failures."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.core.admission.queue import AdmissionSettings
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.placement.topology import Node
from controlplane.core.recommendations.cycle import RecommendationRules
from controlplane.core.recommendations.rules import LATENCY_MS
from controlplane.core.routing.endpoint_table import LoadSettings
from controlplane.core.routing.tier_table import TierPolicy
from controlplane.simulation.fleet import ReplicaModel
from controlplane.simulation.outages import OutageModel


@dataclass(frozen=True, slots=True)
class RecommendationSettings:
    """The settings of ``controller.scaling`` that concern recommendations."""

    rules: RecommendationRules = field(default_factory=RecommendationRules)
    window_s: float = 300.0


@dataclass(frozen=True, slots=True)
class TierScenario:
    """One tier: its routing, its replicas and its scaling."""

    policy: TierPolicy
    replica: ReplicaModel
    rule: ScalingRule
    replicas: int = 1
    """Replicas that are ready when the trace begins."""
    tensor_parallel: int = 1
    latency_limit_ms: float = LATENCY_MS
    """The latency above which a recommendation calls the tier slow, if no threshold is set."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything except the arrivals and the policy."""

    tiers: tuple[TierScenario, ...]
    default_tier: str | None = None
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    deadline_s: float = 600.0
    max_attempts: int = 3
    gpus: float | None = None
    """GPUs that all tiers together may use; None means those of ``nodes``."""
    nodes: tuple[Node, ...] | None = None
    """Machines on which replicas run; None means that there is always room."""
    outages: OutageModel | None = None
    """None means that no node fails."""
    seed: int = 0
    recommendations: RecommendationSettings = field(default_factory=RecommendationSettings)
