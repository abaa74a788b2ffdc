"""The input and the output of a scaling decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from controlplane.core.autoscaling.capacity import EngineObservation
from controlplane.core.autoscaling.forecast import Forecast
from controlplane.core.telemetry.series import Signal, missing

_NOT_MEASURED: Final = missing("not measured")


@dataclass(frozen=True, slots=True)
class TierObservation:
    """One tier at one moment. A signal that is not available is MISSING, never 0."""

    tier: str
    now_s: float
    unix_s: float
    target: int
    """Replicas that are ordered, ready or not."""
    ready: int
    interval_s: float
    """Time since the previous observation."""
    arrivals: Signal
    """Requests that arrived for this tier in the interval, whatever their outcome."""
    in_flight: Signal
    queued: Signal
    input_tokens: Signal = _NOT_MEASURED
    """Mean number of computed tokens per request, over the interval."""
    output_tokens: Signal = _NOT_MEASURED
    finished: float = 0.0
    """Requests that ended in the interval, whatever their outcome."""
    missed: float = 0.0
    """Part of ``finished`` that missed the SLO."""
    engines: tuple[EngineObservation, ...] = ()
    override: int | None = None
    """A number of replicas that an operator set; it takes precedence."""

    @property
    def blind(self) -> str:
        """Which of the signals that a scale-down needs are not fresh, as text; empty if all are."""
        named = (("arrivals", self.arrivals), ("in flight", self.in_flight), ("queue", self.queued))
        return "; ".join(
            f"{name} {signal.freshness} ({signal.reason})" for name, signal in named if signal.fresh is None
        )


class ScaleDirection(StrEnum):
    """How a decision changes a tier's target."""

    UP = "up"
    DOWN = "down"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """A tier's target and its reason."""

    tier: str
    before: int
    """The target before the decision."""
    target: int
    reason: str
    requested: int
    """The target that the tier's policy asked for, before the GPU budget."""
    needed_per_s: float = 0.0
    """Requests per second that ``requested`` replicas are to serve: their full capacity, or less if only the
    forecast needs that many replicas."""
    lowest: int = 0
    """The minimum number of replicas that applies now."""
    blind: bool = False
    """A signal that a scale-down needs is not fresh."""
    forecast: Forecast | None = None
    confidence: float = 0.0

    @property
    def direction(self) -> ScaleDirection:
        """Whether the target rises or falls."""
        if self.target > self.before:
            return ScaleDirection.UP
        return ScaleDirection.DOWN if self.target < self.before else ScaleDirection.STAY

    @property
    def shortfall(self) -> int:
        """Replicas that the policy asked for and the GPU budget did not grant."""
        return self.requested - self.target
