"""``tierplane usage``: what keys, teams, tiers or sessions have used, and the cost a tier higher."""

from __future__ import annotations

import csv
import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click

from controlplane.cli.console import parse_time, stdout
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.controller.api import ControllerApi
from controlplane.core.traffic.request_log import UsageBy, UsageSums, UsageView
from controlplane.gateway.api.operator_queries import MOST_ROWS

_OWNER: Final = {
    UsageBy.KEY: ("key", "key_name", "team"),
    UsageBy.TEAM: ("team",),
    UsageBy.TIER: ("tier",),
    UsageBy.SESSION: ("session", "team"),
}
_FIGURES: Final = (
    "requests", "failed", "prompt_tokens", "generated_tokens", "gpu_s", "cost",
    "priced_requests", "priced_gpu_s", "next_tier_gpu_s", "next_tier_cost",
)  # fmt: skip


def _when(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    try:
        return time.time() if value is None else parse_time(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.option(
    "--by", type=click.Choice([str(each) for each in UsageBy]), default=str(UsageBy.TEAM), show_default=True,
    help="What to sum up by.",
)  # fmt: skip
@click.option(
    "--since", "since_unix_s", default="24h", show_default=True, callback=_when,
    help="How far back (24h, 30d), or from when (2027-01-31, UTC); whole hours are counted.",
)  # fmt: skip
@click.option("--until", "until_unix_s", callback=_when, help="Until when, as --since; by default until now.")
@click.option("--key", default="", help="Only what this key has used: an id or a name.")
@click.option("--team", default="", help="Only what this team has used.")
@click.option("-n", "most", type=click.IntRange(1, MOST_ROWS), default=1000, help="The most rows.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plane_options
def command(
    by: str,
    since_unix_s: float,
    until_unix_s: float,
    key: str,
    team: str,
    most: int,
    as_csv: bool,
    as_json: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    """Show what keys, teams, tiers or sessions have used, and what it would have cost a tier higher."""
    if since_unix_s >= until_unix_s:
        raise click.BadParameter("it must be before --until", param_hint="--since")
    with connected(address, namespace) as plane:
        found = plane.call(
            ControllerApi.usage, since_unix_s, until_unix_s, UsageBy(by), key=key, team=team, limit=most
        )
    if as_json:
        value = {
            "by": found.by,
            "from_unix_s": found.from_unix_s,
            "until_unix_s": found.until_unix_s,
            "cost_per_gpu_hour": found.cost_per_gpu_hour,
            "usage": [usage_value(item, found) for item in found.usage],
        }
        click.echo(json.dumps(value, indent=2))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow((*_OWNER[found.by], *_FIGURES))
        for item in found.usage:
            row = usage_value(item, found)
            writer.writerow([_safe(row[name]) for name in (*_OWNER[found.by], *_FIGURES)])
    else:
        console = stdout()
        if found.usage:
            console.print(usage_table(found))
        console.print(_summary(found))


def usage_value(item: UsageSums, view: UsageView) -> dict[str, Any]:
    """One row as JSON; costs are null if no price is known."""
    value = asdict(item)
    per_s = view.cost_per_gpu_hour / 3600
    value["cost"] = item.gpu_s * per_s if per_s else None
    value["next_tier_cost"] = item.next_tier_gpu_s * per_s if per_s and item.priced_requests else None
    return {name: value[name] for name in (*_OWNER[view.by], *_FIGURES)}


def usage_table(view: UsageView) -> FittingTable:
    """One row per key, team, tier or session. ``higher`` is how many times as much GPU time the next tier
    would have taken, over the requests for which it is known."""
    owner = [name.replace("_", " ") for name in _OWNER[view.by]]
    numbers = ("requests", "failed", "prompt", "generated", "GPU s", "cost", "higher")
    table = FittingTable(
        *owner, *numbers, right=numbers, without_empty=("cost", "higher"), leave=("failed", "key")
    )
    for item in view.usage:
        value = usage_value(item, view)
        table.add_row(
            *(str(value[name]) or "-" for name in _OWNER[view.by]),
            str(item.requests),
            str(item.failed),
            str(item.prompt_tokens),
            str(item.generated_tokens),
            f"{item.gpu_s:.3f}",
            "" if value["cost"] is None else f"{value['cost']:.5f}",
            f"x {item.next_tier_gpu_s / item.priced_gpu_s:.2f}" if item.priced_gpu_s else "",
        )
    return table


def _summary(view: UsageView) -> str:
    from_text, until_text = (
        datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")
        for unix_s in (view.from_unix_s, view.until_unix_s)
    )
    text = f"{from_text} to {until_text} UTC"
    priced = sum(item.priced_requests for item in view.usage)
    if not priced:
        return text
    took = sum(item.priced_gpu_s for item in view.usage)
    higher = sum(item.next_tier_gpu_s for item in view.usage)
    requests = sum(item.requests for item in view.usage)
    return (
        f"{text}; {priced} of {requests} requests took {took:.1f} GPU-seconds, a tier higher they would have "
        f"taken about {higher:.1f}"
    )


def _safe(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value
