"""One round of scaling: what all tiers were seen to do → a target for each, inside the GPUs there are.

The live controller and the simulator call the same :class:`ScalingRound`, once a tick: each tier's
:class:`~controlplane.core.autoscaling.policy.TierScaler` says what it wants, and where the tiers together
want more GPUs than there are, :func:`~controlplane.core.autoscaling.gpu_budget.share_gpus` says who gets
them. Each decision holds both, so that nobody has to guess why a tier did not grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controlplane.core.autoscaling.capacity import EngineSpeed, RequestShape
from controlplane.core.autoscaling.gpu_budget import GpuDemand, carried_gains, share_gpus
from controlplane.core.autoscaling.policy import (
    ScaleDirection,
    ScalingDecision,
    ScalingSettings,
    TierObservation,
    TierScaler,
)


@dataclass(frozen=True, slots=True)
class TierRule:
    """What is known of a tier beforehand, and what its configuration asks."""

    tier: str
    settings: ScalingSettings
    prior: EngineSpeed
    """What its engines are assumed to do until they were watched."""
    work: RequestShape
    """Its mean request, a guess until some were seen."""
    gpus_per_replica: float = 1.0
    """0: it takes none of the budget."""
    priority: int = 0
    """Who gets GPUs first when they are short: the higher."""


@dataclass(frozen=True, slots=True)
class RoundDecision:
    """What becomes of one tier."""

    tier: str
    before: int
    """Replicas that were ordered when the round began."""
    target: int
    move: ScaleDirection
    reason: str
    asked: ScalingDecision
    """What the tier wanted, before the budget."""

    @property
    def cut(self) -> int:
        """Replicas that the budget took from what the tier wanted."""
        return self.asked.target - self.target


class ScalingRound:
    """The scaling of all tiers; one for each control plane."""

    def __init__(self, rules: Iterable[TierRule] = ()) -> None:
        self._rules: dict[str, TierRule] = {}
        self._scalers: dict[str, TierScaler] = {}
        self.configure(rules)

    def configure(self, rules: Iterable[TierRule]) -> None:
        """The tiers that there are from now on. What was learned of a tier stays, unless its engines'
        assumed speed is another, which means another model or GPU; what is no longer named is forgotten."""
        found = {rule.tier: rule for rule in rules}
        scalers: dict[str, TierScaler] = {}
        for name, rule in found.items():
            known, old = self._scalers.get(name), self._rules.get(name)
            if known is None or old is None or old.prior != rule.prior:
                known = TierScaler(name, rule.settings, rule.prior, rule.work)
            elif known.settings != rule.settings:
                known.adopt(rule.settings)
            scalers[name] = known
        self._rules, self._scalers = found, scalers

    def scaler(self, tier: str) -> TierScaler:
        """For its capacity model and mean request. KeyError: no such tier."""
        return self._scalers[tier]

    def decide(self, seen: Sequence[TierObservation], gpus: float | None = None) -> tuple[RoundDecision, ...]:
        """A decision for each observation, in their order. ``gpus`` is what all tiers together may hold;
        None: nobody counts. KeyError: a tier that no rule names.

        A tier whose number a person set gets it, one whose telemetry is not fresh keeps what it has, and
        what runs of a minimum stays; all this is counted first, even if it is over the budget.
        """
        asked = [self._scalers[tier.tier].decide(tier) for tier in seen]
        if gpus is None:
            return tuple(
                RoundDecision(tier.tier, tier.target, want.target, want.move, want.reason, want)
                for tier, want in zip(seen, asked, strict=True)
            )
        demands = [self._demand(tier, want) for tier, want in zip(seen, asked, strict=True)]
        decisions = []
        for tier, want, share in zip(seen, asked, share_gpus(demands, gpus), strict=True):
            target, reason = share.replicas, want.reason
            if target < want.target:
                reason = f"{share.reason}; it wants {want.target}: {reason}"
            move = (
                ScaleDirection.UP
                if target > tier.target
                else ScaleDirection.DOWN
                if target < tier.target
                else ScaleDirection.STAY
            )
            decisions.append(RoundDecision(tier.tier, tier.target, target, move, reason, want))
        return tuple(decisions)

    def _demand(self, seen: TierObservation, want: ScalingDecision) -> GpuDemand:
        rule, scaler = self._rules[seen.tier], self._scalers[seen.tier]
        if seen.override is not None:
            kept = want.target
        elif want.blind:
            kept = min(seen.target, want.target)
        else:
            kept = 0
        return GpuDemand(
            seen.tier,
            rule.gpus_per_replica,
            min(want.lowest, want.target),
            want.target,
            rule.priority,
            carried_gains(want.needed_per_s, scaler.each_per_s, want.target),
            held=seen.target,
            running=seen.ready,
            kept=kept,
        )
