"""A plane's own traffic as windows, from the figures that are kept of each tier for reports.

Nothing of any request is in them: only how many came for a tier in how many seconds, and how many tokens the
answered ones had on average. :mod:`controlplane.simulation.traces` makes requests of them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

FIGURES: Final = ("counted_s", "arrived", "answered", "prompt_tokens", "generated_tokens")
"""What is needed of a tier, by the names of :class:`~controlplane.core.reports.report.ReportSample`."""
COLUMNS: Final = ("start_s", "seconds", "tier", "requests", "input_tokens", "output_tokens")
"""Of a file of windows, in this order."""


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """One figure, added up over some seconds."""

    at_s: int
    """Where they begin, wall clock; of one second: the end of a sample."""
    step_s: int
    total: float


@dataclass(frozen=True, slots=True)
class RecordedWindow:
    """Requests that came for a tier."""

    start_s: float
    seconds: float
    tier: str
    requests: int
    input_tokens: float | None
    """Of a prompt, on average; None: none was ever answered."""
    output_tokens: float | None


def windows_of(tier: str, figures: Mapping[str, Iterable[StoredPoint]]) -> list[RecordedWindow]:
    """The tier's windows in order of time, one after the other; where nobody counted there is none.

    ``start_s`` is wall clock. A window is as long as all gateways' counts are known of what is kept as one:
    of a sample or, where old samples were joined, of some of the minute or the ten minutes.
    """
    by_place = {
        name: {(point.at_s, point.step_s): point.total for point in figures.get(name, ())} for name in FIGURES
    }
    counted = by_place["counted_s"]
    answered = sum(by_place["answered"].values())
    usual = [_share(sum(by_place[name].values()), answered) for name in ("prompt_tokens", "generated_tokens")]
    found = []
    ended_s = float("-inf")
    for at_s, step_s in sorted(counted):
        place = at_s, step_s
        end_s = float(at_s if step_s <= 1 else at_s + step_s)
        start_s = max(end_s - counted[place], ended_s)
        requests = round(by_place["arrived"].get(place, 0.0))
        if end_s <= start_s:
            continue
        ended_s = end_s
        own = by_place["answered"].get(place, 0.0)
        prompt, answer = (
            _share(by_place[name].get(place, 0.0), own) if own else mean
            for name, mean in zip(("prompt_tokens", "generated_tokens"), usual, strict=True)
        )
        found.append(RecordedWindow(start_s, end_s - start_s, tier, requests, prompt, answer))
    return found


def from_the_first(windows: Sequence[RecordedWindow]) -> list[RecordedWindow]:
    """In order of time, with ``start_s`` counted from the first one's."""
    first_s = min((window.start_s for window in windows), default=0.0)
    ordered = sorted(windows, key=lambda window: window.start_s)
    return [replace(window, start_s=window.start_s - first_s) for window in ordered]


def _share(total: float, count: float) -> float | None:
    return total / count if count else None
