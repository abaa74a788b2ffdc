"""Reads recorded arrivals one by one: files with a row per request, and files with windows of time.

:mod:`controlplane.simulation.trace_rows` reads the former: Azure's and BurstGPT's CSV, Mooncake's and
Bailian's JSON lines, and any file whose fields have such names. The latter are ServeGen's windows and what
``tierplane trace`` wrote. Everything random (arrivals inside a window, lengths, thinning) is determined by
the seed.
"""

from __future__ import annotations

import csv
import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from controlplane.core.reports.recorded_traffic import RecordedWindow
from controlplane.errors import SetupError
from controlplane.simulation.trace_rows import (
    Arrival,
    TimeUnit,
    TraceReport,
    cells,
    first_line,
    is_request_table,
    json_columns,
    read_requests,
)

SAMPLE_TRACE: Final = Path(str(files("controlplane") / "data" / "sample_trace.csv"))
"""A synthetic hour of agents' requests: 60 sessions of some turns each, in which the prompt grows."""
_LENGTH_SIGMA: Final = 0.8
"""Standard deviation of the logarithm of prompt lengths within a window; response lengths are exponential.
Both are assumptions, because the windows contain only medians."""
_LONGEST: Final = 8192
_UNKNOWN_TOKENS: Final = (512.0, 128.0)
"""Lengths of a prompt and a response if a window doesn't have them."""
_MOST_IN_WINDOW: Final = 10_000_000


def read_trace(
    path: Path,
    *,
    seed: int = 0,
    keep_ratio: float = 1.0,
    hours: float | None = None,
    skip_hours: float = 0.0,
    time_unit: TimeUnit | None = None,
    report: TraceReport | None = None,
) -> Iterator[Arrival]:
    """The arrivals of a file in the order of their times.

    With a ``keep_ratio`` below 1 each request is used with that probability. ``hours`` limits the length of
    the part after ``skip_hours``. ``time_unit`` is what numbers in the time field of a row count, if the file
    doesn't say. ``report`` is filled with how the file was read. SetupError names the file and line that
    can't be read.
    """
    from_s = skip_hours * 3600
    until_s = math.inf if hours is None else from_s + hours * 3600
    report = TraceReport() if report is None else report
    rng = random.Random(f"trace {seed}")
    for arrival in _arrivals(path, rng, keep_ratio, (from_s, until_s), time_unit, report):
        if arrival.at_s >= until_s:
            return
        if arrival.at_s >= from_s:
            yield arrival._replace(at_s=arrival.at_s - from_s) if from_s else arrival


def _arrivals(
    path: Path,
    rng: random.Random,
    keep_ratio: float,
    span_s: tuple[float, float],
    time_unit: TimeUnit | None,
    report: TraceReport,
) -> Iterator[Arrival]:
    first = first_line(path)
    as_json = first.startswith(("{", "["))
    columns = json_columns(path, first) if as_json else cells(first)
    if not as_json and {"window_start_s", "rate_rps"} <= set(columns):
        report.read_as = "ServeGen's windows of rates"
        return _servegen(path, rng, keep_ratio, span_s)
    if not as_json and {"start_s", "seconds", "requests"} <= set(columns):
        report.read_as = "windows of `tierplane trace`"
        return _recorded(path, rng, keep_ratio, span_s)
    if is_request_table(columns):
        requests = read_requests(path, columns, time_unit=time_unit, report=report)
        return _thin(requests, rng, keep_ratio)
    raise SetupError(
        f"{path} is not a known trace format; its fields are {', '.join(columns[:12]) or 'none'}. "
        "Give a CSV or JSON lines with a time, prompt tokens and response tokens for each request, such as "
        "at_s, input_tokens, output_tokens (or the fields of Azure's, BurstGPT's, Mooncake's or Bailian's "
        "traces), ServeGen's windows (window_start_s, rate_rps, …), or what `tierplane trace` wrote"
    )


