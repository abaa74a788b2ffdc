"""How many replicas a tier should have: from what is observed to a target, with every reason.

One :class:`TierScaler` per tier is given a :class:`TierObservation` each tick and answers with a
:class:`ScalingDecision`; it neither measures nor acts. The target is the largest of

* what the forecast asks for when a replica ordered now is ready (:mod:`.forecast`, :mod:`.capacity`),
* what the queue asks for that will be left by then,
* what is in flight at this moment.

Which rate it goes by, the forecast or the mean of an hour, and how far above it, is what would have kept the
SLO at the least cost with the arrivals of the last hours (:mod:`.headroom`). A replica that is not needed any
more is kept for as long as a new one would take to come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from controlplane.core.autoscaling.capacity import EngineSpeed, LatencyBounds, ReplicaCapacity, RequestShape
from controlplane.core.autoscaling.counterfactuals import SlidingMaximum
from controlplane.core.autoscaling.forecast import Forecast, Forecaster
from controlplane.core.autoscaling.headroom import Headroom, HeadroomTerms
from controlplane.core.autoscaling.schedules import Schedule, bounds_at
from controlplane.core.domain.slo import Slo
from controlplane.core.telemetry.series import Signal, missing

_NOT_MEASURED: Final = missing("not measured")
_RUSH_S: Final = 60.0
"""What the last seconds show above the forecast is taken to last so long."""
_SETTLE_S: Final = 30.0
"""A forecast from less than this orders nothing."""
_COMPARED: Final = 60
"""Forecasts that must have been compared with what came."""
_WORK_SPAN_S: Final = 600.0
_GUESS_WEIGHT: Final = 2.0
"""So many requests weigh as much as the guess of what they are like."""
_KNOWN_AFTER: Final = 20.0
"""After so many requests it is known well enough what they are like."""
_DRAIN_S: Final = 30.0
"""A queue should be gone so long after the replicas that were ordered for it are ready."""
_WATCH_S: Final = 300.0
"""Nothing goes before a tier was watched for so long, unless the configuration sets the hold time: a
controller that has just started knows little."""


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """What the configuration asks of a tier's scaling."""

    min_replicas: int = 1
    max_replicas: int = 10
    step_up: int | None = None
    """Replicas added at once at most; None: as many as are needed."""
    step_down: int | None = None
    cool_down_up_s: float = 0.0
    """Between two orders of more."""
    cool_down_down_s: float = 0.0
    hold_s: float | None = None
    """How long a lower target must last before replicas go; None: one cold start and half a minute."""
    cold_start_s: float = 60.0
    """From the order of a replica until it answers."""
    idle_to_zero_s: float = 600.0
    """With ``min_replicas`` 0: no request for so long and the last replica goes."""
    tick_s: float = 5.0
    sequences: float = 10.0
    """Requests that one replica may run at once."""
    slo: Slo = field(default_factory=Slo)
    schedules: tuple[Schedule, ...] = ()

    @property
    def resolved_hold_s(self) -> float:
        """How long a lower target must last."""
        # Past its cold start a replica must last for a while, or nothing was won by ordering it.
        return self.cold_start_s + self.window_s if self.hold_s is None else self.hold_s

    @property
    def window_s(self) -> float:
        """What is forecast is the mean rate over so long."""
        return max(2 * self.tick_s, 30.0)


@dataclass(frozen=True, slots=True)
class EngineObservation:
    """One busy engine over the last tick, for learning its speed."""

    generation_tokens_per_s: float
    prompt_tokens_per_s: float
    """Computed, without prefix hits."""
    batch: float
    """Sequences that decoded, the mean over the time it was busy."""
    busy_ratio: float


@dataclass(frozen=True, slots=True)
class TierObservation:
    """One tier at one moment. Signals that can't be had are MISSING, never 0."""

    tier: str
    now_s: float
    unix_s: float
    target: int
    """Replicas that are ordered, ready or not."""
    ready: int
    interval_s: float
    """Since the observation before."""
    arrivals: Signal
    """Requests that came for this tier in the interval, whatever became of them."""
    in_flight: Signal
    queued: Signal
    input_tokens: Signal = _NOT_MEASURED
    """Mean per request over the window; computed ones only."""
    output_tokens: Signal = _NOT_MEASURED
    finished: float = 0.0
    """Requests that ended in the interval, however."""
    missed: float = 0.0
    """Those of them that did not keep the SLO."""
    engines: tuple[EngineObservation, ...] = ()
    override: int | None = None
    """A number of replicas that a person set: it wins."""


