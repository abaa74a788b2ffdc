"""The configuration of a tier's scaling, and the assumptions about its engines and requests."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.schedules import Schedule
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """How one tier scales."""

    tier: str
    prior: EngineSpeed
    """The speed of its engines, assumed until it is measured."""
    mean_request: RequestShape
    """Assumed until requests are measured."""
    gpus_per_replica: float = 1.0
    """0 means that the tier takes nothing from the GPU budget."""
    priority: int = 0
    """If GPUs are short, tiers with a higher priority get theirs first."""
    min_replicas: int = 1
    max_replicas: int = 10
    step_up: int | None = None
    """Maximum number of replicas added at once; None means no limit."""
    step_down: int | None = None
    """Maximum number of replicas removed at once; None means no limit."""
    cool_down_up_s: float = 0.0
    """Minimum time between two scale-ups."""
    cool_down_down_s: float = 0.0
    """Minimum time from any change of the target to a scale-down."""
    hold_s: float | None = None
    """How long fewer replicas must suffice before some are removed; None means one cold start plus the length
    of the forecast window."""
    cold_start_s: float = 60.0
    """Time from ordering a replica until it can serve."""
    idle_to_zero_s: float = 600.0
    """If ``min_replicas`` is 0, the last replica is removed after this time without requests."""
    tick_s: float = 5.0
    sequences: float = 10.0
    """Requests that one replica can run at the same time."""
    slo: Slo = field(default_factory=Slo)
    schedules: tuple[Schedule, ...] = ()

    @property
    def resolved_hold_s(self) -> float:
        """``hold_s``, or its default."""
        # A replica that serves only briefly after its cold start was not worth starting.
        return self.cold_start_s + self.window_s if self.hold_s is None else self.hold_s

    @property
    def window_s(self) -> float:
        """The length of the window whose mean arrival rate is forecast."""
        return max(2 * self.tick_s, 30.0)
