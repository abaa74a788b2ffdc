"""``tierplane trace``: exports the plane's own traffic to a file that `tierplane simulate` replays."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable
from typing import IO, Any

import click

from controlplane.cli.controller_access import PlaneAccess, connected, plane_options
from controlplane.controller.api import ControllerApi
from controlplane.controller.stored_figures import series_of
from controlplane.core.reports.recorded_traffic import (
    COLUMNS,
    FIGURES,
    Point,
    RecordedWindow,
    StoredPoint,
    relative_to_first,
    traffic_windows,
)
from controlplane.core.reports.report import MAX_WINDOW_MINUTES, Instance, InstanceKind
from controlplane.errors import SetupError

_CLOCK_SKEW_S = 60.0
"""By how much the controller's clock may be ahead of this machine's."""


@click.command()
@click.option(
    "--hours",
    type=click.FloatRange(0, MAX_WINDOW_MINUTES / 60, min_open=True),
    default=24.0,
    show_default=True,
    help="The length of the period before now, in hours.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="-",
    help="The file to write; by default standard output.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@plane_options
def command(hours: float, output: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Export the plane's own traffic to a file that `tierplane simulate --trace` replays.

    Each line is a window: a tier, a start, a length in seconds, the number of requests, and the mean numbers
    of their input and output tokens. The file has no contents of requests. A window is as long as the
    sampling interval (controller.reports.interval_s) in the last hour, one minute in the last two days, and
    ten minutes before that. A summary is printed: to standard error if the trace goes to standard output.
    """
    with connected(address, namespace) as plane:
        windows = recorded(plane, hours)
    requests = sum(window.requests for window in windows)
    if not requests:
        raise SetupError(
            f"no requests were counted in the last {hours:g} h: raise --hours, or try again some time after "
            "the gateway and the controller have started"
        )
    try:
        with click.open_file(output, "w", encoding="utf-8") as file:
            write(windows, file)
    except OSError as error:
        raise SetupError(f"{output} can't be written ({error.strerror}): name another file") from error
    found = summary(windows)
    to_stderr = output == "-"
    if as_json:
        click.echo(json.dumps(found), err=to_stderr)
        return
    for tier, each in found["tiers"].items():
        click.echo(
            f"{tier}: {each['requests']} requests in {each['windows']} windows that cover "
            f"{each['covered_s'] / 3600:.2f} h",
            err=to_stderr,
        )


def recorded(plane: PlaneAccess, hours: float) -> list[RecordedWindow]:
    """The windows of all tiers, with times relative to the start of the first window."""
    until_s = time.time() + _CLOCK_SKEW_S
    since_s = until_s - _CLOCK_SKEW_S - hours * 3600
    windows: list[RecordedWindow] = []
    for name in plane.tiers():
        tier = Instance(InstanceKind.TIER, name, name)
        series = {series_of(tier, figure): figure for figure in FIGURES}
        points = plane.call(ControllerApi.history, tuple(series), since_s, until_s)
        windows += traffic_windows(
            name, {series[each]: _stored_points(found) for each, found in points.items()}
        )
    return relative_to_first(windows)


def write(windows: Iterable[RecordedWindow], file: IO[str]) -> None:
    """Write the windows as CSV, one per line."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(COLUMNS)
    for window in windows:
        rows.writerow(
            (
                _text(window.start_s),
                _text(window.seconds),
                window.tier,
                window.requests,
                _text(window.input_tokens),
                _text(window.output_tokens),
            )
        )


def summary(windows: Iterable[RecordedWindow]) -> dict[str, Any]:
    """The numbers of windows and requests and the time covered, in all and by tier."""
    tiers: dict[str, dict[str, float]] = {}
    for window in windows:
        tier = tiers.setdefault(window.tier, {"windows": 0, "requests": 0, "covered_s": 0.0})
        tier["windows"] += 1
        tier["requests"] += window.requests
        tier["covered_s"] += window.seconds
    return {"requests": sum(tier["requests"] for tier in tiers.values()), "tiers": tiers}


def _stored_points(points: Iterable[Point]) -> list[StoredPoint]:
    return [StoredPoint(point.unix_s, point.step_s, point.count * point.mean) for point in points]


def _text(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2):.10g}"
