"""What the controller is told of a tier's scaling: where it starts from, what it may do, what is promised."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.round import TierRule
from controlplane.core.recommendations.rules import LATENCY_MS


@dataclass(frozen=True, slots=True)
class ScalingPlan:
    """One tier's scaling as the configuration has it."""

    rule: TierRule
    follows: bool
    """It is scaled where the controller's mode is to apply; otherwise it is only advised about."""
    ceiling: int
    """Replicas that it may be given by hand at most."""
    cold_start_fixed: bool = False
    """The configuration says how long a start takes; otherwise it is measured."""
    tensor_parallel: int = 1
    latency_limit_ms: float = LATENCY_MS
    """Over it advice calls the tier slow, where no threshold is set."""
    gpu_priors: tuple[tuple[str, EngineSpeed], ...] = ()
    """GPU model, by its name in the table → what an engine of the tier is assumed to do there. Empty: it
    takes no GPU, or its model's configuration can't be read."""


@dataclass(frozen=True, slots=True)
class TierSpec:
    """What the configuration asks of a tier, as far as the controller needs it."""

    name: str
    model: str
    engine: str
    replicas: int
    concurrency_limit: int
    attainment: float | None = None
    """The share of its requests that must get what its SLO promises; None: not said."""
    scaling: ScalingPlan | None = None
    """None: it runs elsewhere, and no replicas of it are here."""

    @property
    def plan(self) -> ScalingPlan:
        """Its scaling. ValueError: it runs elsewhere."""
        if self.scaling is None:
            raise ValueError(f"nothing is known of the scaling of tier '{self.name}'")
        return self.scaling
