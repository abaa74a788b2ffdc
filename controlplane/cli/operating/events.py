"""``tierplane events``: what happened and what was done, by whom, and why."""

from __future__ import annotations

import json
import time

import click

from controlplane.cli.controller_access import PlaneAddress, connected, plane_options
from controlplane.controller.api import ControllerApi
from controlplane.core.domain.event import Event
from controlplane.errors import SetupError

POLL_S = 0.5
AWAY_LIMIT_S = 60.0
"""While following: a controller that is away for longer ends it."""
AT_ONCE = 1000
"""Entries that are asked for at a time."""


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on.")
@click.option("--lines", "-n", default=50, show_default=True, help="How many of the last ones.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@plane_options
def command(follow: bool, lines: int, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Show the audit log: what happened to GPUs, nodes, tiers and endpoints, what was done, and why."""
    with connected(address, namespace) as plane:
        events = plane.call(ControllerApi.events, -1, lines) if lines > 0 else ()
        last = plane.call(ControllerApi.events, -1, 1)
        after = last[-1].number if last else 0
        for event in events:
            click.echo(event_json(event) if as_json else event_line(event))
        try:
            while follow:
                time.sleep(POLL_S)
                for event in _patiently(plane, after):
                    click.echo(event_json(event) if as_json else event_line(event))
                    after = event.number
        except KeyboardInterrupt:
            return


def _patiently(plane: PlaneAddress, after: int) -> tuple[Event, ...]:
    """What came after that number; a controller that is being restarted is waited for. Raises SetupError."""
    deadline_s = time.monotonic() + AWAY_LIMIT_S
    while True:
        try:
            events = plane.call(ControllerApi.events, after, AT_ONCE)
        except SetupError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_S)
        else:
            return events


def event_line(event: Event) -> str:
    """An event for people."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.unix_s))
    by = f" (by {event.actor})" if event.actor != "controller" else ""
    return f"{clock}  {event.subject:<24}  {event.kind}{by}: {event.reason}"


def event_json(event: Event) -> str:
    """An event for programs."""
    return json.dumps(
        {
            "number": event.number,
            "unix_s": event.unix_s,
            "kind": event.kind,
            "subject": event.subject,
            "tier": event.tier,
            "reason": event.reason,
            "actor": event.actor,
        }
    )
