"""What gateways and operators are shown about scaling."""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.controller.controller import Controller
from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.core.autoscaling.overrides import Override
from controlplane.core.cluster.snapshot import TierScaling
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import SERVING
from controlplane.core.recommendations.log import RecommendationLog
from controlplane.core.recommendations.views import TierScalingView

FORECAST_STEP = 0.1
"""A forecast that changed by less than this share is not published again: each change is a new snapshot for
every gateway."""


class ScalingReporter:
    """Publishes for snapshots what changed."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._published: tuple[TierScaling, ...] = ()

    def publish(self, decisions: Mapping[str, ScalingDecision], recommendations: RecommendationLog) -> None:
        """To be called after each tick."""
        kinds = {
            item.recommendation.instance: item.recommendation.kind.value for item in recommendations.open
        }
        base_targets = self._controller.base_targets()
        before = {item.tier: item.forecast_per_s for item in self._published}
        new = tuple(
            TierScaling(
                tier,
                target=base_targets.get(tier, 0),
                wanted=decision.target,
                forecast_per_s=_forecast(decision, before.get(tier)),
                recommendation=kinds.get(tier, ""),
            )
            for tier, decision in decisions.items()
        )
        if new != self._published:
            self._published = new
            self._controller.publish_scaling(new)


def _forecast(decision: ScalingDecision, before: float | None) -> float:
    forecast = decision.forecast.mean_per_s if decision.forecast is not None else 0.0
    near = before is not None and abs(forecast - before) <= FORECAST_STEP * max(forecast, before)
    return before if near and before is not None else forecast


def view(
    controller: Controller,
    spec: TierSpec,
    decision: ScalingDecision | None,
    override: Override | None,
    *,
    mode: str,
    each_per_s: float,
    cold_start_s: float,
) -> TierScalingView:
    """One tier for operators; ``decision`` is None before the first tick."""
    base_target = controller.base_targets()[spec.name]
    forecast = decision.forecast if decision is not None else None
    return TierScalingView(
        tier=spec.name,
        replicas=sum(item.state in SERVING for item in controller.endpoints_of(spec.name)),
        target=base_target,
        wanted=decision.target if decision is not None else base_target,
        reason=decision.reason if decision is not None else "not decided yet",
        mode="by hand" if override is not None else mode if spec.plan.autoscaled else "fixed",
        forecast_per_s=forecast.mean_per_s if forecast is not None else None,
        each_per_s=each_per_s if decision is not None else 0.0,
        cold_start_s=cold_start_s,
        confidence=decision.confidence if decision is not None else 0.0,
        override=override,
    )
