"""How far above a forecast a tier aims: by a factor that would have kept its SLO at the least cost.

The factor, and the forecast that it is applied to, come from what other factors would have given with the
arrivals of the last hours (:mod:`.virtual_queues`). The requests that really missed their SLO correct it: it
moves by the misses beyond those allowed (adaptive conformal inference: I. Gibbs, E. Candès, 2021), within
narrow limits. Misses that happen while nothing waits are no want of replicas (a prompt that is too long for
its promise, an engine that fails): they use up part of what is allowed, and call for no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.core.autoscaling.counterfactuals import MOST_MISSED, ForecastPrior, VirtualQueues

_MARGIN: Final = 0.55
"""Share of the allowed misses that is kept in reserve: a fluid queue knows nothing of requests that are
longer than others."""
_LEAST_ALLOWED: Final = 0.15
"""Share of the allowed misses that a want of replicas may cause, however many have other causes."""
_PRIOR_FACTORS: Final = (1.15, 1.2)
"""For each forecast, before there is experience: the slower one needs more."""
_GROWTH: Final = 0.05
"""Added to it for a cold start of a minute: errors of a forecast grow with the root of the time ahead."""
_LEAST_GROWTH: Final = 0.06
"""Load may grow by so much within a minute even if it never did."""
_PRIOR_LEAST_S: Final = 60.0
_PRIOR_COLD_STARTS: Final = 3.0
"""What was thought beforehand counts as much as so many cold starts of traffic, and a minute."""
_DETECT_S: Final = 20.0
"""From a rise of the load to an order."""
_LET_GO_S: Final = 3600.0
"""The factor falls to 1/e in this time at most: when a burst is forgotten, all of it would go at once."""
_CORRECTION_GAIN: Final = 1e-4
"""A second, when the misses are over by as many as are allowed."""
_CORRECTION_RANGE: Final = (-0.05, 0.2)
"""Of the logarithm."""
_MOST_OVER: Final = 5.0
_MISS_SPAN_S: Final = 120.0
_CALM_S: Final = 60.0
"""So long after a queue was last seen, a miss is not its doing."""
_OTHER_KEEP_S: Final = 3600.0
_OTHER_KNOWN: Final = 100.0
"""Requests after which half of what is seen of other causes is believed."""


@dataclass(frozen=True, slots=True)
class HeadroomTerms:
    """What a tier's headroom depends on."""

    attainment: float
    """Share of the requests that are to keep the SLO."""
    cold_start_s: float
    hold_s: float
    """How long a higher target lasts."""
    patience_s: float
    """How long a request may wait and still keep the SLO."""

    @property
    def most_missed(self) -> float:
        """Share of the requests that may miss."""
        return (1.0 - self.attainment) * (1.0 - _MARGIN)

    @property
    def urgency(self) -> float:
        """Who may wait until new replicas are there needs no headroom beforehand; in [0, 1]."""
        return math.exp(-self.patience_s / (self.cold_start_s + _DETECT_S))

    @property
    def growth(self) -> float:
        """How far the load may grow unforeseen until a replica is there; 1: as in a minute."""
        return math.sqrt(self.cold_start_s / 60.0) * self.urgency

    @property
    def least(self) -> float:
        """The least factor."""
        return 1.0 + _LEAST_GROWTH * self.growth


class Headroom:
    """What one tier has learned of its headroom."""

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
        """Share of the requests that may miss for want of replicas."""
        self.choice = self._queues.choose(self.allowed)
        self._factor = self.choice.factor
        self.correction = 0.0
        """Logarithm: how much more than the virtual queues say is needed, by the requests that missed."""
        self._missed = self._virtually_missed = 0.0
        self._queued_s = -math.inf
        self._calm_ended = self._calm_missed = 0.0

    @property
    def factor(self) -> float:
        """On the forecast ``choice.forecast``."""
        return self._factor * math.exp(self.correction)

    @property
    def _other_causes(self) -> float:
        """Share of the requests that miss while nothing waits."""
        return self._calm_missed / (self._calm_ended + _OTHER_KNOWN)

    def adopt(self, terms: HeadroomTerms) -> None:
        """Other terms from now on; what was learned stays."""
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
        """What came in a tick, for the virtual queues. ``each_per_s`` is what one replica carries; there are
        two forecasts, one that follows soon and one that is steady. ``patience_s`` is as it is now."""
        self._queues.observe(
            now_s,
            interval_s,
            arrived=arrived,
            work=arrived / each_per_s,
            forecasts=[per_s / each_per_s for per_s in forecasts_per_s],
            cold_start_s=self._terms.cold_start_s,
            patience_s=patience_s,
        )

    def judge(
        self,
        now_s: float,
        interval_s: float,
        *,
        finished: float,
        missed: float,
        queued: bool,
        expected_per_s: float,
    ) -> None:
        """What became of requests in a tick, and the choice that follows from all that is known."""
        if queued:
            self._queued_s = now_s
        elif finished > 0 and now_s - self._queued_s > _CALM_S:
            keep = math.exp(-interval_s / _OTHER_KEEP_S)
            self._calm_ended = (self._calm_ended + finished) * keep
            self._calm_missed = (self._calm_missed + missed) * keep
        other = self._other_causes
        self.allowed = max(self._terms.most_missed - other, _LEAST_ALLOWED * (1.0 - self._terms.attainment))
        self.choice = choice = self._queues.choose(self.allowed)
        self._factor = max(choice.factor, self._factor * math.exp(-interval_s / _LET_GO_S))
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
