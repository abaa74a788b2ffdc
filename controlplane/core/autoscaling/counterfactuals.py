"""Finds the headroom that would have been best for the arrivals of the last hours.

A forecast of ``x`` replicas (a real number) becomes ``ceil(factor * x)`` replicas, retained for a hold time.
The best forecast and the best factor depend on the errors of the forecast, the burstiness of arrivals, how
long a request may wait, and how coarse a fleet of few replicas is; no formula covers all of that. So every
pair of a forecast and a factor is replayed against the actual arrivals: a fluid queue is served by the
replicas that the pair would have had ready after their cold starts. Each virtual queue counts the requests
that would have waited too long for the SLO, and the replicas that would have been used. The cheapest pair
with an acceptable ratio of misses is chosen. (Virtual queues that measure the effect of another amount of a
resource: C. Courcoubetis et al., "Admission control and routing in ATM networks using inferences
from measured buffer occupancy", 1995. Every tick evaluates every pair, so nothing has to be tried out on
users.)

A virtual queue knows nothing about events that have not happened yet. So each forecast has a prior factor,
which weighs as much as some minutes of traffic, and no factor is below a minimum.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MOST_MISSED: Final = 0.25
"""The ratio of misses in one tick is capped at this. A burst is over before replicas ordered for it are
ready, so a tick in which all requests miss is no stronger evidence than one in which some do."""
_STEP: Final = 0.05
_FACTORS: Final[NDArray[np.float64]] = np.exp(_STEP * np.arange(-8, 13))
"""0.67 to 1.82."""
_FORGET_S: Final = 7200.0
"""The time constant over which misses and priors are forgotten."""
_PRIOR_STEP: Final = 0.1
"""In the prior, the ratio of misses falls to 1/e with this much more headroom (logarithm of the factor)."""
_ABOVE_BEST: Final = 0.25
"""If no pair meets the SLO, pairs that miss at most this much more than the best one are candidates too; in
units of the allowed ratio."""
_REACTION_S: Final = 20.0
"""Time after which a queue whose requests wait too long would have been noticed and replicas ordered for
it."""
_RELIEVED_MISSED: Final = 0.02
"""The ratio of misses that is assumed for a pair whose replicas were ordered only because of its queue: once
the queue is gone they would be removed, and the queue would come back."""
_LONGEST_WAIT_S: Final = 60.0
"""The wait in a virtual queue exceeds the patience by at most this, because replicas would have been ordered
for it."""


@dataclass(frozen=True, slots=True)
class ForecastPrior:
    """What is assumed about one forecast before measurements exist."""

    factor: float
    """With this factor the ratio of misses is assumed to be exactly the allowed one."""
    counts_s: float
    """The assumption weighs as much as this many seconds of traffic."""


@dataclass(frozen=True, slots=True)
class HeadroomChoice:
    """The chosen pair of a forecast and a factor."""

    forecast: int
    """The index of the forecast."""
    factor: float
    missing: float
    """The ratio of requests that would have missed the SLO with this pair in the last tick."""


class SlidingMaximum:
    """The maximum of the values in a sliding window."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: deque[tuple[float, float]] = deque()
        """(time, value), with falling values."""

    def push(self, at_s: float, value: float, oldest_s: float) -> None:
        """Add a value, and drop values older than ``oldest_s``, except the newest."""
        entries = self._entries
        while entries and entries[-1][1] <= value:
            entries.pop()
        entries.append((at_s, value))
        while len(entries) > 1 and entries[0][0] < oldest_s:
            entries.popleft()

    def since(self, from_s: float) -> float:
        """The maximum since ``from_s``; the newest value if all are older; 0 without values."""
        for at_s, value in self._entries:
            if at_s >= from_s:
                return value
        return self._entries[-1][1] if self._entries else 0.0


