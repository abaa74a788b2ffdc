"""Decides how many replicas a tier needs: from observations to a target with its reason.

Each tier has a :class:`TierScaler`. Every tick it gets a :class:`TierObservation` and returns a
:class:`ScalingDecision`; it neither measures nor acts. The tier needs the largest of three numbers:

* the replicas for the load that is forecast for when a replica ordered now is ready (:mod:`.forecast`,
  :mod:`.capacity`),
* the replicas for the queue that will be left by then,
* the replicas for the requests in flight now.

The rate (the forecast or the mean of an hour) and the headroom above it are those that would have met the SLO
at the lowest cost with the arrivals of the last hours (:mod:`.headroom`). A replica that is no longer
needed is retained for as long as a new one would take to start (:mod:`.target_limits`).
"""

from __future__ import annotations

import math
from typing import Final

from controlplane.core.autoscaling.capacity import LatencyBounds, ReplicaCapacity
from controlplane.core.autoscaling.decision import ScalingDecision, TierObservation
from controlplane.core.autoscaling.forecast import Forecast, Forecaster
from controlplane.core.autoscaling.headroom import Headroom, HeadroomTerms
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.autoscaling.schedules import bounds_at
from controlplane.core.autoscaling.target_limits import WATCH_S, TargetLimits
from controlplane.core.domain.request import RequestShape

_RUSH_S: Final = 60.0
"""A rate of the last seconds that exceeds the forecast is assumed to last this long."""
_SETTLE_S: Final = 30.0
"""A forecast that is based on less time orders no replicas."""
_COMPARED: Final = 60
"""The forecast is trusted alone once this many forecasts were compared with the actual rate."""
_SHAPE_SPAN_S: Final = 600.0
_GUESS_WEIGHT: Final = 2.0
"""The assumed mean request weighs as much as this many measured ones."""
_KNOWN_AFTER: Final = 20.0
"""The mean request is known well enough after this many measured requests."""
_DRAIN_S: Final = 30.0
"""A queue should be empty this long after the replicas that were ordered for it are ready."""