class ScaleDirection(StrEnum):
    """What a decision does."""

    UP = "up"
    DOWN = "down"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """A target and why."""

    tier: str
    target: int
    move: ScaleDirection
    reason: str
    wanted: int
    """Before bounds, holds and steps."""
    needed_per_s: float = 0.0
    """Requests a second that these are to carry: all that they can, or where only the forecast asks for so
    many, what it asks for."""
    lowest: int = 0
    """The least that the bounds allow now."""
    blind: bool = False
    """A signal that it needs is not fresh."""
    forecast: Forecast | None = None
    headroom: float = 0.0
    confidence: float = 0.0


class TierScaler:
    """The scaling of one tier."""

    def __init__(self, tier: str, settings: ScalingSettings, prior: EngineSpeed, work: RequestShape) -> None:
        self.tier = tier
        self.settings = settings
        self.capacity = ReplicaCapacity(prior)
        self.work = work
        """The mean request; a guess at first."""
        self.forecaster = Forecaster(settings.cold_start_s, settings.window_s)
        self._requests = 0.0
        self.headroom = Headroom(self._terms)
        self._wanted = SlidingMaximum()
        self._since_s: float | None = None
        self._up_s = -math.inf
        self._down_s = -math.inf
        self._decided: tuple[float, int] | None = None
        """The observation before: its time and target."""
        self._active_s: float | None = None
        """When there last was any request."""

    @property
    def bounds(self) -> LatencyBounds:
        """What one replica must keep."""
        return LatencyBounds(self.settings.sequences, self.settings.slo.itl_s)

    @property
    def each_per_s(self) -> float:
        """Requests a second that one replica carries inside its bounds, as far as is known."""
        return self.capacity.requests_per_s(self.work, self.capacity.most_sequences(self.work, self.bounds))

    @property
    def _terms(self) -> HeadroomTerms:
        settings = self.settings
        return HeadroomTerms(
            settings.slo.attainment, settings.cold_start_s, settings.resolved_hold_s, self.patience_s
        )

    def adopt(self, settings: ScalingSettings) -> None:
        """Other settings from now on; what was learned stays."""
        window_s = settings.window_s
        if (settings.cold_start_s, window_s) != (self.forecaster.horizon_s, self.forecaster.window_s):
            self.forecaster.aim(settings.cold_start_s, window_s)
        self.settings = settings
        self.headroom.adopt(self._terms)

    def decide(self, seen: TierObservation) -> ScalingDecision:
        """The target after this observation."""
        forecast = self._learn(seen)
        self._note_moves(seen)
        settings = self.settings
        lowest, highest = bounds_at(
            settings.schedules,
            seen.unix_s,
            settings.cold_start_s,
            settings.min_replicas,
            settings.max_replicas,
        )
        blind = _blind(seen)
        wanted, needed_per_s, why = self._wanted_now(seen, forecast)
        if seen.override is not None:
            wanted = target = seen.override
            needed_per_s = wanted * self.each_per_s
            why = "set by hand"
        else:
            if lowest == 0 and wanted <= 1:
                # One replica or none is not the forecast's to say: it is kept for so long, and no longer.
                wanted = 0 if self._idle_long(seen) else 1
                needed_per_s = wanted * self.each_per_s
                word = "no" if wanted == 0 else "a"
                why = f"{word} request came in the last {settings.idle_to_zero_s:g} s"
            target, why = self._bounded(seen, wanted, why, lowest, highest, blind)
        move = (
            ScaleDirection.UP
            if target > seen.target
            else ScaleDirection.DOWN
            if target < seen.target
            else ScaleDirection.STAY
        )
        confidence = math.sqrt(forecast.confidence * max(self.capacity.confidence, 0.1))
        return ScalingDecision(
            self.tier,
            target,
            move,
            why,
            wanted,
            needed_per_s,
            lowest,
            bool(blind),
            forecast,
            self.headroom.factor,
            confidence,
        )

    def _bounded(
        self, seen: TierObservation, wanted: int, why: str, lowest: int, highest: int, blind: str
    ) -> tuple[int, str]:
        """What is wanted inside bounds, holds, cool-downs and steps."""
        bounded = min(max(wanted, lowest), highest)
        if bounded != wanted:
            why = f"{why}; the bounds are {lowest} to {highest}"
        if seen.target > highest:
            return highest, f"the bounds are {lowest} to {highest}"
        held = self._hold(seen.now_s, bounded)
        if self._since_s is None:
            self._since_s = seen.now_s - seen.interval_s
        if bounded > seen.target:
            return self._up(seen, bounded, why, urgent=seen.target < lowest)
        if blind:
            return seen.target, f"never down on what is not known: {blind}"
        hold_s = self.settings.resolved_hold_s
        watch_s = _WATCH_S if self.settings.hold_s is None else hold_s
        watched_s = seen.now_s - self._since_s
        if held < seen.target and watched_s < watch_s:
            return seen.target, f"{why}; this tier was watched for only {watched_s:.0f} s"
        if held < seen.target:
            return self._down(seen, held, why)
        if bounded < seen.target:
            why = f"{why}; the last {hold_s:.0f} s asked for {held}"
        return seen.target, why

    def _note_moves(self, seen: TierObservation) -> None:
        """Cool-downs run from moves that were carried out, whoever made them, not from what was advised."""
        if self._decided is not None:
            at_s, target = self._decided
            if seen.target > target:
                self._up_s = at_s
            elif seen.target < target:
                self._down_s = at_s
        self._decided = seen.now_s, seen.target

    def _learn(self, seen: TierObservation) -> Forecast:
        arrivals = seen.arrivals.fresh
        if arrivals is not None:
            self.forecaster.observe(seen.now_s, arrivals, seen.interval_s)
        forecast = self.forecaster.forecast(seen.now_s)
        for engine in seen.engines:
            self.capacity.observe(
                generation_tokens_per_s=engine.generation_tokens_per_s,
                prompt_tokens_per_s=engine.prompt_tokens_per_s,
                batch=engine.batch,
                busy_ratio=engine.busy_ratio,
                interval_s=seen.interval_s,
            )
        prompt, answer = seen.input_tokens.fresh, seen.output_tokens.fresh
        if prompt is not None and answer is not None and answer > 0:
            self._requests += seen.finished
            # The first requests count for more than their time: what they are like was only a guess before.
            share = max(
                -math.expm1(-seen.interval_s / _WORK_SPAN_S),
                seen.finished / (self._requests + _GUESS_WEIGHT),
            )
            work = self.work
            self.work = RequestShape(
                work.input_tokens + share * (prompt - work.input_tokens),
                work.output_tokens + share * (answer - work.output_tokens),
            )
        self._judge(seen, forecast)
        # One that has replicas when it is first seen may have been busy just before.
        first = self._active_s is None
        if arrivals or seen.in_flight.value or seen.queued.value or (first and seen.target > 0):
            self._active_s = seen.now_s
        elif first:
            self._active_s = -math.inf
        return forecast

    def _judge(self, seen: TierObservation, forecast: Forecast) -> None:
        """What the headroom of the last ticks was worth."""
        arrivals = seen.arrivals.fresh
        watched_s = 0.0 if self._since_s is None else seen.now_s - self._since_s
        if arrivals is not None and watched_s >= _WATCH_S:
            self.headroom.observe(
                seen.now_s,
                seen.interval_s,
                arrived=arrivals,
                each_per_s=self.each_per_s,
                forecasts_per_s=_rates(forecast),
                patience_s=self.patience_s,
            )
        self.headroom.judge(
            seen.now_s,
            seen.interval_s,
            finished=seen.finished,
            missed=seen.missed,
            queued=bool(seen.queued.value),
            expected_per_s=forecast.mean_per_s,
        )

    @property
    def patience_s(self) -> float:
        """How long a request may wait for a place and still have its first token in time."""
        prompt_s = self.work.input_tokens * self.capacity.speed.prompt_s_per_token
        return max(self.settings.slo.ttft_s - 2 * prompt_s, 0.5)

    def _wanted_now(self, seen: TierObservation, forecast: Forecast) -> tuple[int, float, str]:
        settings, work, bounds = self.settings, self.work, self.bounds
        slots = self.capacity.most_sequences(work, bounds)
        each_per_s = self.capacity.requests_per_s(work, slots)
        factor = self.headroom.factor
        followed = self.headroom.choice.forecast
        base = _rates(forecast)[followed]
        rate = base * factor
        by_forecast = math.ceil(rate / each_per_s - 1e-9)
        if rate * settings.cold_start_s < 0.05 and not seen.queued.value:
            by_forecast = 0
        if self._since_s is None or seen.now_s - self._since_s < _SETTLE_S:
            by_forecast = min(by_forecast, seen.target)
        # What will be queued once a replica ordered now is there, past what may wait then.
        lead_s = max(settings.cold_start_s, 2 * settings.tick_s)
        queued = seen.queued.value or 0.0
        # After a step the mixture of forecasts is the last to know.
        rush_per_s = max(forecast.surely_per_s - forecast.mean_per_s, 0.0)
        expected_per_s = forecast.mean_per_s + rush_per_s * min(1.0, _RUSH_S / lead_s)
        carried_per_s = max(seen.target, seen.ready) * each_per_s
        left = queued + (expected_per_s - carried_per_s) * lead_s
        by_queue = 0
        if queued > 0 and left > carried_per_s * self.patience_s:
            drain_s = max(min(lead_s, _DRAIN_S), self.patience_s)
            by_queue = math.ceil((expected_per_s + left / drain_s) / each_per_s)
        elif queued > 0:
            by_queue = 1
        by_flight = math.ceil((seen.in_flight.value or 0.0) / slots - 1e-9)
        if self._requests < _KNOWN_AFTER:
            # What a replica carries is a guess still: that alone orders nothing.
            by_forecast = min(by_forecast, max(seen.target, by_queue, by_flight, 1))
        wanted = max(by_forecast, by_queue, by_flight)
        needed_per_s = wanted * each_per_s
        if wanted > max(by_queue, by_flight):
            needed_per_s = min(needed_per_s, rate)
        if wanted == by_forecast:
            why = (
                f"{base:.2f} requests/s are forecast for {settings.cold_start_s:.0f} s "
                f"from now ({_RATE_NAMES[followed]}), {rate:.2f} with a headroom of {factor:.2f} times; a "
                f"replica carries {each_per_s:.2f} with {slots:.0f} at once"
            )
        elif wanted == by_queue:
            why = f"{queued:.0f} requests wait and {left:.0f} would still when a new replica is ready"
        else:
            why = f"{seen.in_flight.value or 0.0:.0f} requests run, {slots:.0f} on a replica"
        return wanted, needed_per_s, why

    def _idle_long(self, seen: TierObservation) -> bool:
        return self._active_s is not None and seen.now_s - self._active_s >= self.settings.idle_to_zero_s

    def _hold(self, now_s: float, wanted: int) -> int:
        """The highest target of the hold time."""
        from_s = now_s - self.settings.resolved_hold_s
        self._wanted.push(now_s, wanted, from_s)
        return int(self._wanted.since(from_s))

    def _up(self, seen: TierObservation, target: int, why: str, *, urgent: bool) -> tuple[int, str]:
        settings = self.settings
        wait_s = self._up_s + settings.cool_down_up_s - seen.now_s
        if wait_s > 0 and not urgent:
            return seen.target, f"{why}; the cool-down lasts another {wait_s:.0f} s"
        if settings.step_up is not None and target > seen.target + settings.step_up:
            target = seen.target + settings.step_up
            why = f"{why}; at most {settings.step_up} at once"
        return target, why

    def _down(self, seen: TierObservation, target: int, why: str) -> tuple[int, str]:
        settings = self.settings
        wait_s = max(self._up_s, self._down_s) + settings.cool_down_down_s - seen.now_s
        if wait_s > 0:
            return seen.target, f"{why}; the cool-down lasts another {wait_s:.0f} s"
        if settings.step_down is not None and target < seen.target - settings.step_down:
            target = seen.target - settings.step_down
            why = f"{why}; at most {settings.step_down} at once"
        return target, why


_RATE_NAMES: Final = ("by the forecast or, if that is more, the mean of 10 min", "by the mean of an hour")


def _rates(forecast: Forecast) -> tuple[float, float]:
    """One that follows soon, and one that is steady."""
    soon = max(forecast.mean_per_s, forecast.lasting_per_s)
    if forecast.scored < _COMPARED:
        # Nobody knows yet which bid is good here, so what surely comes is believed.
        soon = max(soon, forecast.surely_per_s)
    return soon, forecast.steady_per_s


def _blind(seen: TierObservation) -> str:
    """Which signals are not fresh; empty: all are."""
    named = (("arrivals", seen.arrivals), ("in flight", seen.in_flight), ("queue", seen.queued))
    return "; ".join(
        f"{name} {signal.freshness} ({signal.reason})" for name, signal in named if signal.fresh is None
    )
