"""How much headroom: what others would have given with the very same arrivals.

A forecast of ``x`` replicas (a real number) becomes ``ceil(factor * x)``, kept for a hold time. Which of
several forecasts and which factor are right depends on how wrong the forecast is, how bursty arrivals are,
how long a request may wait and how coarse a fleet of few replicas is; no formula knows all of that. So every
pair of them is played against what came: a fluid queue with the replicas that this pair would have had ready,
given that they take a cold start to come. Each queue counts the requests that would have waited longer than
the SLO lets them, and the replicas it would have held. The pair in use is the cheapest one whose misses are
allowed. (Queues that exist only on paper as a measure of what a resource of another size would do:
C. Courcoubetis et al., "Admission control and routing in ATM networks using inferences from measured buffer
occupancy", 1995. Because every pair is judged by every tick, nothing has to be tried out on users.)

What has not happened yet, no queue knows. So each forecast comes with a factor that is thought right
beforehand, which counts as much as some minutes of traffic, and no factor is ever below a least one.
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
"""A burst in which everything misses says no more than one in which a part does: it is over before anything
ordered for it is there."""
_STEP: Final = 0.05
_FACTORS: Final[NDArray[np.float64]] = np.exp(_STEP * np.arange(-8, 13))
"""0.67 to 1.82: more than that is not kept ready for whatever may come."""
_KEEP_S: Final = 7200.0
"""Misses, and what was thought beforehand, are forgotten over this time."""
_PRIOR_STEP: Final = 0.1
"""Beforehand, misses are taken to fall to 1/e with so much more (logarithm of the factor)."""
_ABOVE_BEST: Final = 0.25
"""How much more than the best pair another may miss, in allowed misses, where none keeps the SLO."""
_ANSWER_S: Final = 20.0
"""A queue that keeps requests too long is seen and answered with an order after so long."""
_RELIEVED_MISSED: Final = 0.02
"""Share that misses where only a queue calls for replicas: they go when it is gone, and it comes back."""
_LONGEST_WAIT_S: Final = 60.0
"""A virtual queue past the patience grows no longer than this: replicas would have been ordered for it."""


@dataclass(frozen=True, slots=True)
class ForecastPrior:
    """What is thought of one forecast before anything was seen."""

    factor: float
    """Just as many would miss with it as may."""
    counts_s: float
    """It weighs as much as so many seconds of traffic."""


@dataclass(frozen=True, slots=True)
class HeadroomChoice:
    """The pair in use."""

    forecast: int
    """Its index."""
    factor: float
    missed: float
    """Share of the requests that would have missed with it, as far as is known."""
    replicas: float
    """That it would have held on average."""
    missing: float
    """The share in the last observation."""


class SlidingMaximum:
    """The highest value of a window that ends now."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: deque[tuple[float, float]] = deque()
        """(time, value), falling."""

    def push(self, at_s: float, value: float, keep_from_s: float) -> None:
        """The value at that moment; what is older than ``keep_from_s`` is forgotten, but for the newest."""
        entries = self._entries
        while entries and entries[-1][1] <= value:
            entries.pop()
        entries.append((at_s, value))
        while len(entries) > 1 and entries[0][0] < keep_from_s:
            entries.popleft()

    def since(self, from_s: float) -> float:
        """The highest since then; the newest if all are older; 0 if there is none."""
        for at_s, value in self._entries:
            if at_s >= from_s:
                return value
        return self._entries[-1][1] if self._entries else 0.0


