"""One round of scaling: from observations of all tiers to a decision for each, within the GPU budget.

The live controller and the simulator call the same :class:`ScalingRound` once per tick. Each tier's
:class:`~controlplane.core.autoscaling.policy.TierScaler` decides first; if the tiers together ask for more
GPUs than there are, :func:`~controlplane.core.autoscaling.gpu_budget.share_gpus` divides them. The reason of
a decision covers both steps, so that it is clear why a tier did not grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from controlplane.core.autoscaling.decision import ScalingDecision, TierObservation
from controlplane.core.autoscaling.gpu_budget import GpuDemand, carried_gains, share_gpus
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.rule import ScalingRule


class ScalingRound:
    """Scales all tiers."""

    def __init__(self, rules: Iterable[ScalingRule] = ()) -> None:
        self._scalers: dict[str, TierScaler] = {}
        self.configure(rules)

    def configure(self, rules: Iterable[ScalingRule]) -> None:
        """Replace the rules of all tiers. What was learned about a tier remains, unless the assumed speed of
        its engines changed, which means another model or GPU. Tiers without a rule are removed."""
        scalers: dict[str, TierScaler] = {}
        for rule in rules:
            known = self._scalers.get(rule.tier)
            if known is None or known.rule.prior != rule.prior:
                known = TierScaler(rule)
            elif known.rule != rule:
                known.adopt(rule)
            scalers[rule.tier] = known
        self._scalers = scalers

    def scaler(self, tier: str) -> TierScaler:
        """The tier's scaler. KeyError if the tier has no rule."""
        return self._scalers[tier]

    def decide(
        self, observations: Sequence[TierObservation], gpus: float | None = None
    ) -> tuple[ScalingDecision, ...]:
        """A decision for each observation, in their order. ``gpus`` is the number that all tiers together may
        use; None means the total is unknown, and no budget applies. KeyError if a tier has no rule.

        Three things are granted first, even beyond the budget: the number that an operator set, the present
        replicas of a tier whose telemetry is not fresh, and the running replicas of a tier's minimum.
        """
        decisions = tuple(self._scalers[seen.tier].decide(seen) for seen in observations)
        if gpus is None:
            return decisions
        demands = [self._demand(*pair) for pair in zip(observations, decisions, strict=True)]
        return tuple(
            _granted(decision, replicas, gpus)
            for decision, replicas in zip(decisions, share_gpus(demands, gpus), strict=True)
        )

    def _demand(self, seen: TierObservation, decision: ScalingDecision) -> GpuDemand:
        scaler = self._scalers[seen.tier]
        if seen.override is not None:
            reserved = decision.target
        elif decision.blind:
            reserved = min(seen.target, decision.target)
        else:
            reserved = 0
        return GpuDemand(
            gpus_per_replica=scaler.rule.gpus_per_replica,
            lowest=min(decision.lowest, decision.target),
            wanted=decision.target,
            priority=scaler.rule.priority,
            gains=carried_gains(decision.needed_per_s, scaler.each_per_s, decision.target),
            ordered=seen.target,
            running=seen.ready,
            reserved=reserved,
        )


def _granted(decision: ScalingDecision, replicas: int, gpus: float) -> ScalingDecision:
    """The decision with the replicas that the budget grants."""
    if replicas >= decision.target:
        return decision
    short = decision.target - replicas
    reason = (
        f"{short} fewer than the {decision.target} it wants: {gpus:g} GPUs are shared, and tiers of higher "
        f"priority or gain went first; it wants {decision.target}: {decision.reason}"
    )
    return replace(decision, target=replicas, reason=reason)
