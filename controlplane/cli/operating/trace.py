"""``tierplane trace``: the plane's own traffic as a file that `tierplane simulate` replays."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable
from typing import IO, Any

import click

from controlplane.cli.controller_access import PlaneAddress, connected, plane_options
from controlplane.controller.api import ControllerApi
from controlplane.controller.reports import series_of
from controlplane.controller.store import Point
from controlplane.core.reports.recorded_traffic import (
    COLUMNS,
    FIGURES,
    RecordedWindow,
    StoredPoint,
    relative_to_first,
    traffic_windows,
)
from controlplane.core.reports.report import MAX_WINDOW_MINUTES, Instance, InstanceKind
from controlplane.errors import SetupError

_SLACK_S = 60.0
"""The controller's clock may be ahead of this machine's."""


@click.command()
@click.option(
    "--hours",
    type=click.FloatRange(0, MAX_WINDOW_MINUTES / 60, min_open=True),
    default=24.0,
    show_default=True,
    help="How far to look back.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True),
    default="-",
    help="The file to write; by default standard output.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@plane_options
def command(hours: float, output: str, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Write the plane's own traffic to a file that `tierplane simulate --trace` replays.

    The file has windows: how many requests came for each tier in how many seconds, and how long prompts and
    answers were on average. Nothing of any request is in it. Windows are as long as samples of the last hour
    (controller.reports.interval_s), a minute up to two days ago, and ten minutes before. If the file
    goes to standard output, what is printed about it goes to stderr.
    """
    with connected(address, namespace) as plane:
        windows = recorded(plane, hours)
    requests = sum(window.requests for window in windows)
    if not requests:
        raise SetupError(
            f"no request was counted in the last {hours:g} h: ask for more --hours, or try again a while "
            "after the gateway and the controller have started"
        )
    try:
        with click.open_file(output, "w", encoding="utf-8") as file:
            write(windows, file)
    except OSError as error:
        raise SetupError(f"{output} can't be written ({error.strerror}): name another file") from error
    found = summary(windows)
    aside = output == "-"
    if as_json:
        click.echo(json.dumps(found), err=aside)
        return
    for tier, each in found["tiers"].items():
        click.echo(
            f"{tier}: {each['requests']} requests in {each['covered_s'] / 3600:.2f} h that are known, "
            f"{each['windows']} windows",
            err=aside,
        )


def recorded(plane: PlaneAddress, hours: float) -> list[RecordedWindow]:
    """The windows of all tiers that the controller knows, from the first one's beginning."""
    _, specs, _ = plane.call(ControllerApi.status)
    until_s = time.time() + _SLACK_S
    since_s = until_s - _SLACK_S - hours * 3600
    windows: list[RecordedWindow] = []
    for spec in specs:
        tier = Instance(InstanceKind.TIER, spec.name, spec.name)
        series = {series_of(tier, figure): figure for figure in FIGURES}
        points = plane.call(ControllerApi.history, tuple(series), since_s, until_s)
        windows += traffic_windows(spec.name, {series[name]: _kept(found) for name, found in points.items()})
    return relative_to_first(windows)


def write(windows: Iterable[RecordedWindow], file: IO[str]) -> None:
    """As CSV, a line each."""
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
    """What a file of these windows holds, by tier."""
    tiers: dict[str, dict[str, float]] = {}
    for window in windows:
        tier = tiers.setdefault(window.tier, {"windows": 0, "requests": 0, "covered_s": 0.0})
        tier["windows"] += 1
        tier["requests"] += window.requests
        tier["covered_s"] += window.seconds
    return {"requests": sum(tier["requests"] for tier in tiers.values()), "tiers": tiers}


def _kept(points: Iterable[Point]) -> list[StoredPoint]:
    return [StoredPoint(point.unix_s, point.step_s, point.count * point.mean) for point in points]


def _text(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2):.10g}"
