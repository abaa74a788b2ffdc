"""Samples over time → windowed signals, each FRESH, STALE or MISSING with its age.

A series remembers a bounded window of one figure. Reading it never needs the whole window: counters are
stored with their resets already added up, so a rate is one difference, and a percentile one difference of
two histograms. ``at_s`` and ``now_s`` are the caller's monotonic clock.

* A rate is the increase between the first and the last point of the window over the time between them; a
  counter that falls was reset, and what it shows then has been counted since (Prometheus' ``increase``
  without its extrapolation to the window's edges).
* A percentile is interpolated linearly inside its bucket, as Prometheus' ``histogram_quantile`` does
  (``promql/quantile.go``, ``BucketQuantile``).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from controlplane.core.telemetry.samples import Histogram, Missing, Reading


class Freshness(StrEnum):
    """How far a signal may be trusted."""

    FRESH = "fresh"
    STALE = "stale"
    """Was true a while ago; good for display, not for shrinking or cordoning."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Signal:
    """One figure about now."""

    freshness: Freshness
    value: float | None
    """None exactly when it is MISSING."""
    age_s: float | None = None
    """Since the newest point in it; None if there never was one."""
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
    """An EWMA forgets half of the past in this time."""
    max_points: int = 240
    """Points a series keeps at most; past it the oldest go, and the window is shorter."""


DEFAULT_LIMITS = FreshnessLimits()


def known_now(value: float) -> Signal:
    """A value as of this moment: what is counted in one's own memory is never old."""
    return Signal(Freshness.FRESH, float(value), 0.0)


def missing(reason: str, age_s: float | None = None) -> Signal:
    """A signal without a value."""
    return Signal(Freshness.MISSING, None, age_s, reason)


def judge(
    value: float | None, at_s: float | None, now_s: float, limits: FreshnessLimits, why: str = ""
) -> Signal:
    """The signal that ``value``, true at ``at_s``, is at ``now_s``; ``why`` says what went wrong since."""
    if value is None or at_s is None:
        return missing(why or "no sample yet")
    age_s = max(0.0, now_s - at_s)
    if age_s > limits.missing_after_s:
        return missing(why or f"no sample for {age_s:.0f} s", age_s)
    if age_s > limits.stale_after_s:
        return Signal(Freshness.STALE, value, age_s, why or f"the last sample is {age_s:.0f} s old")
    return Signal(Freshness.FRESH, value, age_s)


class GaugeSeries:
    """A figure that goes up and down."""

    __slots__ = ("_average", "_limits", "_points", "_why")

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._points: deque[tuple[float, float]] = deque(maxlen=limits.max_points)
        self._average = 0.0
        self._why = ""

    def observe(self, at_s: float, reading: Reading[float]) -> None:
        """Adds a point; a missing reading adds none, and the last value grows old."""
        if isinstance(reading, Missing):
            self._why = reading.reason
            return
        self._why = ""
        points = self._points
        gap_s = at_s - points[-1][0] if points else math.inf
        if gap_s < 0:
            return
        if gap_s > self._limits.missing_after_s:
            self._average = reading  # the past before a long gap says nothing about now
        else:
            keep = math.exp2(-gap_s / self._limits.half_life_s)
            self._average = keep * self._average + (1 - keep) * reading
        points.append((at_s, reading))
        _trim(points, at_s - self._limits.window_s)

    def latest(self, now_s: float) -> Signal:
        """The newest value."""
        return self._judged(self._points[-1][1] if self._points else None, now_s)

    def average(self, now_s: float) -> Signal:
        """Exponentially weighted, by time and not by number of points."""
        return self._judged(self._average if self._points else None, now_s)

    def mean(self, now_s: float) -> Signal:
        """Of the window's points."""
        points = self._points
        return self._judged(math.fsum(value for _, value in points) / len(points) if points else None, now_s)

    def maximum(self, now_s: float) -> Signal:
        """Of the window's points."""
        return self._judged(max((value for _, value in self._points), default=None), now_s)

    def busy(self, now_s: float) -> tuple[float, float] | None:
        """The share of the window's points that are over 0, and their mean; None if the newest is not FRESH
        or there are fewer than three."""
        if len(self._points) < 3 or self.latest(now_s).fresh is None:
            return None
        over = [value for _, value in self._points if value > 0]
        return len(over) / len(self._points), math.fsum(over) / len(over) if over else 0.0

    def _judged(self, value: float | None, now_s: float) -> Signal:
        at_s = self._points[-1][0] if self._points else None
        return judge(value, at_s, now_s, self._limits, self._why)


class LastReading:
    """A figure of which nobody asks more than its newest value: there is no window."""

    __slots__ = ("_at_s", "_limits", "_value", "_why")

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._value: float | None = None
        self._at_s = -math.inf
        self._why = ""

    def observe(self, at_s: float, reading: Reading[float]) -> None:
        """Takes in a value; a missing reading is none, and the last value grows old."""
        if isinstance(reading, Missing):
            self._why = reading.reason
            return
        self._why = ""
        if at_s >= self._at_s:
            self._value, self._at_s = reading, at_s

    def latest(self, now_s: float) -> Signal:
        """The newest value."""
        return judge(self._value, self._at_s, now_s, self._limits, self._why)


