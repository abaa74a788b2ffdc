"""Line plots over time as SVG, with round ticks, and dates such as 3 Nov 2026."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final, NamedTuple

COLOURS: Final = ("#3b6fd4", "#c2571a", "#2e8b57", "#8e44ad", "#b8860b", "#c0392b", "#16808a", "#666666")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 520, 190, 52, 24, 22, 12
_MOST_TICKS: Final = 5
_TIME_STEPS_S: Final = (
    *(10, 30, 60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200, 86400, 172800, 345600, 604800),
)
_DAY_S: Final = 86400
_SUFFIXES: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Curve(NamedTuple):
    """Runs of adjacent points, each a time in Unix seconds and a figure; between runs nothing is known."""

    runs: Sequence[Sequence[tuple[float, float]]]


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 up to at least ``highest``, at most six, in steps of 1, 2 or 5 times a power of
    ten."""
    if not (math.isfinite(highest) and highest > 0):
        return [0.0, 1.0]
    rough = highest / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))
    count = math.ceil(highest / step - 1e-9)
    return [step * number for number in range(count + 1)]


def label(value: float) -> str:
    """A number in at most six characters: ``437k``, ``1.5M``, ``0.25``."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def time_ticks(from_s: float, until_s: float) -> list[float]:
    """Round times inside a span of UTC, at most six."""
    span_s = max(until_s - from_s, 1.0)
    step_s = next((step for step in _TIME_STEPS_S if span_s / step <= _MOST_TICKS), _TIME_STEPS_S[-1])
    first = math.ceil(from_s / step_s)
    return [float(number * step_s) for number in range(first, math.floor(until_s / step_s) + 1)]


def time_label(unix_s: float, span_s: float) -> str:
    """A time of a plot that shows ``span_s``: ``14:05``, or the day where a tick is its beginning."""
    moment = time.gmtime(unix_s)
    if unix_s % _DAY_S == 0 and span_s > _DAY_S / 4:
        return date(unix_s)[:-5]
    if span_s <= 5 * 60:
        return time.strftime("%H:%M:%S", moment)
    return time.strftime("%H:%M", moment)


def date(unix_s: float) -> str:
    """A day of UTC such as ``3 Nov 2026``."""
    moment = time.gmtime(unix_s)
    return f"{moment.tm_mday} {time.strftime('%b %Y', moment)}"


def span_text(from_s: float, until_s: float) -> str:
    """A span of time in words; the second date only if it is another day."""
    begin, end = (time.strftime("%H:%M", time.gmtime(at)) for at in (from_s, until_s))
    same = from_s // _DAY_S == until_s // _DAY_S
    return f"{date(from_s)}, {begin} to {'' if same else f'{date(until_s)}, '}{end} UTC"


def plot(title: str, from_s: float, until_s: float, curves: Iterable[Curve]) -> str:
    """A figure with a curve for each colour of :data:`COLOURS` in turn."""
    drawn = list(curves)
    highest = max((figure for curve in drawn for run in curve.runs for _, figure in run), default=0.0)
    marks = ticks(highest)
    span_s = max(until_s - from_s, 1.0)

    def x(unix_s: float) -> float:
        inside = min(max(unix_s, from_s), until_s)
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (inside - from_s) / span_s

    def y(figure: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * figure / marks[-1]

    parts = []
    for mark in marks:
        at = y(mark)
        parts.append(f"<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1={at:.1f} y2={at:.1f} />")
        parts.append(f"<text x={_LEFT - 6} y={at + 4:.1f} text-anchor=end>{label(mark)}</text>")
    for unix_s in time_ticks(from_s, until_s):
        at = x(unix_s)
        parts.append(
            f"<line class=grid x1={at:.1f} x2={at:.1f} y1={_HEIGHT - _BOTTOM} y2={_HEIGHT - _BOTTOM + 4} />"
        )
        text = time_label(unix_s, span_s)
        parts.append(f"<text x={at:.1f} y={_HEIGHT - 5} text-anchor=middle>{text}</text>")
    for number, curve in enumerate(drawn):
        colour = COLOURS[number % len(COLOURS)]
        for run in curve.runs:
            path = " ".join(f"{x(at):.1f},{y(figure):.1f}" for at, figure in run)
            parts.append(f"<polyline fill=none stroke='{colour}' stroke-width=1.6 points='{path}' />")
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' width={_WIDTH} height={_HEIGHT} role=img>"
        f"{''.join(parts)}</svg></figure>"
    )
