"""``tierplane events``: the audit log."""

from __future__ import annotations

import json
import time

import click

from controlplane.cli.controller_access import PlaneAccess, connected, plane_options
from controlplane.controller.api import ControllerApi
from controlplane.core.domain.event import Event
from controlplane.errors import SetupError
from controlplane.terminal import printable

POLL_S = 0.5
UNREACHABLE_LIMIT_S = 60.0
"""``--follow`` ends if the controller can't be reached for this long."""
EVENTS_PER_CALL = 1000


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Also print new events as they happen.")
@click.option("--lines", "-n", default=50, show_default=True, help="How many last events to print.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@plane_options
def command(follow: bool, lines: int, as_json: bool, address: str | None, namespace: str | None) -> None:
    """Show the audit log: events of GPUs, nodes, tiers and endpoints, actions taken, and reasons."""
    with connected(address, namespace) as plane:
        events = plane.call(ControllerApi.events, -1, lines) if lines > 0 else ()
        last = plane.call(ControllerApi.events, -1, 1)
        after = last[-1].number if last else 0
        for event in events:
            click.echo(event_json(event) if as_json else event_line(event))
        try:
            while follow:
                time.sleep(POLL_S)
                for event in _events_after(plane, after):
                    click.echo(event_json(event) if as_json else event_line(event))
                    after = event.number
        except KeyboardInterrupt:
            return


def _events_after(plane: PlaneAccess, after: int) -> tuple[Event, ...]:
    """The events after number ``after``; waits for a controller that is restarting. Raises SetupError."""
    deadline_s = time.monotonic() + UNREACHABLE_LIMIT_S
    while True:
        try:
            events = plane.call(ControllerApi.events, after, EVENTS_PER_CALL)
        except SetupError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(POLL_S)
        else:
            return events


def event_line(event: Event) -> str:
    """An event as a line of text."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.unix_s))
    by = f" (by {event.actor})" if event.actor != "controller" else ""
    return printable(f"{clock}  {event.subject:<24}  {event.kind}{by}: {event.reason}")


def event_json(event: Event) -> str:
    """An event as a line of JSON."""
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
