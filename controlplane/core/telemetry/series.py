"""Samples over time → windowed signals, each FRESH, STALE or MISSING with its age.

A series stores a bounded window of one value. Reading it never scans the window: counters are stored with
their resets already added up, so a rate is one difference. ``at_s`` and ``now_s`` are the caller's monotonic
clock.

* A rate is the increase between the first and the last point of the window, divided by the time between them.
  If a counter falls, it was reset, and its new value is the increase since the reset (Prometheus'
  ``increase`` without its extrapolation to the window's edges).
* A percentile is interpolated linearly inside its bucket, as Prometheus' ``histogram_quantile`` does
  (``promql/quantile.go``, ``BucketQuantile``).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from controlplane.core.telemetry.samples import Missing, Reading


class Freshness(StrEnum):
    """How far a signal may be trusted."""

    FRESH = "fresh"
    STALE = "stale"
    """Too old to shrink a tier or cordon a GPU by; still good for display."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Signal:
    """The current value of one quantity, and how old it is."""

    freshness: Freshness
    value: float | None
    """None exactly when the signal is MISSING."""
    age_s: float | None = None
    """Age of the newest point; None if there never was one."""
    reason: str = ""
    """Why it is not FRESH."""

    @property
    def fresh(self) -> float | None:
        """The value if it is FRESH; None otherwise."""
        return self.value if self.freshness is Freshness.FRESH else None


@dataclass(frozen=True, slots=True)
class FreshnessLimits:
    """Ages and windows."""

    stale_after_s: float = 5.0
    missing_after_s: float = 30.0
    window_s: float = 60.0
    half_life_s: float = 10.0
    """After this time, a value has half its weight in a moving average."""
    max_points: int = 240
    """Maximum number of points that a series stores; beyond that the oldest are dropped, so the window
    shrinks."""


DEFAULT_LIMITS = FreshnessLimits()


def known_now(value: float) -> Signal:
    """The signal for a value that this process counted itself, which is always FRESH."""
    return Signal(Freshness.FRESH, float(value), 0.0)


def missing(reason: str, age_s: float | None = None) -> Signal:
    """A signal without a value."""
    return Signal(Freshness.MISSING, None, age_s, reason)


def signal_of(
    value: float | None, at_s: float | None, now_s: float, limits: FreshnessLimits, why: str = ""
) -> Signal:
    """The signal at ``now_s`` of a ``value`` measured at ``at_s``.

    ``why`` is why nothing has been measured since then; empty if nothing went wrong.
    """
    if value is None or at_s is None:
        return missing(why or "no sample yet")
    age_s = max(0.0, now_s - at_s)
    if age_s > limits.missing_after_s:
        return missing(why or f"no sample for {age_s:.0f} s", age_s)
    if age_s > limits.stale_after_s:
        return Signal(Freshness.STALE, value, age_s, why or f"the last sample is {age_s:.0f} s old")
    return Signal(Freshness.FRESH, value, age_s)


class _Series:
    """Readings of one value within a window."""

    __slots__ = ("_limits", "_points", "_why")

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._points: deque[tuple[float, float]] = deque(maxlen=limits.max_points)
        """Time and value, oldest first."""
        self._why = ""
        """Why the newest reading is missing; empty if it is not."""

    def observe(self, at_s: float, reading: Reading[float]) -> None:
        """Adds a reading. A missing one adds no value, so the last value ages."""
        if isinstance(reading, Missing):
            self._why = reading.reason
            return
        self._why = ""
        points = self._points
        if points and at_s < points[-1][0]:
            return
        points.append((at_s, self._stored(reading)))
        while points[0][0] < at_s - self._limits.window_s:
            points.popleft()

    def _stored(self, value: float) -> float:
        """The value to store for a reading."""
        return value


class GaugeSeries(_Series):
    """A value that goes up and down."""

    __slots__ = ()

    def latest(self, now_s: float) -> Signal:
        """The newest value."""
        at_s, value = self._points[-1] if self._points else (None, None)
        return signal_of(value, at_s, now_s, self._limits, self._why)

    def busy(self, now_s: float) -> tuple[float, float] | None:
        """The share of the window's points that are above 0, and the mean of those points.

        None if the newest point is not FRESH or the window has fewer than three points.
        """
        if len(self._points) < 3 or self.latest(now_s).fresh is None:
            return None
        positive = [value for _, value in self._points if value > 0]
        return len(positive) / len(self._points), math.fsum(positive) / len(positive) if positive else 0.0


class CounterSeries(_Series):
    """A value that only grows until its source restarts at zero."""

    __slots__ = ("_offset", "_raw")

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        super().__init__(limits)
        self._offset = 0.0
        """Sum of the values at which the counter was reset."""
        self._raw = 0.0
        """The last value as the source showed it."""

    def _stored(self, value: float) -> float:
        if value < self._raw:
            self._offset += self._raw
        self._raw = value
        return self._offset + value

    def rate(self, now_s: float) -> Signal:
        """Increase per second over the window."""
        if not self._points:
            return signal_of(None, None, now_s, self._limits, self._why)
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        if last_s <= first_s:
            return missing(self._why or "a rate needs two samples", max(0.0, now_s - last_s))
        return signal_of((last - first) / (last_s - first_s), last_s, now_s, self._limits, self._why)

    def increase(self, now_s: float) -> Signal:
        """Increase over the window."""
        if not self._points:
            return signal_of(None, None, now_s, self._limits, self._why)
        (_, first), (last_s, last) = self._points[0], self._points[-1]
        return signal_of(last - first, last_s, now_s, self._limits, self._why)


def histogram_quantile(quantile: float, bounds: tuple[float, ...], counts: tuple[float, ...]) -> float | None:
    """The ``quantile`` (in [0, 1]) of cumulative bucket ``counts``.

    As in Prometheus: linear inside the bucket. The lowest bucket starts at 0 (or is its bound, if that is
    ≤ 0); the unbounded highest bucket gives the bound below it. None if nothing was observed, if the last
    bound is not infinite, or if there is only one bucket.
    """
    if len(bounds) < 2 or bounds[-1] != math.inf or len(bounds) != len(counts):
        return None
    # Buckets may change while they are scraped; a larger bound never holds fewer observations.
    cumulative = list(accumulate(counts, max))
    observations = cumulative[-1]
    if observations <= 0:
        return None
    rank = min(max(quantile, 0.0), 1.0) * observations
    bucket = bisect_left(cumulative, rank, hi=len(cumulative) - 1)
    if bucket == len(bounds) - 1:
        return bounds[-2]
    if bucket == 0 and bounds[0] <= 0:
        return bounds[0]
    start, below = (bounds[bucket - 1], cumulative[bucket - 1]) if bucket else (0.0, 0.0)
    inside = cumulative[bucket] - below
    if inside <= 0:
        return start
    return start + (bounds[bucket] - start) * ((rank - below) / inside)
