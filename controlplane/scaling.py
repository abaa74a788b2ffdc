"""The live half of scaling: what gateways, engines and GPUs say → targets and advice, every few seconds.

The decisions are :class:`~controlplane.core.scaling_round.ScalingRound`'s, the same as in the simulator;
here is what they are told and what becomes of them. Numbers that a person set and, where the mode is to
apply, the round's targets are published to :class:`~controlplane.control.Control`, from where Serve's
autoscaling policy fetches them; moves and held tiers go on top of them there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from controlplane.config.scaling import ControllerScalingConfig
from controlplane.control import Control
from controlplane.core.advice import AdviceBook, Given
from controlplane.core.autoscaling import EngineObservation, TierObservation
from controlplane.core.domain import Endpoint, EndpointState, GatewayInfo, TierScaling, TierSpec
from controlplane.core.health import ENDED, SERVING
from controlplane.core.moves import OPERATOR
from controlplane.core.orders import ActionAnswer, Outcome
from controlplane.core.overrides import Override, Overrides
from controlplane.core.recommendations import Recommendation, TierCondition, advise
from controlplane.core.scaling_plan import ScalingPlan
from controlplane.core.scaling_round import RoundDecision, ScalingRound, TierRule
from controlplane.core.scaling_view import ScalingReport, TierScalingView
from controlplane.core.targets import TierTarget
from controlplane.core.telemetry import Freshness, Signal, judge, missing
from controlplane.core.traffic import TierFigures, Traffic, since

TARGET_TTL_S: Final = 60.0
"""A target that was worked out holds for so long when none follows; then it stays as the tier is."""
PLACING_S: Final = 3.0
"""From an order to the start of an engine: Serve's and Ray's share of a cold start."""
STARTS_KEPT: Final = 8
FORECAST_STEP: Final = 0.1
"""A forecast that changed by less than this share is not told anew."""


class Scaling:
    """Decides once a tick. Not safe for use by several threads; the controller's event loop owns it."""

    def __init__(self, control: Control, config: ControllerScalingConfig) -> None:
        self.config = config
        self.overrides = Overrides()
        self.book = AdviceBook()
        self._control = control
        self._round = ScalingRound()
        self._decisions: dict[str, RoundDecision] = {}
        self._before: dict[str, Traffic] = {}
        self._before_s: float | None = None
        self._starts: dict[str, deque[float]] = {}
        self._started: set[tuple[str, int]] = set()
        self._breaches: set[tuple[str, str]] = set()
        self._advised_s: float | None = None
        self._told: tuple[TierScaling, ...] = ()
        control.applies = config.mode == "apply"

    # --- what comes in ------------------------------------------------------------------------------------

    def configure(self, config: ControllerScalingConfig) -> None:
        """Other settings from now on. Targets of a mode that no longer applies end."""
        if self.config.mode == "apply" and config.mode != "apply":
            by_scaling = [name for name in self._control.published if not self.overrides.of(name)]
            self._control.unpublish(by_scaling)
        self.config = config
        self._control.applies = config.mode == "apply"

    def scale(self, name: str, replicas: int | None, for_s: float | None, reason: str) -> ActionAnswer:
        """Give a tier that number of replicas, for a while or until this is ended; None ends it. It wins over
        the policy; a tier that is drained or held has none all the same."""
        control = self._control
        spec = next((item for item in control.registry.tiers if item.name == name), None)
        if spec is None:
            known = ", ".join(item.name for item in control.registry.tiers)
            return ActionAnswer(Outcome.UNKNOWN, f"there is no tier '{name}': there is {known}")
        if spec.scaling is None:
            return ActionAnswer(
                Outcome.REFUSED, f"tier {name}: it runs elsewhere, no replicas are here", (name,)
            )
        reason = reason or "an operator says so"
        if replicas is None:
            if not self.overrides.end(name):
                return ActionAnswer(Outcome.UNCHANGED, "no number was set by hand", (name,))
            control.unpublish([name])
            control.registry.note("scaling resumed", name, reason, name, actor=OPERATOR)
            return ActionAnswer(Outcome.DONE, f"tier {name}: no longer set by hand", (name,))
        if not 0 <= replicas <= spec.scaling.ceiling:
            setting = "tiers[].scaling.max_replicas"
            text = f"tier {name}: 0 to {spec.scaling.ceiling} replicas ({setting}), not {replicas}"
            return ActionAnswer(Outcome.REFUSED, text, (name,))
        until = None if for_s is None else control.unix_s() + for_s
        if not self.overrides.set(name, Override(replicas, reason, until)):
            return ActionAnswer(Outcome.UNCHANGED, "it was so already", (name,))
        text = f"{replicas} replicas{'' if for_s is None else f' for {for_s:g} s'}"
        control.registry.note("scale", name, f"{text}: {reason}", name, actor=OPERATOR)
        return ActionAnswer(Outcome.DONE, f"tier {name}: {text}", (name,))

    def wakes(self, info: GatewayInfo) -> bool:
        """Whether a gateway's report is reason not to wait for the next tick: somebody asks for a tier that
        has no replica and is to have none."""
        control = self._control
        asked = {item.subject for item in info.traffic if item.waiting or item.in_flight}
        asked |= {
            item.subject
            for item in info.traffic
            if item.arrived > control.demand.book.last(info.gateway_id, item.subject).arrived
        }
        bases = control.bases()
        return any(bases.get(name) == 0 for name in asked & {spec.name for spec in control.registry.tiers})

    # --- the tick -----------------------------------------------------------------------------------------

    def tick(self) -> tuple[Given, ...]:
        """One look at all tiers: new targets, and the advice that is new."""
        control = self._control
        now_s, unix_s = control.now_s(), control.unix_s()
        for tier in self.overrides.expire(unix_s):
            control.registry.note("scaling resumed", tier, "the time of the number set by hand is over", tier)
            control.unpublish([tier])
        specs = {spec.name: spec for spec in control.registry.tiers if spec.scaling is not None}
        self._learn_starts()
        self._round.configure(self._rule(spec) for spec in specs.values())
        control.demand.look(specs, control.registry.endpoints, now_s)
        if not control.settled or control.registry.warming or not specs:
            return ()
        interval_s = 0.0 if self._before_s is None else now_s - self._before_s
        bases = control.bases()
        observations = [
            self._observe(spec, bases[name], now_s, unix_s, interval_s) for name, spec in specs.items()
        ]
        self._before_s = now_s
        decisions = self._round.decide(observations, self._gpus())
        self._decisions = {decision.tier: decision for decision in decisions}
        self._publish(specs, decisions, unix_s)
        new = self._advise(specs, now_s, unix_s)
        self._tell()
        return new

    def _rule(self, spec: TierSpec) -> TierRule:
        plan = _plan(spec)
        if plan.cold_start_fixed:
            return plan.rule
        settings = replace(plan.rule.settings, cold_start_s=self.cold_start_s(spec))
        return replace(plan.rule, settings=settings)

    def cold_start_s(self, spec: TierSpec) -> float:
        """From an order to an answer: as configured, or the longest of the last starts."""
        plan = _plan(spec)
        seen = self._starts.get(spec.name)
        if plan.cold_start_fixed or not seen:
            return plan.rule.settings.cold_start_s
        return max(seen) + PLACING_S

    def _learn_starts(self) -> None:
        endpoints = self._control.registry.endpoints
        for endpoint in endpoints.values():
            key = endpoint.endpoint_id, endpoint.generation
            if endpoint.state is not EndpointState.READY or key in self._started:
                continue
            self._started.add(key)
            took_s = endpoint.since_unix_s - endpoint.started_unix_s
            if endpoint.generation == 1 and endpoint.started_unix_s > 0 and took_s > 0:
                self._starts.setdefault(endpoint.tier, deque(maxlen=STARTS_KEPT)).append(took_s)
        self._started = {key for key in self._started if key[0] in endpoints}

    def _gpus(self) -> float | None:
        """What all tiers together may hold: as configured, or those that there are and can be used."""
        if self.config.gpus is not None:
            return self.config.gpus
        fleet = self._control.fleet
        if not fleet.records:
            return None
        return float(sum(not record.out_of_use for record in fleet.records.values()))

    def _observe(
        self, spec: TierSpec, target: int, now_s: float, unix_s: float, interval_s: float
    ) -> TierObservation:
        control = self._control
        reading = control.demand.book.reading(spec.name)
        before = self._before.get(spec.name)
        self._before[spec.name] = reading
        gained = since(reading, before) if before is not None else None
        if gained is not None and (gained.arrived < 0 or gained.served < 0):
            gained = None
        heard_s, limits = control.demand.book.heard_s(), control.demand.limits(control.heartbeat_s)

        def now(value: float) -> Signal:
            return judge(
                value, heard_s, now_s, limits, "" if heard_s is not None else "no gateway has reported"
            )

        nothing = missing("no request ended in the interval")
        ok = gained.ok if gained is not None else 0
        hit = self._prefix_hit_ratio(spec.name, now_s)
        override = self.overrides.of(spec.name)
        mine = [item for item in control.registry.endpoints.values() if item.tier == spec.name]
        return TierObservation(
            tier=spec.name,
            now_s=now_s,
            unix_s=unix_s,
            target=target,
            ready=sum(item.state in SERVING for item in mine),
            interval_s=interval_s,
            arrivals=missing("first look") if gained is None else now(gained.arrived),
            in_flight=now(reading.in_flight),
            queued=now(reading.waiting),
            input_tokens=now(gained.prompt_tokens / ok * (1.0 - hit)) if gained and ok else nothing,
            output_tokens=now(gained.generated_tokens / ok) if gained and ok else nothing,
            finished=gained.judged if gained is not None else 0,
            missed=gained.missed if gained is not None else 0,
            engines=tuple(self._engines(mine, now_s, hit)),
            override=override.replicas if override is not None else None,
        )

    def _prefix_hit_ratio(self, tier: str, now_s: float) -> float:
        """Share of prompt tokens that prefix caches had; 0 where engines don't say."""
        engines = self._control.engines
        ratios = [
            value
            for name, endpoint in self._control.registry.endpoints.items()
            if endpoint.tier == tier and name in engines
            if (value := engines[name].prefix_hit_ratio(now_s).fresh) is not None
        ]
        return min(1.0, sum(ratios) / len(ratios)) if ratios else 0.0

    def _engines(
        self, endpoints: Iterable[Endpoint], now_s: float, hit: float
    ) -> Iterable[EngineObservation]:
        for endpoint in endpoints:
            telemetry = self._control.engines.get(endpoint.endpoint_id)
            if telemetry is None or endpoint.state is not EndpointState.READY:
                continue
            load, busy = telemetry.load(now_s), telemetry.busy(now_s)
            generated, prompted = load.generation_tokens_per_s.fresh, load.prompt_tokens_per_s.fresh
            if busy is None or generated is None or prompted is None:
                continue
            yield EngineObservation(generated, prompted * (1.0 - hit), busy.batch, busy.ratio)

    # --- what goes out ------------------------------------------------------------------------------------

    def _publish(
        self, specs: Mapping[str, TierSpec], decisions: Iterable[RoundDecision], unix_s: float
    ) -> None:
        targets = {}
        for decision in decisions:
            plan = _plan(specs[decision.tier])
            by_hand = self.overrides.of(decision.tier)
            if by_hand is None and not (plan.follows and self.config.mode == "apply"):
                continue
            reason = f"set by hand: {by_hand.reason}" if by_hand is not None else decision.reason
            targets[decision.tier] = TierTarget(decision.target, reason, unix_s + TARGET_TTL_S)
            if decision.target != decision.before:
                self._control.registry.note(
                    "scaled",
                    decision.tier,
                    f"{decision.before} -> {decision.target}: {reason}",
                    decision.tier,
                )
        self._control.publish(targets)

    def figures(self) -> dict[str, TierFigures]:
        """The last minutes of every tier."""
        control = self._control
        return control.demand.figures(control.now_s(), control.heartbeat_s, self.config.window_s)

    def conditions(self, specs: Iterable[TierSpec], now_s: float) -> dict[str, TierCondition]:
        """What advice looks at."""
        figures = self.figures()
        found = {}
        for spec in specs:
            plan, seen = _plan(spec), figures[spec.name]
            scaler = self._round.scaler(spec.name)
            mine = [e for e in self._control.registry.endpoints.values() if e.tier == spec.name]
            gpu, memory, name = self._busiest(mine, seen, spec, now_s)
            latency = seen.latency_p95_s
            found[spec.name] = TierCondition(
                tier=spec.name,
                replicas=sum(item.state not in ENDED for item in mine),
                min_replicas=plan.rule.settings.min_replicas,
                max_replicas=plan.rule.settings.max_replicas,
                gpus_per_replica=plan.rule.gpus_per_replica,
                tensor_parallel=plan.tensor_parallel,
                gpu_ratio=gpu,
                load_name=name,
                memory_ratio=memory,
                kv_ratio=self._fullest(mine, now_s),
                latency_ms=replace(latency, value=None if latency.value is None else latency.value * 1000),
                queue=seen.waiting,
                error_ratio=seen.failed_ratio,
                requests_per_s=seen.arrivals_per_s,
                attainment=seen.attainment,
                capacity=scaler.capacity,
                work=scaler.work,
                bounds=scaler.bounds,
            )
        return found

    def _busiest(
        self, endpoints: Iterable[Endpoint], seen: TierFigures, spec: TierSpec, now_s: float
    ) -> tuple[Signal, Signal, str]:
        """Utilisation and memory of the tier's busiest and fullest GPU; without GPUs, the used share of its
        slots and nothing."""
        fleet = self._control.fleet
        endpoints = list(endpoints)
        uuids = {uuid for endpoint in endpoints for uuid in endpoint.gpu_uuids}
        signals = [fleet.signals(uuid, now_s) for uuid in uuids if uuid in fleet.records]
        if signals:
            return (
                _highest([item.gpu_ratio for item in signals]),
                _highest([item.memory_used_ratio for item in signals]),
                "GPU utilisation",
            )
        slots = spec.concurrency_limit * sum(item.state in SERVING for item in endpoints)
        busy = seen.in_flight
        if uuids or not slots or busy.value is None:
            return (
                missing("its GPUs are not measured"),
                missing("its GPUs are not measured"),
                "GPU utilisation",
            )
        used = replace(busy, value=busy.value / slots)
        return used, missing("it has no GPU"), "the used share of its slots"

    def _fullest(self, endpoints: Iterable[Endpoint], now_s: float) -> Signal:
        engines = self._control.engines
        known = [
            engines[item.endpoint_id].load(now_s).kv_usage_ratio
            for item in endpoints
            if item.endpoint_id in engines
        ]
        return _highest(known)

    def _advise(self, specs: Mapping[str, TierSpec], now_s: float, unix_s: float) -> tuple[Given, ...]:
        conditions = self.conditions(specs.values(), now_s)
        for item in self.book.judge(conditions, unix_s, self.config.score_after_s):
            told = item.score.reason if item.score is not None else "nothing was measured"
            self._control.registry.note("advice judged", item.advice.instance, told, item.advice.instance)
        found = self._all_advice(specs, conditions)
        breaches = {(item.instance, item.kind.value) for item in found}
        due = self._advised_s is None or now_s - self._advised_s >= self.config.advice_interval_s
        fresh = [item for item in found if due or (item.instance, item.kind.value) not in self._breaches]
        self._breaches = breaches
        if due:
            self._advised_s = now_s
        new = self.book.give(fresh, conditions, unix_s)
        for item in new:
            text = f"{item.advice.suggestion} ({'; '.join(item.advice.reasons)})"
            self._control.registry.note(
                item.advice.kind.value, item.advice.instance, text, item.advice.instance
            )
        return new

    def _all_advice(
        self, specs: Mapping[str, TierSpec], conditions: Mapping[str, TierCondition]
    ) -> tuple[Recommendation, ...]:
        """Each tier is judged by its own SLO; who may give to whom is the same for all."""
        gpus = self._gpus()
        free = None
        if gpus is not None:
            free = gpus - sum(item.replicas * item.gpus_per_replica for item in conditions.values())
        thresholds = self.config.thresholds
        attainments = {name: _plan(spec).rule.settings.slo.attainment for name, spec in specs.items()}
        found: dict[str, Recommendation] = {}
        for attainment in dict.fromkeys(attainments.values()):
            for item in advise(tuple(conditions.values()), thresholds.thresholds(attainment), free):
                if attainments[item.instance] == attainment:
                    found[item.instance] = item
        return tuple(found.values())

    def _tell(self) -> None:
        """What gateways show, when it is worth telling."""
        kinds = {item.advice.instance: item.advice.kind.value for item in self.book.open}
        told = {item.tier: item for item in self._told}
        new = []
        bases = self._control.bases()
        for decision in self._decisions.values():
            forecast = decision.asked.forecast.mean_per_s if decision.asked.forecast is not None else 0.0
            last = told.get(decision.tier)
            if last is not None and abs(forecast - last.forecast_per_s) <= FORECAST_STEP * max(
                forecast, last.forecast_per_s
            ):
                forecast = last.forecast_per_s
            target = bases.get(decision.tier, 0)
            new.append(
                TierScaling(decision.tier, target, decision.target, forecast, kinds.get(decision.tier, ""))
            )
        if tuple(new) != self._told:
            self._told = tuple(new)
            self._control.registry.tell_scaling(self._told)

    def report(self) -> ScalingReport:
        """For people."""
        control = self._control
        bases = control.bases()
        views = []
        for spec in control.registry.tiers:
            if spec.scaling is None:
                continue
            decision = self._decisions.get(spec.name)
            override = self.overrides.of(spec.name)
            mine = [item for item in control.registry.endpoints.values() if item.tier == spec.name]
            mode = self.config.mode if spec.scaling.follows else "fixed"
            forecast = decision.asked.forecast if decision is not None else None
            views.append(
                TierScalingView(
                    tier=spec.name,
                    replicas=sum(item.state in SERVING for item in mine),
                    target=bases[spec.name],
                    wanted=decision.target if decision is not None else bases[spec.name],
                    reason=decision.reason if decision is not None else "not looked at yet",
                    mode="by hand" if override is not None else mode,
                    forecast_per_s=forecast.mean_per_s if forecast is not None else None,
                    each_per_s=self._round.scaler(spec.name).each_per_s if decision is not None else 0.0,
                    cold_start_s=self.cold_start_s(spec),
                    confidence=decision.asked.confidence if decision is not None else 0.0,
                    override=override,
                )
            )
        return ScalingReport(self.config.mode, tuple(views), self.book.given, self.book.record())

    # --- what is kept -------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """What has to survive the controller, as JSON values by key."""
        found = {_OVERRIDE + tier: value for tier, value in self.overrides.values().items()}
        found |= {_ADVICE + number: value for number, value in self.book.values().items()}
        found |= {_STARTS + tier: list(seen) for tier, seen in self._starts.items()}
        found |= {_TARGET + tier: target.replicas for tier, target in self._control.published.items()}
        return found

    def restore(self, values: Mapping[str, Any]) -> None:
        """What was stored before; targets hold on until new ones are worked out."""

        def under(prefix: str) -> dict[str, Any]:
            return {key.removeprefix(prefix): each for key, each in values.items() if key.startswith(prefix)}

        self.overrides.restore(under(_OVERRIDE))
        self.book.restore(under(_ADVICE))
        for tier, seen in under(_STARTS).items():
            self._starts[tier] = deque(seen, maxlen=STARTS_KEPT)
        until_s = self._control.unix_s() + TARGET_TTL_S
        self._control.publish(
            {
                tier: TierTarget(replicas, "as before the controller's restart", until_s)
                for tier, replicas in under(_TARGET).items()
            }
        )


_OVERRIDE, _ADVICE, _STARTS, _TARGET = "override/", "advice/", "starts/", "target/"
KEPT: Final = (_OVERRIDE, _ADVICE, _STARTS, _TARGET)
"""Keys of what is kept begin with one of these."""


def _plan(spec: TierSpec) -> ScalingPlan:
    if spec.scaling is None:
        raise ValueError(f"nothing is known of the scaling of tier '{spec.name}'")
    return spec.scaling


def _highest(signals: Iterable[Signal]) -> Signal:
    """The highest of the fresh ones; MISSING if there is none."""
    fresh = [item for item in signals if item.freshness is Freshness.FRESH and item.value is not None]
    return max(fresh, key=lambda item: item.value or 0.0) if fresh else missing("nothing fresh is known")