class CounterSeries:
    """A figure that only grows, until its source starts anew at zero."""

    __slots__ = ("_limits", "_offset", "_points", "_raw", "_why")

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._points: deque[tuple[float, float]] = deque(maxlen=limits.max_points)
        self._offset = 0.0
        self._raw = 0.0
        self._why = ""

    def observe(self, at_s: float, reading: Reading[float]) -> None:
        """Adds the counter's value as its source shows it."""
        if isinstance(reading, Missing):
            self._why = reading.reason
            return
        self._why = ""
        if self._points and at_s < self._points[-1][0]:
            return
        if self._points and reading < self._raw:
            self._offset += self._raw
        self._raw = reading
        self._points.append((at_s, self._offset + reading))
        _trim(self._points, at_s - self._limits.window_s)

    def rate(self, now_s: float) -> Signal:
        """Increase per second over the window."""
        if not self._points:
            return judge(None, None, now_s, self._limits, self._why)
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        if last_s <= first_s:
            return missing(self._why or "a rate needs two samples", max(0.0, now_s - last_s))
        return judge((last - first) / (last_s - first_s), last_s, now_s, self._limits, self._why)

    def increase(self, now_s: float) -> Signal:
        """Increase over the window."""
        if not self._points:
            return judge(None, None, now_s, self._limits, self._why)
        (_, first), (last_s, last) = self._points[0], self._points[-1]
        return judge(last - first, last_s, now_s, self._limits, self._why)


class HistogramSeries:
    """A cumulative histogram over time."""

    __slots__ = ("_bounds", "_limits", "_offsets", "_points", "_raw", "_why")

    def __init__(self, limits: FreshnessLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._points: deque[tuple[float, tuple[float, ...]]] = deque(maxlen=limits.max_points)
        self._bounds: tuple[float, ...] = ()
        self._offsets: tuple[float, ...] = ()
        self._raw: tuple[float, ...] = ()
        self._why = ""

    def observe(self, at_s: float, reading: Reading[Histogram]) -> None:
        """Adds the histogram as its source shows it; other buckets than before begin a new window."""
        if isinstance(reading, Missing):
            self._why = reading.reason
            return
        self._why = ""
        counts = reading.counts
        if self._points and at_s < self._points[-1][0]:
            return
        if reading.bounds != self._bounds:
            self._points.clear()
            self._bounds, self._offsets = reading.bounds, (0.0,) * len(counts)
        elif any(now < before for now, before in zip(counts, self._raw, strict=True)):
            self._offsets = tuple(map(sum, zip(self._offsets, self._raw, strict=True)))
        self._raw = counts
        self._points.append((at_s, tuple(map(sum, zip(self._offsets, counts, strict=True)))))
        _trim(self._points, at_s - self._limits.window_s)

    def percentile(self, quantile: float, now_s: float) -> Signal:
        """Of what was observed in the window; MISSING if that is nothing."""
        if not self._points:
            return judge(None, None, now_s, self._limits, self._why)
        (_, first), (last_s, last) = self._points[0], self._points[-1]
        counts = tuple(after - before for before, after in zip(first, last, strict=True))
        value = histogram_quantile(quantile, self._bounds, counts)
        if value is None:
            return missing(self._why or "nothing was observed in the window", max(0.0, now_s - last_s))
        return judge(value, last_s, now_s, self._limits, self._why)


def histogram_quantile(quantile: float, bounds: tuple[float, ...], counts: tuple[float, ...]) -> float | None:
    """The ``quantile`` (in [0, 1]) of cumulative bucket ``counts``, or None if there are no observations.

    As Prometheus: linear inside the bucket; in the lowest bucket from 0 (or its bound, if that is ≤ 0); in
    the highest, unbounded one the bound below it. None, too, without an infinite last bound and a second
    bucket.
    """
    if len(bounds) < 2 or bounds[-1] != math.inf or len(bounds) != len(counts):
        return None
    cumulative = _monotonic(counts)
    observations = cumulative[-1]
    if observations <= 0:
        return None
    rank = min(max(quantile, 0.0), 1.0) * observations
    place = bisect_left(cumulative, rank, hi=len(cumulative) - 1)
    if place == len(bounds) - 1:
        return bounds[-2]
    if place == 0 and bounds[0] <= 0:
        return bounds[0]
    start, below = (bounds[place - 1], cumulative[place - 1]) if place else (0.0, 0.0)
    inside = cumulative[place] - below
    if inside <= 0:
        return start
    return start + (bounds[place] - start) * ((rank - below) / inside)


def _monotonic(counts: tuple[float, ...]) -> list[float]:
    """Buckets are scraped while they change: a larger bound never holds fewer."""
    highest = 0.0
    steady = []
    for count in counts:
        highest = max(highest, count)
        steady.append(highest)
    return steady


def _trim(
    points: deque[tuple[float, float]] | deque[tuple[float, tuple[float, ...]]], oldest_s: float
) -> None:
    while points[0][0] < oldest_s:
        points.popleft()
