"""One look at all tiers, every few seconds: new targets, new advice, and what becomes of both.

The decisions are :class:`~controlplane.core.autoscaling.round.ScalingRound`'s and the advice is
:class:`~controlplane.core.recommendations.cycle.Recommender`'s, the same as in the simulator; what they are
told is put together in :mod:`.observing` and :mod:`.conditions`. Numbers that a person set and, where the
mode is to apply, the round's targets are published to :class:`~controlplane.controller.controller.Registry`,
from where Serve's autoscaling policy fetches them; moves and held tiers go on top of them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from controlplane.config.scaling import ControllerScalingConfig
from controlplane.controller.controller import Controller
from controlplane.controller.scaling.conditions import conditions
from controlplane.controller.scaling.manual_targets import ManualTargets
from controlplane.controller.scaling.observation import TierObserver
from controlplane.controller.scaling.reporting import ScalingReporter, view
from controlplane.core.autoscaling.cold_starts import ColdStarts
from controlplane.core.autoscaling.overrides import Override
from controlplane.core.autoscaling.round import RoundDecision, ScalingRound, TierRule
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.json_values import StoredState, to_value
from controlplane.core.placement.gangs import WHOLE_MILLI
from controlplane.core.recommendations.cycle import Recommender
from controlplane.core.recommendations.log import IssuedRecommendation, RecommendationLog
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reconcile.commands import ActionResponse
from controlplane.core.reconcile.replica_targets import TierTarget

TARGET_TTL_S: Final = 60.0
"""A target that was worked out holds for so long when none follows; then it stays as the tier is."""
_OVERRIDE, _RECOMMENDATION, _STARTS, _TARGET = "override/", "advice/", "starts/", "target/"


class Scaling:
    """Decides once a tick. Not safe for use by several threads; the controller's event loop owns it."""

    def __init__(self, controller: Controller, config: ControllerScalingConfig) -> None:
        self.config = config
        self._controller = controller
        self._round = ScalingRound()
        self._recommender = Recommender()
        self._by_hand = ManualTargets(controller)
        self._observer = TierObserver(controller)
        self._teller = ScalingReporter(controller)
        self._starts = ColdStarts()
        self._decisions: dict[str, RoundDecision] = {}
        self._adopt(config)

    @property
    def recommendations(self) -> RecommendationLog:
        """The last recommendations."""
        return self._recommender.log

    # --- what comes in ------------------------------------------------------------------------------------

    def configure(self, config: ControllerScalingConfig) -> None:
        """Other settings from now on. Targets of a mode that no longer applies end."""
        if self.config.mode == "apply" and config.mode != "apply":
            overrides = self._by_hand.overrides
            self._controller.unpublish(
                [name for name in self._controller.published if not overrides.of(name)]
            )
        self._adopt(config)

    def _adopt(self, config: ControllerScalingConfig) -> None:
        self.config = config
        self._controller.applies = config.mode == "apply"
        self._controller.demand.set_window(config.window_s)

    def scale(self, name: str, replicas: int | None, for_s: float | None, reason: str) -> ActionResponse:
        """See :meth:`ManualTargets.scale`."""
        return self._by_hand.scale(name, replicas, for_s, reason)

    def wakes(self, info: GatewayInfo) -> bool:
        """Whether a gateway's report is reason not to wait for the next tick: somebody asks for a tier that
        has no replica and is to have none."""
        controller = self._controller
        asked = {item.subject for item in info.traffic if item.waiting or item.in_flight}
        asked |= {
            item.subject
            for item in info.traffic
            if item.arrived > controller.demand.ledger.last_report(info.gateway_id, item.subject).arrived
        }
        base_targets = controller.base_targets()
        return any(
            base_targets.get(name) == 0 for name in asked & {spec.name for spec in controller.registry.tiers}
        )

    # --- the tick -----------------------------------------------------------------------------------------

    def tick(self) -> tuple[IssuedRecommendation, ...]:
        """One look at all tiers: new targets, and the advice that is new."""
        controller = self._controller
        now_s, unix_s = controller.now_s(), controller.unix_s()
        self._by_hand.expire(unix_s)
        specs = {spec.name: spec for spec in controller.registry.tiers if spec.scaling is not None}
        self._starts.learn(controller.registry.endpoints)
        self._round.configure(self._rule(spec) for spec in specs.values())
        controller.demand.sample(specs, controller.registry.endpoints, now_s)
        if not controller.knows_all or not specs:
            return ()
        observations = self._observer.look(specs.values(), self._by_hand.overrides, now_s, unix_s)
        decisions = self._round.decide(observations, self._gpus())
        self._decisions = {decision.tier: decision for decision in decisions}
        self._publish(specs, decisions, unix_s)
        new = self._recommend(specs.values(), now_s, unix_s)
        self._teller.tell(self._decisions, self.recommendations)
        return new

    def _rule(self, spec: TierSpec) -> TierRule:
        rule = spec.plan.rule
        return replace(rule, settings=replace(rule.settings, cold_start_s=self.cold_start_s(spec)))

    def cold_start_s(self, spec: TierSpec) -> float:
        """From an order to an answer: as configured, or the longest of the last starts."""
        plan = spec.plan
        seen_s = None if plan.cold_start_fixed else self._starts.longest_s(spec.name)
        return plan.rule.settings.cold_start_s if seen_s is None else seen_s

    def _gpus(self) -> float | None:
        """What all tiers together may hold: as configured, or the GPUs that can be used, and of those that
        are out of use what is held there and may stay."""
        if self.config.gpus is not None:
            return self.config.gpus
        fleet, book = self._controller.fleet, self._controller.desk.table
        if not fleet.has_reported_gpus:
            return None
        out_of_use = fleet.out_of_use()
        stays_milli = sum(book.used(uuid)[0] for uuid in out_of_use if not fleet.leave_reason(uuid))
        return len(fleet.records.keys() - out_of_use.keys()) + stays_milli / WHOLE_MILLI

    def _publish(
        self, specs: Mapping[str, TierSpec], decisions: Iterable[RoundDecision], unix_s: float
    ) -> None:
        controller = self._controller
        targets = {}
        for decision in decisions:
            tier, plan = decision.tier, specs[decision.tier].plan
            by_hand = self._by_hand.overrides.of(tier)
            if by_hand is None and not (plan.autoscaled and self.config.mode == "apply"):
                continue
            reason = f"set by hand: {by_hand.reason}" if by_hand is not None else decision.reason
            targets[tier] = TierTarget(decision.target, reason, unix_s + TARGET_TTL_S)
            if decision.target != decision.before:
                text = f"{decision.before} -> {decision.target}: {reason}"
                controller.registry.note("scaled", tier, text, tier)
        controller.publish(targets)

    def _recommend(
        self, specs: Iterable[TierSpec], now_s: float, unix_s: float
    ) -> tuple[IssuedRecommendation, ...]:
        controller, config = self._controller, self.config
        changes = self._recommender.update(
            conditions(controller, specs, self._round, config.window_s, now_s),
            config.recommendation_rules(),
            self._gpus(),
            now_s=now_s,
            unix_s=unix_s,
        )
        for item in changes.scored:
            tier = item.recommendation.instance
            reason = item.score.reason if item.score is not None else "nothing was measured"
            controller.registry.note("advice judged", tier, reason, tier)
        for item in changes.issued:
            new = item.recommendation
            text = f"{new.suggestion} ({'; '.join(new.reasons)})"
            controller.registry.note(new.kind.value, new.instance, text, new.instance)
        return changes.issued

    def report(self) -> ScalingReport:
        """For people."""
        views = []
        for spec in self._controller.registry.tiers:
            if spec.scaling is None:
                continue
            decision = self._decisions.get(spec.name)
            views.append(
                view(
                    *(self._controller, spec, decision, self._by_hand.overrides.of(spec.name)),
                    mode=self.config.mode,
                    each_per_s=self._round.scaler(spec.name).each_per_s if decision is not None else 0.0,
                    cold_start_s=self.cold_start_s(spec),
                )
            )
        log = self.recommendations
        return ScalingReport(self.config.mode, tuple(views), log.issued, log.record())

    # --- over a restart -----------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """The state that survives a restart, as JSON values by key."""
        state: dict[str, object] = {}
        for prefix, items in (
            (_OVERRIDE, self._by_hand.overrides.values()),
            (_RECOMMENDATION, {item.number: item for item in self.recommendations.issued}),
            (_STARTS, self._starts.values()),
            (_TARGET, {tier: target.replicas for tier, target in self._controller.published.items()}),
        ):
            state |= {f"{prefix}{key}": to_value(item) for key, item in items.items()}
        return state

    def restore(self, stored: StoredState) -> None:
        """Restore what was stored before a restart. Targets apply until new ones are computed."""
        self._by_hand.overrides.restore(stored.entries(_OVERRIDE, Override))
        self.recommendations.restore(stored.entries(_RECOMMENDATION, IssuedRecommendation).values())
        self._starts.restore(stored.entries(_STARTS, list[float]))
        until_s = self._controller.unix_s() + TARGET_TTL_S
        why = "as before the controller's restart"
        self._controller.publish(
            {tier: TierTarget(count, why, until_s) for tier, count in stored.entries(_TARGET, int).items()}
        )
