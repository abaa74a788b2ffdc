"""``tierplane requests`` and ``tierplane sessions``: the log of requests and its sums by session."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from controlplane.cli.console import parse_duration, stdout
from controlplane.cli.controller_access import connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.controller.api import ControllerApi
from controlplane.core.traffic.request_log import LoggedRequest, RequestsView, SessionOrder, SessionsView
from controlplane.gateway.api.operator_queries import MOST_REQUESTS

DAY_S = 86_400.0


def _seconds(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_since = click.option(
    "--since",
    "since_s",
    default="1h",
    show_default=True,
    callback=_seconds,
    help="How far back, such as 15m, 2h or 7d.",
)
_top = click.option(
    "--top",
    "-n",
    "most",
    type=click.IntRange(1, MOST_REQUESTS),
    default=20,
    show_default=True,
    help="How many to show.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.option("--slow", is_flag=True, help="Show the slowest first instead of the newest.")
@click.option("--failed", is_flag=True, help="Show only those that did not succeed.")
@click.option("--tier", default="", help="Show only those that this tier served or that were meant for it.")
@click.option("--session", default="", help="Show only those of this session.")
@click.option("--key", default="", help="Show only those of this key: an id or a name.")
@click.option("--team", default="", help="Show only those of this team.")
@_since
@_top
@_json
@plane_options
def command(
    slow: bool,
    failed: bool,
    tier: str,
    session: str,
    key: str,
    team: str,
    since_s: float,
    most: int,
    as_json: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    """Show single requests that have ended: where they were served, how fast, at what cost."""
    since_unix_s = time.time() - since_s
    with connected(address, namespace) as plane:
        found = plane.call(ControllerApi.requests, since_unix_s, slow, failed, tier, session, most, key, team)
    if as_json:
        _echo_json(found, "requests")
        return
    console = stdout()
    if found.requests:
        console.print(requests_table(found, time.time()))
    console.print(requests_summary(found))


@click.command()
@click.option(
    "--by",
    "--top",
    "order",
    type=click.Choice([each.value for each in SessionOrder]),
    default=SessionOrder.COST.value,
    show_default=True,
    help="What to order the sessions by.",
)
@click.option(
    "-n",
    "most",
    type=click.IntRange(1, MOST_REQUESTS),
    default=20,
    show_default=True,
    help="How many to show.",
)
@_since
@_json
@plane_options
def sessions(
    order: str, most: int, since_s: float, as_json: bool, address: str | None, namespace: str | None
) -> None:
    """Show the sessions that cost most, or have most requests or tokens; whole hours are counted."""
    since_unix_s = time.time() - since_s
    with connected(address, namespace) as plane:
        found = plane.call(ControllerApi.sessions, since_unix_s, SessionOrder(order), most)
    if as_json:
        _echo_json(found, "sessions")
        return
    console = stdout()
    if found.sessions:
        console.print(sessions_table(found, time.time()))
    console.print(f"{found.count} session{'s' * (found.count != 1)}")


def _echo_json(found: RequestsView | SessionsView, key: str) -> None:
    """Print a view; each item of its member ``key`` gets its ``cost``, null if there is no price."""
    value = asdict(found)
    for each in value[key]:
        each["cost"] = each["gpu_s"] / 3600 * found.cost_per_gpu_hour if found.cost_per_gpu_hour else None
    click.echo(json.dumps(value, indent=2))


def requests_table(found: RequestsView, unix_s: float) -> FittingTable:
    """One row per request; times are in seconds."""
    table = FittingTable(
        *("ended", "request", "tier", "outcome", "tokens", "first", "total", "queue", "tries", "resumed"),
        *("GPU s", "cost", "api", "model", "meant for", "key", "team", "session", "endpoint"),
        right=("tokens", "first", "total", "queue", "tries", "resumed", "GPU s", "cost"),
        leave=(
            "endpoint",
            "session",
            "team",
            "key",
            "meant for",
            "model",
            "api",
            "cost",
            "GPU s",
            "resumed",
            "tries",
            "queue",
        ),
        without_empty=("resumed", "cost", "meant for", "key", "team", "session", "first"),
    )
    for item in found.requests:
        table.add_row(
            _clock(item.unix_s, unix_s),
            item.request_id,
            item.tier or "none",
            _outcome(item),
            f"{item.prompt_tokens}+{item.generated_tokens}",
            "" if item.ttft_s is None else f"{item.ttft_s:.3f}",
            f"{item.total_s:.3f}",
            f"{item.queued_s:.3f}",
            str(item.attempts),
            str(item.resumed) if item.resumed else "",
            f"{item.gpu_s:.3f}",
            _cost(item.gpu_s, found.cost_per_gpu_hour),
            f"{item.api}{', streamed' if item.stream else ''}",
            item.model,
            item.asked if item.asked != item.tier else "",
            item.key_name or item.key,
            item.team,
            item.session,
            item.endpoint,
        )
    return table


def requests_summary(found: RequestsView) -> str:
    """How much of the log is shown, and of how many requests there are."""
    text = f"{len(found.requests)} of {found.matching} logged requests that match"
    if found.ended > found.logged:
        text += (
            f"; {found.logged} of about {found.ended} requests of this time are logged: the slowest, those "
            "that failed, and some of the others"
        )
    return text


def sessions_table(found: SessionsView, unix_s: float) -> FittingTable:
    """One row per session."""
    numbers = ("requests", "failed", "prompt", "generated", "GPU s", "cost")
    table = FittingTable(
        *("session", "team", *numbers, "last"),
        right=numbers,
        without_empty=("cost", "team"),
        leave=("last", "failed"),
    )
    for item in found.sessions:
        table.add_row(
            item.session,
            item.team,
            str(item.requests),
            str(item.failed),
            str(item.prompt_tokens),
            str(item.generated_tokens),
            f"{item.gpu_s:.3f}",
            _cost(item.gpu_s, found.cost_per_gpu_hour),
            _clock(item.last_unix_s, unix_s),
        )
    return table


def _outcome(item: LoggedRequest) -> str:
    return "ok" if item.outcome == "ok" else f"{item.outcome}: {item.reason}"


def _clock(at_unix_s: float, now_unix_s: float) -> str:
    form = "%H:%M:%S" if now_unix_s - at_unix_s < DAY_S else "%b %d %H:%M"
    return time.strftime(form, time.localtime(at_unix_s))


def _cost(gpu_s: float, per_hour: float) -> str:
    return f"{gpu_s / 3600 * per_hour:.5f}" if per_hour else ""