class VirtualQueues:
    """Judges all pairs of a forecast and a factor for one tier."""

    def __init__(
        self, priors: Sequence[ForecastPrior], *, allowed: float, hold_s: float, least: float = 0.0
    ) -> None:
        """One prior for each forecast; of its requests the share ``allowed`` is thought to miss. ``least`` is
        the least factor that is ever chosen."""
        self._factors = np.array([[prior.factor] for prior in priors])
        self._prior_s = np.array([[prior.counts_s] for prior in priors])
        self.adopt(allowed=allowed, hold_s=hold_s, least=least)
        # One row for each forecast, one column for each factor.
        shape = (len(priors), len(_FACTORS))
        self._backlog, self._late_s, self._missed, self._last, self._held = (
            np.zeros(shape) for _ in range(5)
        )
        self._arrived = 0.0
        self._seen_s = 0.0
        self._asked = [SlidingMaximum() for _ in priors]
        self._ready = [SlidingMaximum() for _ in priors]
        self._coming: deque[tuple[float, Sequence[float]]] = deque()
        """Forecasts whose replicas still start."""
        self._warm = False

    def adopt(self, *, allowed: float, hold_s: float, least: float = 0.0) -> None:
        """Other settings from now on; what was seen stays."""
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
        """One tick: ``arrived`` requests brought ``work`` replica-seconds, and each of ``forecasts`` says how
        many replicas will be needed one cold start from now. ``patience_s`` is how long a request may wait.

        ValueError: there is not one forecast for each prior."""
        oldest_s = now_s - self._hold_s
        for sliding, value in zip(self._asked, forecasts, strict=True):
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
        keep = math.exp(-interval_s / _KEEP_S)
        self._prior_s *= keep
        self._arrived = self._arrived * keep + arrived
        self._seen_s = self._seen_s * keep + interval_s
        ready, asked = (
            np.array([[sliding.since(oldest_s)] for sliding in each]) for each in (self._ready, self._asked)
        )
        count = np.maximum(np.ceil(_FACTORS * ready - 1e-9), 1.0)
        before = self._backlog
        limit = patience_s * count
        longest = (patience_s + max(cold_start_s, _LONGEST_WAIT_S)) * count
        after = np.clip(before + (work - count * interval_s), 0.0, longest)
        # Once replicas that the queue itself calls for are there, it is worked off; they stay for as long as
        # it would grow again.
        self._late_s = np.where(after > limit, self._late_s + interval_s, 0.0)
        relieved = self._late_s > cold_start_s + _ANSWER_S
        after = np.where(relieved, 0.0, after)
        self._backlog = after
        # The wait runs from one value to the other over the tick: which part of that is too long?
        low, high = np.minimum(before, after), np.maximum(before, after)
        late = high > limit
        share = np.where(late, (high - np.maximum(limit, low)) / np.maximum(high - low, 1e-12), 0.0)
        share = np.where(late & (low >= limit), 1.0, share)
        self._last = np.where(relieved, np.maximum(share, _RELIEVED_MISSED), share)
        self._missed = self._missed * keep + np.minimum(self._last, MOST_MISSED) * arrived
        held = np.ceil(_FACTORS * np.maximum(asked, ready) - 1e-9)
        held = np.where(relieved, np.maximum(held, math.ceil(work / interval_s)), held)
        self._held = self._held * keep + held * interval_s

    def choose(self, allowed: float) -> HeadroomChoice:
        """The cheapest pair of whose requests at most the share ``allowed`` misses. What no pair would have
        avoided calls for no headroom: then it is the cheapest of those that miss hardly more than the
        best."""
        per_s = self._arrived / self._seen_s if self._seen_s > 0 else 1.0
        prior = self._prior_s * per_s
        share = (self._missed + self._prior * prior) / np.maximum(self._arrived + prior, 1e-9)
        limit = max(allowed, float(share.min()) + _ABOVE_BEST * allowed)
        cost = self._held if self._warm else np.broadcast_to(_FACTORS, share.shape)
        allowed_pairs = (share <= limit) & (self._least - 1e-9 <= _FACTORS)
        if not allowed_pairs.any():
            allowed_pairs = share <= limit
        # Of pairs that cost the same the one that misses least.
        best = int(np.argmin(np.where(allowed_pairs, cost + 1e-6 * share, np.inf)))
        row, column = divmod(best, len(_FACTORS))
        held = float(self._held[row, column]) / self._seen_s if self._seen_s > 0 else 0.0
        return HeadroomChoice(
            row,
            float(_FACTORS[column]),
            float(share[row, column]),
            held,
            float(self._last[row, column]),
        )
