"""Forecasts the rate of arrivals at the time when a replica ordered now will be ready, with its uncertainty.

An order depends on the rate in a window that begins one cold start from now. Several simple forecasters bid
for this rate: recent means over several spans, a damped trend (E. Gardner, E. McKenzie, "Forecasting trends
in time series", 1985), and the same time yesterday. Each bid is scored against the actual rate once its
window has passed, and the bids are mixed with weights that fall exponentially with the recent loss (N.
Cesa-Bianchi, G. Lugosi, "Prediction, Learning, and Games", 2006, ch. 2). The uncertainty is the spread of the
mixture's own errors over the last hour, so it needs no assumption about the traffic."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

_SPANS_S: Final = (20.0, 90.0, 600.0, 3600.0)
_TREND_SPAN_S: Final = 120.0
_DAMPING_S: Final = 300.0
"""The time constant with which a trend is damped."""
_DAY_S: Final = 86_400.0
_SLOT_S: Final = 600.0
"""Yesterday's rates are stored in slots of this length."""
_RECENT_SPAN_S: Final = 6.0
_BIDS: Final = len(_SPANS_S) + 2
"""The means, the trend and yesterday."""
_MAX_DISPERSION: Final = 2.0
"""The dispersion is capped at this when the certain part of a rush is estimated, because the rush itself
raises the dispersion."""
_ETA: Final = 6.0
"""How strongly the mixture prefers the better bids."""
_FORGET_LOSS_S: Final = 900.0
"""The time constant over which losses are forgotten, or ten horizons if that is longer."""
_ERRORS: Final = 720
"""Number of errors from which the spread is computed: an hour of ticks of 5 s."""
_RECOMPUTE: Final = 12
"""The spread is recomputed after this many new errors."""
_HIGH: Final = 0.8
_HIGH_Z: Final = 0.8416
_LEAST_SPREAD: Final = 0.03
_PRIOR_SPREAD: Final = 0.3
_PRIOR_ERRORS: Final = 24
"""The prior spread weighs as much as this many errors."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The rate of arrivals in a window that begins one horizon from now."""

    mean_per_s: float
    spread: float
    """The 80th percentile of log(actual rate / forecast), divided by 0.84. For a normal distribution this is
    the standard deviation, and a single burst hardly changes it."""
    surely_per_s: float
    """The rate of the last seconds less two standard deviations: the part that is not due to chance."""
    lasting_per_s: float
    """The mean rate of the last ten minutes."""
    steady_per_s: float
    """The mean rate of the last hour."""
    scored: int
    """Number of forecasts compared with the actual rate; if it is small, ``spread`` is mostly assumed."""

    @property
    def confidence(self) -> float:
        """How reliable the forecast is, in [0, 1]."""
        known = self.scored / (self.scored + 20.0)
        return known / (1.0 + self.spread)


