"""``tierplane recommendations``: targets, recommendations, and how past recommendations turned out."""

from __future__ import annotations

import json
import time

import click

from controlplane.cli.console import age, stdout
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.controller.api import ControllerApi
from controlplane.core.recommendations.log import IssuedRecommendation
from controlplane.core.recommendations.views import ScalingReport, as_json_value, effect_text, outcome_text


@click.command()
@click.option("--scored", is_flag=True, help="Show only past recommendations that have been scored.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plane_options
def command(scored: bool, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Show each tier's target and its reason, current recommendations, and how past ones turned out."""
    with connected(address, namespace) as plane:
        report = plane.call(ControllerApi.scaling)
    if as_json:
        click.echo(json.dumps(as_json_value(report)))
        return
    console = stdout()
    if not scored:
        console.print(_targets(report))
    unix_s = report.unix_s or time.time()
    shown = [
        item
        for item in report.recommendations
        if (item.score is not None if scored else item.applies(unix_s))
    ]
    if shown:
        console.print(_recommendations(shown, unix_s))
    else:
        console.print(
            "no recommendation has been scored yet"
            if scored
            else "no recommendations: no metric is beyond its threshold"
        )
    record = report.record
    if record.judged:
        console.print(
            f"{record.right} of {record.judged} scored recommendations were right, mean score "
            f"{record.mean or 0.0:.2f} ({record.given} made in all)"
        )


def _targets(report: ScalingReport) -> FittingTable:
    table = FittingTable(
        *("tier", "mode", "serving", "target", "wanted", "forecast", "capacity", "reason"),
        right=("serving", "target", "wanted", "forecast", "capacity"),
    )
    for tier in report.tiers:
        forecast = "-" if tier.forecast_per_s is None else f"{tier.forecast_per_s:.2f}/s"
        numbers = (str(tier.replicas), str(tier.target), str(tier.wanted))
        table.add_row(tier.tier, tier.mode, *numbers, forecast, f"{tier.each_per_s:.2f}/s", tier.reason)
    return table


def _recommendations(issued: list[IssuedRecommendation], unix_s: float) -> FittingTable:
    table = FittingTable(
        *("made", "", "tier", "recommendation", "predicted effect", "confidence", "outcome"),
        leave=("recommendation", "predicted effect", "outcome"),
    )
    for item in issued:
        recommendation = item.recommendation
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M", time.localtime(item.unix_s)),
            f"{age(unix_s - item.unix_s)} ago",
            recommendation.instance,
            f"{recommendation.kind}: {recommendation.suggestion} ({'; '.join(recommendation.reasons)})",
            effect_text(recommendation.effect),
            f"{recommendation.confidence:.0%}",
            outcome_text(item),
        )
    return table