class TierScaler:
    """The scaling of one tier."""

    def __init__(self, rule: ScalingRule) -> None:
        self.rule = rule
        self.capacity = ReplicaCapacity(rule.prior)
        self.mean_request = rule.mean_request
        """Assumed at first, then measured."""
        self.forecaster = Forecaster(rule.cold_start_s, rule.window_s)
        self._measured_requests = 0.0
        self.headroom = Headroom(self._terms)
        self._limits = TargetLimits()
        self._active_s: float | None = None
        """When there last was a request."""

    @property
    def bounds(self) -> LatencyBounds:
        """The upper bounds on the load of one replica."""
        return LatencyBounds(self.rule.sequences, self.rule.slo.itl_s)

    @property
    def each_per_s(self) -> float:
        """The estimated rate of requests that one replica can serve within its bounds."""
        request = self.mean_request
        return self.capacity.requests_per_s(request, self.capacity.most_sequences(request, self.bounds))

    @property
    def patience_s(self) -> float:
        """How long a request can wait for a slot and still get its first token in time."""
        prompt_s = self.mean_request.input_tokens * self.capacity.speed.prompt_s_per_token
        return max(self.rule.slo.ttft_s - 2 * prompt_s, 0.5)

    @property
    def _terms(self) -> HeadroomTerms:
        rule = self.rule
        return HeadroomTerms(rule.slo.attainment, rule.cold_start_s, rule.resolved_hold_s, self.patience_s)

    def adopt(self, rule: ScalingRule) -> None:
        """Use another rule with the same ``prior`` from now on; what was learned remains."""
        window_s = rule.window_s
        if (rule.cold_start_s, window_s) != (self.forecaster.horizon_s, self.forecaster.window_s):
            self.forecaster.set_horizon(rule.cold_start_s, window_s)
        self.rule = rule
        self.headroom.adopt(self._terms)

    def decide(self, seen: TierObservation) -> ScalingDecision:
        """Learn from the observation, and decide on a target with its reason."""
        forecast = self._learn(seen)
        self._limits.observe(seen)
        rule = self.rule
        lowest, highest = bounds_at(
            rule.schedules, seen.unix_s, rule.cold_start_s, rule.min_replicas, rule.max_replicas
        )
        if seen.override is not None:
            target, needed_per_s, reason = seen.override, seen.override * self.each_per_s, "set by hand"
        else:
            needed, needed_per_s, reason = self._needed(seen, forecast)
            if lowest == 0 and needed <= 1:
                # Whether the last replica stays depends on the idle time, not on the forecast.
                needed = 0 if self._idle_long(seen) else 1
                needed_per_s = needed * self.each_per_s
                word = "no" if needed == 0 else "a"
                reason = f"{word} request came in the last {rule.idle_to_zero_s:g} s"
            target, reason = self._limits.target(rule, seen, needed, reason, lowest, highest)
        return ScalingDecision(
            tier=seen.tier,
            before=seen.target,
            target=target,
            reason=reason,
            requested=target,
            needed_per_s=needed_per_s,
            lowest=lowest,
            blind=bool(seen.blind),
            forecast=forecast,
            confidence=math.sqrt(forecast.confidence * max(self.capacity.confidence, 0.1)),
        )

    def _learn(self, seen: TierObservation) -> Forecast:
        arrivals = seen.arrivals.fresh
        if arrivals is not None:
            self.forecaster.observe(seen.now_s, arrivals, seen.interval_s)
        forecast = self.forecaster.forecast(seen.now_s)
        for engine in seen.engines:
            self.capacity.observe(engine, seen.interval_s)
        prompt, generated = seen.input_tokens.fresh, seen.output_tokens.fresh
        if prompt is not None and generated is not None and generated > 0:
            self._measured_requests += seen.finished
            # The first requests weigh more than their share of the time: the mean was only assumed before.
            share = max(
                -math.expm1(-seen.interval_s / _SHAPE_SPAN_S),
                seen.finished / (self._measured_requests + _GUESS_WEIGHT),
            )
            mean = self.mean_request
            self.mean_request = RequestShape(
                mean.input_tokens + share * (prompt - mean.input_tokens),
                mean.output_tokens + share * (generated - mean.output_tokens),
            )
        self._learn_headroom(seen, forecast)
        # A tier that has replicas at the first observation may have been busy just before.
        first = self._active_s is None
        if arrivals or seen.in_flight.value or seen.queued.value or (first and seen.target > 0):
            self._active_s = seen.now_s
        elif first:
            self._active_s = -math.inf
        return forecast

    def _learn_headroom(self, seen: TierObservation, forecast: Forecast) -> None:
        arrivals = seen.arrivals.fresh
        if arrivals is not None and self._limits.watched_s(seen.now_s) >= WATCH_S:
            self.headroom.observe(
                seen.now_s,
                seen.interval_s,
                arrived=arrivals,
                each_per_s=self.each_per_s,
                forecasts_per_s=_rates(forecast),
                patience_s=self.patience_s,
            )
        self.headroom.choose(
            seen.now_s,
            seen.interval_s,
            finished=seen.finished,
            missed=seen.missed,
            queued=bool(seen.queued.value),
            expected_per_s=forecast.mean_per_s,
        )

    def _needed(self, seen: TierObservation, forecast: Forecast) -> tuple[int, float, str]:
        """The replicas that the tier needs, the rate of requests that they are to serve, and the reason."""
        rule = self.rule
        slots = self.capacity.most_sequences(self.mean_request, self.bounds)
        each_per_s = self.capacity.requests_per_s(self.mean_request, slots)
        factor = self.headroom.factor
        choice = self.headroom.choice.forecast
        base = _rates(forecast)[choice]
        rate = base * factor
        by_forecast = math.ceil(rate / each_per_s - 1e-9)
        if rate * rule.cold_start_s < 0.05 and not seen.queued.value:
            by_forecast = 0
        if self._limits.watched_s(seen.now_s) < _SETTLE_S:
            by_forecast = min(by_forecast, seen.target)
        # The queue that is left when a replica ordered now is ready, beyond what may wait then.
        lead_s = max(rule.cold_start_s, 2 * rule.tick_s)
        queued = seen.queued.value or 0.0
        # After a step of the rate the mixture of forecasts is slow to follow.
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
        if self._measured_requests < _KNOWN_AFTER:
            # The capacity of a replica is still an assumption, which alone orders no replicas.
            by_forecast = min(by_forecast, max(seen.target, by_queue, by_flight, 1))
        needed = max(by_forecast, by_queue, by_flight)
        needed_per_s = needed * each_per_s
        if needed > max(by_queue, by_flight):
            needed_per_s = min(needed_per_s, rate)
        if needed == by_forecast:
            reason = (
                f"{base:.2f} requests/s are forecast for {rule.cold_start_s:.0f} s "
                f"from now ({_RATE_NAMES[choice]}), {rate:.2f} with a headroom of {factor:.2f} times; a "
                f"replica carries {each_per_s:.2f} with {slots:.0f} at once"
            )
        elif needed == by_queue:
            reason = f"{queued:.0f} requests wait and {left:.0f} would still when a new replica is ready"
        else:
            reason = f"{seen.in_flight.value or 0.0:.0f} requests run, {slots:.0f} on a replica"
        return needed, needed_per_s, reason

    def _idle_long(self, seen: TierObservation) -> bool:
        return self._active_s is not None and seen.now_s - self._active_s >= self.rule.idle_to_zero_s


_RATE_NAMES: Final = ("by the forecast or, if that is more, the mean of 10 min", "by the mean of an hour")


def _rates(forecast: Forecast) -> tuple[float, float]:
    """A rate that follows the load quickly, and a steady one."""
    quick = max(forecast.mean_per_s, forecast.lasting_per_s)
    if forecast.scored < _COMPARED:
        # It is not known yet which bids are good for this tier, so the rate that is certain is a minimum.
        quick = max(quick, forecast.surely_per_s)
    return quick, forecast.steady_per_s
