"""The headroom of a tier above its forecast: the factor that would have met its SLO at the lowest cost.

The factor, and the forecast that it applies to, come from the virtual queues of the last hours
(:mod:`.counterfactuals`). The requests that actually missed their SLO correct the factor: it changes with the
misses beyond the allowed ones (adaptive conformal inference: I. Gibbs, E. Candès, 2021), within narrow
limits. Misses while no request waits have other causes than missing replicas (a prompt too long for the SLO,
an engine that fails): they use up part of the allowed misses, but do not raise the factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.core.autoscaling.counterfactuals import MOST_MISSED, ForecastPrior, VirtualQueues

_MARGIN: Final = 0.55
"""The share of the allowed misses that is reserved, because a fluid queue ignores that some requests are
longer than others."""
_LEAST_ALLOWED: Final = 0.15
"""The share of the allowed misses that missing replicas may always cause, however many misses have other
causes."""
_PRIOR_FACTORS: Final = (1.15, 1.2)
"""The prior factor of each forecast; the slower one needs more."""
_GROWTH: Final = 0.05
"""Added to the prior factor for a cold start of a minute; errors of a forecast grow with the square root of
the time ahead."""
_LEAST_GROWTH: Final = 0.06
"""The load may grow by this ratio within a minute even if it never has."""
_PRIOR_LEAST_S: Final = 60.0
_PRIOR_COLD_STARTS: Final = 3.0
"""A prior weighs as much as this many cold starts of traffic, plus a minute."""
_DETECT_S: Final = 20.0
"""Time from a rise of the load to the order of a replica."""
_DECAY_S: Final = 3600.0
"""The factor falls to 1/e in this time at the earliest; without this limit it would drop at once when a burst
is forgotten."""
_CORRECTION_GAIN: Final = 1e-4
"""Change of the correction per second while there are twice as many misses as allowed."""
_CORRECTION_RANGE: Final = (-0.05, 0.2)
"""Range of the correction, which is a logarithm."""
_MOST_OVER: Final = 5.0
_MISS_SPAN_S: Final = 120.0
_CALM_S: Final = 60.0
"""A miss later than this after requests last waited was not caused by waiting."""
_FORGET_OTHER_S: Final = 3600.0
_OTHER_KNOWN: Final = 100.0
"""After this many requests the measured ratio of misses with other causes has half its final weight."""


@dataclass(frozen=True, slots=True)
class HeadroomTerms:
    """What a tier's headroom depends on."""

    attainment: float
    """The ratio of requests that must meet the SLO."""
    cold_start_s: float
    hold_s: float
    """How long a higher target is retained."""
    patience_s: float
    """How long a request can wait and still meet the SLO."""

    @property
    def most_missed(self) -> float:
        """The ratio of requests that may miss the SLO."""
        return (1.0 - self.attainment) * (1.0 - _MARGIN)

    @property
    def urgency(self) -> float:
        """In [0, 1]: near 0 if requests can wait until new replicas are ready, so that no headroom is
        needed."""
        return math.exp(-self.patience_s / (self.cold_start_s + _DETECT_S))

    @property
    def growth(self) -> float:
        """How much the load may grow unforeseen until a new replica is ready, relative to its growth in a
        minute."""
        return math.sqrt(self.cold_start_s / 60.0) * self.urgency

    @property
    def least(self) -> float:
        """The smallest factor."""
        return 1.0 + _LEAST_GROWTH * self.growth


class Headroom:
    """Learns the headroom of one tier."""

    def __init__(self, terms: HeadroomTerms) -> None:
        self._terms = terms
        counts_s = _PRIOR_LEAST_S + _PRIOR_COLD_STARTS * terms.cold_start_s
        priors = [
            ForecastPrior(1.0 + (more - 1.0) * terms.urgency + _GROWTH * terms.growth, counts_s)
            for more in _PRIOR_FACTORS
        ]
        self._queues = VirtualQueues(
            priors, allowed=terms.most_missed, hold_s=terms.hold_s, least=terms.least
        )
        self.allowed = terms.most_missed
        """The ratio of requests that may miss the SLO because replicas are missing."""
        self.choice = self._queues.choose(self.allowed)
        self._factor = self.choice.factor
        self.correction = 0.0
        """Logarithm of the correction by the requests that actually missed."""
        self._missed = self._virtually_missed = 0.0
        self._queued_s = -math.inf
        self._calm_ended = self._calm_missed = 0.0

    @property
    def factor(self) -> float:
        """The factor for the forecast ``choice.forecast``."""
        return self._factor * math.exp(self.correction)

    @property
    def _other_causes(self) -> float:
        """The ratio of requests that miss while no request waits."""
        return self._calm_missed / (self._calm_ended + _OTHER_KNOWN)

    def adopt(self, terms: HeadroomTerms) -> None:
        """Use other terms from now on; what was learned remains."""
        self._terms = terms
        self._queues.adopt(allowed=terms.most_missed, hold_s=terms.hold_s, least=terms.least)

    def observe(
        self,
        now_s: float,
        interval_s: float,
        *,
        arrived: float,
        each_per_s: float,
        forecasts_per_s: Sequence[float],
        patience_s: float,
    ) -> None:
        """Pass the arrivals of a tick to the virtual queues. ``each_per_s`` is the rate that one replica can
        serve, ``forecasts_per_s`` are the quick and the steady forecast, and ``patience_s`` is how long a
        request can wait now."""
        self._queues.observe(
            now_s,
            interval_s,
            arrived=arrived,
            work=arrived / each_per_s,
            forecasts=[per_s / each_per_s for per_s in forecasts_per_s],
            cold_start_s=self._terms.cold_start_s,
            patience_s=patience_s,
        )

    def choose(
        self,
        now_s: float,
        interval_s: float,
        *,
        finished: float,
        missed: float,
        queued: bool,
        expected_per_s: float,
    ) -> None:
        """Record the outcomes of a tick, and choose a forecast and a factor from all observations so far."""
        if queued:
            self._queued_s = now_s
        elif finished > 0 and now_s - self._queued_s > _CALM_S:
            keep = math.exp(-interval_s / _FORGET_OTHER_S)
            self._calm_ended = (self._calm_ended + finished) * keep
            self._calm_missed = (self._calm_missed + missed) * keep
        other = self._other_causes
        self.allowed = max(self._terms.most_missed - other, _LEAST_ALLOWED * (1.0 - self._terms.attainment))
        self.choice = choice = self._queues.choose(self.allowed)
        self._factor = max(choice.factor, self._factor * math.exp(-interval_s / _DECAY_S))
        if finished <= 0 or expected_per_s <= 0 or interval_s <= 0:
            return
        share = min(finished / (max(expected_per_s, 0.05) * interval_s), 2.0)
        follow = -math.expm1(-interval_s * share / _MISS_SPAN_S)
        self._missed += follow * (min(missed / finished, MOST_MISSED) - self._missed)
        self._virtually_missed += follow * (min(choice.missing, MOST_MISSED) - self._virtually_missed)
        beyond = self._missed - other - max(self._virtually_missed, self.allowed)
        over = min(beyond / max(self.allowed, 1e-4), _MOST_OVER)
        low, high = _CORRECTION_RANGE
        self.correction = min(max(self.correction + _CORRECTION_GAIN * over * share * interval_s, low), high)
