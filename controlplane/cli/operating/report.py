"""``tierplane report``: a report on every tier and endpoint over the last minutes, hours or days."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.text import Text

from controlplane.cli.console import stdout
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.controller.api import ControllerApi
from controlplane.core.reports.report import (
    MAX_WINDOW_MINUTES,
    MIN_WINDOW_MINUTES,
    InstanceReport,
)
from controlplane.gateway.api.report_page import DEFAULT_MINUTES, HEADS, OF_SLO, page, row


@click.command()
@click.option(
    "--window",
    "minutes",
    type=click.FloatRange(MIN_WINDOW_MINUTES, MAX_WINDOW_MINUTES),
    default=DEFAULT_MINUTES,
    show_default=True,
    help="The length of the period before now, in minutes.",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with plots.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plane_options
def command(
    minutes: float, html: Path | None, as_json: bool, address: str | None, namespace: str | None
) -> None:
    """Report on every tier and endpoint over the last minutes, hours or days."""
    with connected(address, namespace) as plane:
        report = plane.call(ControllerApi.plane_report, minutes)
    if html is not None:
        html.write_text(page(report), "utf-8")
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    console = stdout()
    for items in (report.tiers, report.endpoints):
        if items:
            console.print(_table(items))
    cost = f", cost {report.cost:.2f}" if report.cost_per_gpu_hour else ""
    console.print(f"{minutes:g} minutes: {report.gpu_hours:.2f} GPU hours{cost}")
    if html is not None:
        console.print(f"written to {html}")


def _table(items: tuple[InstanceReport, ...]) -> FittingTable:
    """One row per item; columns that are empty in all rows are left out."""
    rows = [row(item) for item in items]
    shown = [
        number
        for number, head in enumerate(HEADS)
        if head in ("tier", "requests") or any(cells[number] not in ("", "-", "0", "0.00") for cells in rows)
    ]
    heads = [HEADS[number] for number in shown]
    table = FittingTable(*heads, right=[head for head in heads if head not in ("tier", "endpoint")])
    for item, cells in zip(items, rows, strict=True):
        marked = OF_SLO if item.slo_missed else ()
        table.add_row(
            *(Text(cells[number], "bold red" if HEADS[number] in marked else "") for number in shown)
        )
    return table
