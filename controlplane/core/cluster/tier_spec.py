"""What the controller needs to know about each tier: its configured replicas, its scaling and its SLO."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.recommendations.rules import LATENCY_MS


@dataclass(frozen=True, slots=True)
class ScalingPlan:
    """The configuration of one tier's scaling."""

    rule: ScalingRule
    autoscaled: bool
    """Whether the controller scales the tier if its mode is ``apply``; if not, it only makes
    recommendations."""
    ceiling: int
    """Most replicas that an operator may set."""
    cold_start_fixed: bool = False
    """Whether the configuration sets the duration of a start; if not, it is measured."""
    tensor_parallel: int = 1
    latency_limit_ms: float = LATENCY_MS
    """Latency above which recommendations call the tier slow, if no threshold is configured."""
    gpu_priors: tuple[tuple[str, EngineSpeed], ...] = ()
    """GPU model, by its name in the table of GPU models → speed assumed for an engine of the tier on it.
    Empty if the tier uses no GPU, or its model's configuration can't be read."""


@dataclass(frozen=True, slots=True)
class TierSpec:
    """The part of a tier's configuration that the controller needs."""

    name: str
    model: str
    engine: str
    replicas: int
    concurrency_limit: int
    attainment: float | None = None
    """The share of requests that must be served within the SLO; None if not configured."""
    scaling: ScalingPlan | None = None
    """None if the tier runs elsewhere, without replicas in this cluster."""
    expected_start_s: float = 60.0
    """How long an engine of its kind usually loads when it starts for the first time."""
    start_limit_s: float = 1800.0
    """After this long a first start counts as failed."""

    @property
    def plan(self) -> ScalingPlan:
        """The tier's scaling configuration. ValueError if the tier runs elsewhere."""
        if self.scaling is None:
            raise ValueError(f"tier '{self.name}' runs elsewhere, so it can't be scaled here")
        return self.scaling