class VirtualQueues:
    """Evaluates all pairs of a forecast and a factor for one tier."""

    def __init__(
        self, priors: Sequence[ForecastPrior], *, allowed: float, hold_s: float, least: float = 0.0
    ) -> None:
        """``priors`` has one entry for each forecast; ``allowed`` is the ratio of misses that they refer to,
        and ``least`` the smallest factor that may be chosen."""
        self._factors = np.array([[prior.factor] for prior in priors])
        self._prior_s = np.array([[prior.counts_s] for prior in priors])
        self.adopt(allowed=allowed, hold_s=hold_s, least=least)
        # One row for each forecast, one column for each factor.
        shape = (len(priors), len(_FACTORS))
        self._backlog, self._late_s, self._missed, self._last, self._used = (
            np.zeros(shape) for _ in range(5)
        )
        self._arrived = 0.0
        self._seen_s = 0.0
        self._ordered = [SlidingMaximum() for _ in priors]
        self._ready = [SlidingMaximum() for _ in priors]
        self._coming: deque[tuple[float, Sequence[float]]] = deque()
        """(time, forecasts) whose replicas would still be starting."""
        self._warm = False

    def adopt(self, *, allowed: float, hold_s: float, least: float = 0.0) -> None:
        """Use other settings from now on; what was observed remains."""
        self._hold_s = hold_s
        self._least = min(least, float(_FACTORS[-1]))
        self._prior = np.minimum(1.0, allowed * (self._factors / _FACTORS) ** (1.0 / _PRIOR_STEP))

    def observe(
        self,
        now_s: float,
        interval_s: float,
        *,
        arrived: float,
        work: float,
        forecasts: Sequence[float],
        cold_start_s: float,
        patience_s: float,
    ) -> None:
        """Evaluate one tick: ``arrived`` requests needed ``work`` replica-seconds, and each of ``forecasts``
        is a number of replicas needed one cold start from now. ``patience_s`` is how long a request may wait.

        ValueError if the number of forecasts differs from that of the priors."""
        oldest_s = now_s - self._hold_s
        for sliding, value in zip(self._ordered, forecasts, strict=True):
            sliding.push(now_s, value, oldest_s)
        coming = self._coming
        coming.append((now_s, forecasts))
        while coming and coming[0][0] <= now_s - cold_start_s:
            at_s, values = coming.popleft()
            for sliding, value in zip(self._ready, values, strict=True):
                sliding.push(at_s, value, oldest_s)
            self._warm = True
        if not self._warm or interval_s <= 0:
            return
        keep = math.exp(-interval_s / _FORGET_S)
        self._prior_s *= keep
        self._arrived = self._arrived * keep + arrived
        self._seen_s = self._seen_s * keep + interval_s
        ready, ordered = (
            np.array([[sliding.since(oldest_s)] for sliding in each]) for each in (self._ready, self._ordered)
        )
        count = np.maximum(np.ceil(_FACTORS * ready - 1e-9), 1.0)
        before = self._backlog
        limit = patience_s * count
        longest = (patience_s + max(cold_start_s, _LONGEST_WAIT_S)) * count
        after = np.clip(before + (work - count * interval_s), 0.0, longest)
        # Once the replicas that were ordered because of the queue are ready, they empty it; they remain as
        # long as the queue would grow again without them.
        self._late_s = np.where(after > limit, self._late_s + interval_s, 0.0)
        relieved = self._late_s > cold_start_s + _REACTION_S
        after = np.where(relieved, 0.0, after)
        self._backlog = after
        # Over the tick the wait changes linearly from one value to the other; requests are late above the
        # limit.
        low, high = np.minimum(before, after), np.maximum(before, after)
        late = high > limit
        share = np.where(late, (high - np.maximum(limit, low)) / np.maximum(high - low, 1e-12), 0.0)
        share = np.where(late & (low >= limit), 1.0, share)
        self._last = np.where(relieved, np.maximum(share, _RELIEVED_MISSED), share)
        self._missed = self._missed * keep + np.minimum(self._last, MOST_MISSED) * arrived
        used = np.ceil(_FACTORS * np.maximum(ordered, ready) - 1e-9)
        used = np.where(relieved, np.maximum(used, math.ceil(work / interval_s)), used)
        self._used = self._used * keep + used * interval_s

    def choose(self, allowed: float) -> HeadroomChoice:
        """The cheapest pair whose ratio of misses is at most ``allowed``. If there is none, headroom does not
        help, and the cheapest of the pairs that miss hardly more than the best one is chosen."""
        missed = self._missed_ratios()
        limit = max(allowed, float(missed.min()) + _ABOVE_BEST * allowed)
        cost = self._used if self._warm else np.broadcast_to(_FACTORS, missed.shape)
        candidates = (missed <= limit) & (self._least - 1e-9 <= _FACTORS)
        if not candidates.any():
            candidates = missed <= limit
        # Among pairs with the same cost, the one that misses least.
        best = int(np.argmin(np.where(candidates, cost + 1e-6 * missed, np.inf)))
        row, column = divmod(best, len(_FACTORS))
        return HeadroomChoice(row, float(_FACTORS[column]), float(self._last[row, column]))

    def _missed_ratios(self) -> NDArray[np.float64]:
        """For each pair, the ratio of requests that would have missed the SLO, including the prior."""
        per_s = self._arrived / self._seen_s if self._seen_s > 0 else 1.0
        prior = self._prior_s * per_s
        missed: NDArray[np.float64] = self._missed + self._prior * prior
        ratios: NDArray[np.float64] = missed / np.maximum(self._arrived + prior, 1e-9)
        return ratios
