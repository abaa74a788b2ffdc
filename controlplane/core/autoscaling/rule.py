"""What the configuration says about a tier's scaling, and what is assumed of its engines and requests."""

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
    """The speed of its engines that is assumed until it is measured."""
    mean_request: RequestShape
    """Assumed until requests were measured."""
    gpus_per_replica: float = 1.0
    """0: it takes nothing from the GPU budget."""
    priority: int = 0
    """If GPUs are short, tiers with a higher priority get theirs first."""
    min_replicas: int = 1
    max_replicas: int = 10
    step_up: int | None = None
    """Replicas added at once at most; None: no limit."""
    step_down: int | None = None
    """Replicas removed at once at most; None: no limit."""
    cool_down_up_s: float = 0.0
    """Minimum time between two scale-ups."""
    cool_down_down_s: float = 0.0
    """Minimum time from any change of the target to a scale-down."""
    hold_s: float | None = None
    """How long fewer replicas must be enough before some are removed; None: one cold start and the length of
    the forecast window."""
    cold_start_s: float = 60.0
    """From the order of a replica until it can serve."""
    idle_to_zero_s: float = 600.0
    """With ``min_replicas`` 0: after this time without requests the last replica is removed."""
    tick_s: float = 5.0
    sequences: float = 10.0
    """Requests that one replica can run at the same time."""
    slo: Slo = field(default_factory=Slo)
    schedules: tuple[Schedule, ...] = ()

    @property
    def resolved_hold_s(self) -> float:
        """``hold_s``, or its default."""
        # A replica must serve for a while after its cold start, or it was not worth starting.
        return self.cold_start_s + self.window_s if self.hold_s is None else self.hold_s

    @property
    def window_s(self) -> float:
        """The length of the window whose mean arrival rate is forecast."""
        return max(2 * self.tick_s, 30.0)
