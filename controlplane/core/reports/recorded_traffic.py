"""Recorded traffic of a plane as windows, from the samples of each tier that are stored for reports.

A window has no individual requests: only how many arrived for a tier in how many seconds, and the mean number
of tokens of those that were answered. :mod:`controlplane.simulation.traces` generates requests from windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from controlplane.core.reports.report import ratio

FIGURES: Final = ("counted_s", "arrived", "answered", "prompt_tokens", "generated_tokens")
"""The fields of :class:`~controlplane.core.reports.report.ReportSample` from which windows are computed."""
COLUMNS: Final = ("start_s", "seconds", "tier", "requests", "input_tokens", "output_tokens")
"""The columns of a file of windows."""


@dataclass(frozen=True, slots=True)
class Point:
    """The values of a stored series in the ``step_s`` seconds from ``unix_s``."""

    unix_s: int
    step_s: int
    count: int
    mean: float


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """One stored figure, summed over ``step_s``."""

    at_s: int
    """Wall clock at the beginning of the step, or at the end of a sample if ``step_s`` is 1."""
    step_s: int
    total: float


@dataclass(frozen=True, slots=True)
class RecordedWindow:
    """Requests that arrived for a tier."""

    start_s: float
    seconds: float
    tier: str
    requests: int
    input_tokens: float | None
    """Mean per request; None if no request was ever answered."""
    output_tokens: float | None
    """Mean per request; None if no request was ever answered."""


def traffic_windows(tier: str, figures: Mapping[str, Iterable[StoredPoint]]) -> list[RecordedWindow]:
    """The tier's windows in order of time, without overlap; times in which nothing was counted have no
    window.

    ``start_s`` is wall clock. A window covers the part of one stored point that the counts of all gateways
    cover. A point is one sample or, for older samples, a minute or ten minutes.
    """
    by_time = {
        name: {(point.at_s, point.step_s): point.total for point in figures.get(name, ())} for name in FIGURES
    }
    counted = by_time["counted_s"]
    answered = sum(by_time["answered"].values())
    usual = [ratio(sum(by_time[name].values()), answered) for name in ("prompt_tokens", "generated_tokens")]
    found = []
    ended_s = float("-inf")
    for at_s, step_s in sorted(counted):
        key = at_s, step_s
        end_s = float(at_s if step_s <= 1 else at_s + step_s)
        start_s = max(end_s - counted[key], ended_s)
        requests = round(by_time["arrived"].get(key, 0.0))
        if end_s <= start_s:
            continue
        ended_s = end_s
        own = by_time["answered"].get(key, 0.0)
        prompt, generated = (
            ratio(by_time[name].get(key, 0.0), own) if own else mean
            for name, mean in zip(("prompt_tokens", "generated_tokens"), usual, strict=True)
        )
        found.append(RecordedWindow(start_s, end_s - start_s, tier, requests, prompt, generated))
    return found


def relative_to_first(windows: Sequence[RecordedWindow]) -> list[RecordedWindow]:
    """The windows in order of time, with ``start_s`` counted from the start of the first."""
    first_s = min((window.start_s for window in windows), default=0.0)
    ordered = sorted(windows, key=lambda window: window.start_s)
    return [replace(window, start_s=window.start_s - first_s) for window in ordered]