class Forecaster:
    """Forecasts from counts of arrivals, which must be observed in order of time."""

    def __init__(self, horizon_s: float, window_s: float = 30.0) -> None:
        if horizon_s < 0 or window_s <= 0:
            raise ValueError("the horizon must be at least 0 and the window longer than 0")
        self.horizon_s = horizon_s
        self.window_s = window_s
        self._averages = [0.0] * len(_SPANS_S)
        self._recent = 0.0
        self._level = 0.0
        self._slope = 0.0
        self._spread = _PRIOR_SPREAD
        self._errors: deque[float] = deque(maxlen=_ERRORS)
        self._computed_at = 0
        self._losses = [0.0] * _BIDS
        self._dispersion = 1.0
        """Variance over mean of the counts of one interval: 1 for a Poisson process, more for bursts."""
        self._scored = 0
        self._seen_s = 0.0
        self._total = 0.0
        self._last_s = -math.inf
        self._cumulative: deque[tuple[float, float]] = deque()
        """(time, total arrivals until then), back to the window of the oldest pending forecast."""
        self._pending: deque[tuple[float, tuple[float, ...], float]] = deque()
        """(made at, bids, mixture)."""
        self._mixture = 0.0
        """The mixture at the last observation."""
        self._yesterday: dict[int, float] = {}
        self._slot = (-1, 0.0, 0.0)
        """The current slot: number, arrivals, seconds."""

    def observe(self, at_s: float, arrivals: float, interval_s: float) -> None:
        """Record ``arrivals`` in the ``interval_s`` before ``at_s``; ignored unless ``at_s`` is later than at
        the previous call."""
        if interval_s <= 0 or at_s <= self._last_s:
            return
        rate = arrivals / interval_s
        first = self._seen_s == 0.0
        self._seen_s += interval_s
        if first:
            self._averages = [rate] * len(_SPANS_S)
            self._recent = self._level = rate
        else:
            self._learn_shape(rate, interval_s)
        self._learn_dispersion(arrivals, interval_s)
        self._fill_slot(at_s, arrivals, interval_s)
        self._total += arrivals
        self._last_s = at_s
        self._cumulative.append((at_s, self._total))
        self._score(at_s, interval_s)
        bids = self._bids(at_s)
        self._mixture = self._mix(bids)
        self._pending.append((at_s, bids, self._mixture))

    def set_horizon(self, horizon_s: float, window_s: float) -> None:
        """Use another horizon and window from now on; forecasts that were not compared yet are dropped."""
        self.horizon_s = horizon_s
        self.window_s = window_s
        self._pending.clear()

    def forecast(self, now_s: float) -> Forecast:
        """The forecast at ``now_s``; all rates are 0 before the first observation."""
        if self._seen_s == 0.0:
            return Forecast(0.0, self._spread, 0.0, 0.0, 0.0, 0)
        # An exponential mean over a span is as certain as a plain mean over twice that.
        dispersion = min(self._dispersion, _MAX_DISPERSION)
        deviation = math.sqrt(dispersion * self._recent / (2 * _RECENT_SPAN_S))
        return Forecast(
            mean_per_s=self._mixture if now_s == self._last_s else self._mix(self._bids(now_s)),
            spread=self._spread,
            surely_per_s=max(0.0, self._recent - 2.0 * deviation),
            lasting_per_s=self._averages[2],
            steady_per_s=self._averages[3],
            scored=self._scored,
        )

    def _learn_shape(self, rate: float, interval_s: float) -> None:
        for index, span_s in enumerate(_SPANS_S):
            # Until a span has passed, its average is the plain mean since the beginning.
            share = -math.expm1(-interval_s / min(span_s, max(self._seen_s, interval_s)))
            self._averages[index] += share * (rate - self._averages[index])
        self._recent += -math.expm1(-interval_s / _RECENT_SPAN_S) * (rate - self._recent)
        share = -math.expm1(-interval_s / _TREND_SPAN_S)
        before = self._level
        self._level += share * (rate - before - self._slope * interval_s) + self._slope * interval_s
        self._slope += share * ((self._level - before) / interval_s - self._slope)

    def _learn_dispersion(self, arrivals: float, interval_s: float) -> None:
        expected = self._averages[1] * interval_s
        if expected < 1.0:
            return
        found = (arrivals - expected) ** 2 / expected
        share = -math.expm1(-interval_s / _SPANS_S[2])
        self._dispersion += share * (min(found, 1e4) - self._dispersion)
        self._dispersion = max(self._dispersion, 1.0)

    def _fill_slot(self, at_s: float, arrivals: float, interval_s: float) -> None:
        number = int(at_s % _DAY_S // _SLOT_S)
        slot, sum_, seconds = self._slot
        if slot != number and seconds > 0:
            self._yesterday[slot] = sum_ / seconds
            sum_ = seconds = 0.0
        self._slot = (number, sum_ + arrivals, seconds + interval_s)

    def _bids(self, now_s: float) -> tuple[float, ...]:
        ahead_s = self.horizon_s + self.window_s / 2
        steps_s = _DAMPING_S * -math.expm1(-ahead_s / _DAMPING_S)
        trend = max(0.0, self._level + self._slope * steps_s)
        here = self._yesterday.get(int(now_s % _DAY_S // _SLOT_S)) if self._seen_s > _DAY_S else None
        then = self._yesterday.get(int((now_s + ahead_s) % _DAY_S // _SLOT_S))
        if here is None or then is None or here <= 0:
            season = self._averages[1]
        else:
            # Yesterday's change of the rate, scaled to today's level by at most four times.
            season = then * min(max(self._averages[1] / here, 0.25), 4.0)
        return (*self._averages, trend, season)

    def _mix(self, bids: tuple[float, ...]) -> float:
        least = min(self._losses)
        weights = [math.exp(-_ETA * (loss - least)) for loss in self._losses]
        return math.fsum(weight * bid for weight, bid in zip(weights, bids, strict=True)) / math.fsum(weights)

    def _score(self, now_s: float, interval_s: float) -> None:
        pending = self._pending
        while pending and pending[0][0] + self.horizon_s + self.window_s <= now_s:
            made_s, bids, mixture = pending.popleft()
            begin_s = made_s + self.horizon_s
            actual = self._between(begin_s, begin_s + self.window_s) / self.window_s
            # A difference of one request is no error; this also bounds the logarithm on quiet tiers.
            floor = 1.0 / self.window_s
            keep_s = max(_FORGET_LOSS_S, 10 * self.horizon_s)
            share = -math.expm1(-interval_s / min(keep_s, max(self._seen_s, interval_s)))
            for index, bid in enumerate(bids):
                loss = abs(math.log((bid + floor) / (actual + floor)))
                self._losses[index] += share * (loss - self._losses[index])
            error = math.log((actual + floor) / (mixture + floor))
            self._errors.append(error)
            self._scored += 1
        if self._scored - self._computed_at >= _RECOMPUTE:
            self._computed_at = self._scored
            self._spread = self._measured_spread()
        oldest_s = pending[0][0] + self.horizon_s if pending else now_s
        cumulative = self._cumulative
        while len(cumulative) > 2 and cumulative[1][0] <= oldest_s:
            cumulative.popleft()

    def _measured_spread(self) -> float:
        errors = sorted(self._errors)
        high = errors[int(_HIGH * (len(errors) - 1))]
        measured = max(high / _HIGH_Z, _LEAST_SPREAD)
        known = len(errors) / (len(errors) + _PRIOR_ERRORS)
        return known * measured + (1.0 - known) * _PRIOR_SPREAD

    def _between(self, from_s: float, until_s: float) -> float:
        return self._until(until_s) - self._until(from_s)

    def _until(self, at_s: float) -> float:
        """Arrivals until ``at_s``, interpolated."""
        before = self._cumulative[0]
        for entry in self._cumulative:
            if entry[0] >= at_s:
                if entry[0] == before[0]:
                    return entry[1]
                part = (at_s - before[0]) / (entry[0] - before[0])
                return before[1] + min(max(part, 0.0), 1.0) * (entry[1] - before[1])
            before = entry
        return before[1]
