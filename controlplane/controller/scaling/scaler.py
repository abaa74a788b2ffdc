"""Scaling of all tiers, every few seconds: new targets, new recommendations, and scores of earlier ones.

Targets are decided by :class:`~controlplane.core.autoscaling.round.ScalingRound` and recommendations by
:class:`~controlplane.core.recommendations.cycle.Recommender`, the same as in the simulator; their inputs are
put together in :mod:`.observation` and :mod:`.conditions`. Replicas that an operator has set and, in mode
``apply``, the round's targets are published to the :class:`~controlplane.controller.controller.Controller`,
from where Serve's autoscaling policy fetches them with migrations and held tiers added on top.
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
from controlplane.core.autoscaling.cold_starts import ColdStarts
from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.core.autoscaling.overrides import Override
from controlplane.core.autoscaling.round import ScalingRound
from controlplane.core.cluster.snapshot import GatewayInfo, TierScaling
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import SERVING
from controlplane.core.json_values import StoredState, to_value
from controlplane.core.recommendations.cycle import Recommender
from controlplane.core.recommendations.log import IssuedRecommendation
from controlplane.core.recommendations.views import ScalingReport, TierScalingView
from controlplane.core.reconcile.commands import ActionResponse
from controlplane.core.reconcile.replica_targets import TierTarget

TARGET_TTL_S: Final = 60.0
"""How long a published target is valid if no other follows. A tier that scales then stays as it is."""
MAX_START_S: Final = 86_400.0
"""A stored duration of a start that is longer is not believed."""
FORECAST_STEP: Final = 0.1
"""A forecast that changed by less than this share is not published again: each change is a new snapshot for
every gateway."""
_OVERRIDE, _RECOMMENDATION, _STARTS, _TARGET = "override/", "advice/", "starts/", "target/"
"""Prefixes of keys in a checkpoint."""


class PlaneScaler:
    """Not safe for use by several threads; the controller's event loop owns it."""

    def __init__(self, controller: Controller, config: ControllerScalingConfig) -> None:
        self.config = config
        self._controller = controller
        self._round = ScalingRound()
        self._recommender = Recommender()
        self.recommendations: Final = self._recommender.log
        self._manual = ManualTargets(controller)
        self._observer = TierObserver(controller)
        self._since_s = controller.now_s()
        """When this controller began to observe."""
        self._reported: tuple[TierScaling, ...] = ()
        """What snapshots now say about scaling."""
        self._starts = ColdStarts()
        self._decisions: dict[str, ScalingDecision] = {}
        self._use(config)

    # --- configuration and operators ----------------------------------------------------------------------

    def configure(self, config: ControllerScalingConfig) -> None:
        """Use other settings from now on. If the mode is no longer ``apply``, its targets are withdrawn."""
        if self.config.mode == "apply" and config.mode != "apply":
            overrides = self._manual.overrides
            self._controller.unpublish(
                [name for name in self._controller.published if not overrides.of(name)]
            )
        self._use(config)

    def _use(self, config: ControllerScalingConfig) -> None:
        self.config = config
        self._controller.configure_scaling(apply=config.mode == "apply", window_s=config.window_s)

    def scale(self, name: str, replicas: int | None, for_s: float | None, reason: str) -> ActionResponse:
        """See :meth:`ManualTargets.scale`."""
        return self._manual.scale(name, replicas, for_s, reason)

    def wakes(self, info: GatewayInfo) -> bool:
        """Whether a gateway's report, not yet processed, has requests for a tier whose target is 0: then the
        next tick should begin at once."""
        base_targets = self._controller.base_targets()
        return any(base_targets.get(name) == 0 for name in self._controller.requested(info))

    # --- the tick -----------------------------------------------------------------------------------------

    def tick(self) -> tuple[IssuedRecommendation, ...]:
        """Set new targets for all tiers; returns the recommendations that are new."""
        controller = self._controller
        now_s, unix_s = controller.now_s(), controller.unix_s()
        self._manual.expire(unix_s)
        specs = {spec.name: spec for spec in controller.tiers if spec.scaling is not None}
        self._starts.learn(controller.endpoints)
        self._round.configure(
            replace(spec.plan.rule, cold_start_s=self.cold_start_s(spec)) for spec in specs.values()
        )
        controller.record_traffic(specs)
        if not controller.may_decide or not specs:
            return ()
        observations = self._observer.observe(specs.values(), self._manual.overrides, now_s, unix_s)
        decisions = self._round.decide(observations, self._gpu_total())
        self._decisions = {decision.tier: decision for decision in decisions}
        self._publish(specs, decisions, unix_s)
        new = self._recommend(specs.values(), now_s, unix_s)
        self._report_to_gateways()
        return new

    def cold_start_s(self, spec: TierSpec) -> float:
        """From ordering a replica to its first response: as configured, or the longest of the last starts."""
        plan = spec.plan
        measured_s = None if plan.cold_start_fixed else self._starts.longest_s(spec.name)
        return plan.rule.cold_start_s if measured_s is None else measured_s

    def _gpu_total(self) -> float | None:
        """The GPUs that all tiers together may hold: as configured, or all that can be used."""
        return self.config.gpus if self.config.gpus is not None else self._controller.usable_gpus()

    def _publish(
        self, specs: Mapping[str, TierSpec], decisions: Iterable[ScalingDecision], unix_s: float
    ) -> None:
        targets = {}
        for decision in decisions:
            tier, plan = decision.tier, specs[decision.tier].plan
            override = self._manual.overrides.of(tier)
            if override is None and not (plan.autoscaled and self.config.mode == "apply"):
                continue
            reason = f"set by hand: {override.reason}" if override is not None else decision.reason
            targets[tier] = TierTarget(decision.target, reason, unix_s + TARGET_TTL_S)
            if decision.target != decision.before:
                text = f"{decision.before} -> {decision.target}: {reason}"
                self._controller.note("scaled", tier, text, tier)
        self._controller.publish(targets)

    def _recommend(
        self, specs: Iterable[TierSpec], now_s: float, unix_s: float
    ) -> tuple[IssuedRecommendation, ...]:
        controller, config = self._controller, self.config
        changes = self._recommender.update(
            conditions(controller, specs, self._round, config.window_s, now_s, self._since_s),
            config.recommendation_rules(),
            self._gpu_total(),
            now_s=now_s,
            unix_s=unix_s,
        )
        for item in changes.scored:
            tier = item.recommendation.instance
            reason = item.score.reason if item.score is not None else "nothing was measured"
            controller.note("advice judged", tier, reason, tier)
        for item in changes.issued:
            new = item.recommendation
            text = f"{new.suggestion} ({'; '.join(new.reasons)})"
            controller.note(new.kind.value, new.instance, text, new.instance)
        return changes.issued

    def _report_to_gateways(self) -> None:
        """Publish a new snapshot if the state of a tier's scaling has changed."""
        unix_s = self._controller.unix_s()
        kinds = {
            item.recommendation.instance: item.recommendation.kind.value
            for item in self.recommendations.open
            if item.applies(unix_s)
        }
        base_targets = self._controller.base_targets()
        before = {item.tier: item.forecast_per_s for item in self._reported}
        new = tuple(
            TierScaling(
                tier,
                target=base_targets.get(tier, 0),
                wanted=decision.target,
                forecast_per_s=_forecast(decision, before.get(tier)),
                recommendation=kinds.get(tier, ""),
            )
            for tier, decision in self._decisions.items()
        )
        if new != self._reported:
            self._reported = new
            self._controller.publish_scaling(new)

    def report(self) -> ScalingReport:
        """Targets with their reasons, and recommendations."""
        base_targets = self._controller.base_targets()
        views = tuple(
            self._view(spec, base_targets[spec.name])
            for spec in self._controller.tiers
            if spec.scaling is not None
        )
        log = self.recommendations
        return ScalingReport(
            self.config.mode, views, log.issued, log.record(), unix_s=self._controller.unix_s()
        )

    def _view(self, spec: TierSpec, base_target: int) -> TierScalingView:
        decision, override = self._decisions.get(spec.name), self._manual.overrides.of(spec.name)
        view = TierScalingView(
            tier=spec.name,
            replicas=sum(item.state in SERVING for item in self._controller.endpoints_of(spec.name)),
            target=base_target,
            wanted=base_target,
            reason="not decided yet",
            mode="by hand" if override is not None else self.config.mode if spec.plan.autoscaled else "fixed",
            forecast_per_s=None,
            each_per_s=0.0,
            cold_start_s=self.cold_start_s(spec),
            confidence=0.0,
            override=override,
        )
        if decision is None:
            return view
        return replace(
            view,
            wanted=decision.target,
            reason=decision.reason,
            forecast_per_s=decision.forecast.mean_per_s if decision.forecast is not None else None,
            each_per_s=self._round.scaler(spec.name).each_per_s,
            confidence=decision.confidence,
        )

    # --- over a restart -----------------------------------------------------------------------------------

    def checkpoint(self) -> dict[str, Any]:
        """What has to survive the controller's process, as JSON values by key."""
        state: dict[str, object] = {}
        for prefix, items in (
            (_OVERRIDE, self._manual.overrides.values()),
            (_RECOMMENDATION, {item.number: item for item in self.recommendations.issued}),
            (_STARTS, self._starts.values()),
            (_TARGET, {tier: target.replicas for tier, target in self._controller.published.items()}),
        ):
            state |= {f"{prefix}{key}": to_value(item) for key, item in items.items()}
        return state

    def restore(self, stored: StoredState) -> None:
        """Restore a checkpoint; its targets are valid until new ones are decided."""
        self._manual.overrides.restore(stored.entries(_OVERRIDE, Override, _positive))
        self.recommendations.restore(stored.entries(_RECOMMENDATION, IssuedRecommendation).values())
        starts: dict[str, list[float]] = stored.entries(_STARTS, list[float], _durations)
        self._starts.restore(starts)
        until_s = self._controller.unix_s() + TARGET_TTL_S
        reason = "as before the controller's restart"
        self._controller.publish(
            {
                tier: TierTarget(count, reason, until_s)
                for tier, count in stored.entries(_TARGET, int, _not_negative).items()
            }
        )


def _positive(override: Override) -> Override:
    _not_negative(override.replicas)
    return override


def _not_negative(replicas: int) -> int:
    if replicas < 0:
        raise ValueError("a number of replicas is negative")
    return replicas


def _durations(seconds: list[float]) -> list[float]:
    if not all(0 < each < MAX_START_S for each in seconds):
        raise ValueError("a start took no time, or longer than a day")
    return seconds


def _forecast(decision: ScalingDecision, before: float | None) -> float:
    """Requests per second to publish: ``before`` unless the forecast changed by a :data:`FORECAST_STEP`."""
    forecast = decision.forecast.mean_per_s if decision.forecast is not None else 0.0
    if before is not None and abs(forecast - before) <= FORECAST_STEP * max(forecast, before):
        return before
    return forecast