def _rows(path: Path, convert: Callable[[Mapping[str, str]], Any]) -> Iterator[Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                yield convert(row)
            except (ValueError, TypeError, KeyError) as error:
                raise SetupError(f"{path}, line {reader.line_num}: {error}") from error


def _thin(arrivals: Iterator[Arrival], rng: random.Random, keep_ratio: float) -> Iterator[Arrival]:
    for arrival in arrivals:
        if keep_ratio >= 1.0 or rng.random() < keep_ratio:
            yield arrival


class ServeGenWindow(NamedTuple):
    """One window of ServeGen's summary."""

    start_s: float
    rate_per_s: float
    cv: float
    """Coefficient of variation of the gaps between arrivals."""
    input_median: float
    output_median: float


def _servegen(
    path: Path, rng: random.Random, keep_ratio: float, span_s: tuple[float, float]
) -> Iterator[Arrival]:
    windows = list(_rows(path, _window))
    length_s = windows[1].start_s - windows[0].start_s if len(windows) > 1 else 600.0
    for window in windows:
        if window.start_s + length_s > span_s[0] and window.start_s < span_s[1]:
            yield from _window_arrivals(window, length_s, rng, keep_ratio)


def _window(row: Mapping[str, str]) -> ServeGenWindow:
    return ServeGenWindow(
        float(row["window_start_s"]),
        float(row["rate_rps"]),
        float(row.get("interarrival_cv") or 1.0),
        float(row.get("input_tokens_mean") or _UNKNOWN_TOKENS[0]),
        float(row.get("output_tokens_mean") or _UNKNOWN_TOKENS[1]),
    )


def _window_arrivals(
    window: ServeGenWindow, length_s: float, rng: random.Random, keep_ratio: float
) -> Iterator[Arrival]:
    """Gamma-distributed gaps with the window's rate and coefficient of variation.

    If requests of a renewal process are used with probability p, the squared coefficient of variation of the
    gaps is 1 + p*(cv² - 1) (a geometric sum of gaps), so the thinned process can be generated directly.
    """
    rate = window.rate_per_s * keep_ratio
    if rate <= 0:
        return
    cv2 = max(1.0 + keep_ratio * (window.cv * window.cv - 1.0), 0.01)
    shape, scale = 1.0 / cv2, cv2 / rate
    mu_in = math.log(max(window.input_median, 1.0))
    mean_out = max(window.output_median, 1.0) / math.log(2.0)
    # The window begins at a random point of a gap, not with an arrival.
    at_s = rng.gammavariate(shape, scale) * rng.random()
    while at_s < length_s:
        prompt = int(min(max(rng.lognormvariate(mu_in, _LENGTH_SIGMA), 1.0), _LONGEST))
        output = int(min(max(rng.expovariate(1.0 / mean_out), 1.0), _LONGEST))
        yield Arrival(window.start_s + at_s, prompt, output)
        at_s += rng.gammavariate(shape, scale)


def _recorded(
    path: Path, rng: random.Random, keep_ratio: float, span_s: tuple[float, float]
) -> Iterator[Arrival]:
    """As many requests as each window counted, with its mean lengths. Their times within the window are
    unknown and drawn uniformly, which is how a given number of Poisson arrivals is distributed."""
    tiers: dict[str, list[RecordedWindow]] = {}
    for window in _rows(path, _recorded_window):
        tiers.setdefault(window.tier, []).append(window)

    def arrivals(windows: list[RecordedWindow], tier_rng: random.Random) -> Iterator[Arrival]:
        for window in sorted(windows, key=lambda window: window.start_s):
            if window.start_s + window.seconds > span_s[0] and window.start_s < span_s[1]:
                yield from _recorded_arrivals(window, tier_rng)

    streams = [arrivals(windows, random.Random(rng.random())) for windows in tiers.values()]
    yield from _thin(heapq.merge(*streams, key=lambda arrival: arrival.at_s), rng, keep_ratio)


def _recorded_window(row: Mapping[str, str]) -> RecordedWindow:
    requests = int(row["requests"])
    if not 0 <= requests <= _MOST_IN_WINDOW:
        raise ValueError(f"{requests} requests: a window has 0 to {_MOST_IN_WINDOW}")
    return RecordedWindow(
        float(row["start_s"]),
        float(row["seconds"]),
        row.get("tier") or "",
        requests,
        float(row.get("input_tokens") or _UNKNOWN_TOKENS[0]),
        float(row.get("output_tokens") or _UNKNOWN_TOKENS[1]),
    )


def _recorded_arrivals(window: RecordedWindow, rng: random.Random) -> Iterator[Arrival]:
    count = range(window.requests)
    times = sorted(window.start_s + window.seconds * rng.random() for _ in count)
    prompts = _with_mean([rng.lognormvariate(0.0, _LENGTH_SIGMA) for _ in count], window.input_tokens)
    outputs = _with_mean([rng.expovariate(1.0) for _ in count], window.output_tokens)
    for at_s, prompt, output in zip(times, prompts, outputs, strict=True):
        yield Arrival(at_s, prompt, output, tier=window.tier)


def _with_mean(drawn: list[float], mean: float | None) -> Iterator[int]:
    """Integers of at least 1, proportional to the drawn values, whose mean is as close to ``mean`` as
    possible."""
    factor = (mean or 0.0) * len(drawn) / (sum(drawn) or 1.0)
    exact, total = 0.0, 0
    for each in drawn:
        exact += each * factor
        value = max(1, round(exact) - total)
        total += value
        yield value
