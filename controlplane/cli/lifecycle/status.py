"""``tierplane status``: the state of every tier and endpoint."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from controlplane.cli.console import stdout
from controlplane.cli.controller_access import PlaneAccess, connected, plane_options
from controlplane.cli.lifecycle.activity import activity_json, activity_lines
from controlplane.cli.lifecycle.tables import (
    gateway_table,
    gateways_json,
    not_ready_lines,
    status_table,
    tier_json,
)
from controlplane.cli.operating.alerts import firing_summary
from controlplane.controller.api import ControllerApi
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.cluster.status import TierStatus, tier_statuses
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.event import Event
from controlplane.core.reconcile.migrations import Activity

REFRESH_S = 1.0
SHOWN_EVENTS = 8


@dataclass(frozen=True, slots=True)
class ShownPlane:
    """What the controller says about a plane."""

    snapshot: ClusterSnapshot
    tiers: tuple[TierSpec, ...]
    events: tuple[Event, ...]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch one object per line.")
@click.option("--watch", is_flag=True, help="Refresh once a second.")
@plane_options
def command(as_json: bool, watch: bool, address: str | None, namespace: str | None) -> None:
    """Show each tier: replicas, state, model, endpoint, requests in flight.

    Exit status 0 if every tier serves with all its replicas, 3 if not.
    """
    with connected(address, namespace) as plane:
        try:
            if watch:
                _watch(plane, as_json)
                return
            view, activity = _query(plane)
            if as_json:
                click.echo(json.dumps({"url": plane.url, **_as_json(view, activity)}, indent=2))
            else:
                console = stdout()
                if plane.url:
                    console.print(f"{plane.url}/v1\n")
                console.print(_tables(view, activity))
        except KeyboardInterrupt:
            return
    if not all(tier.ready for tier in _tiers(view)):
        raise SystemExit(3)


def _watch(plane: PlaneAccess, as_json: bool) -> None:
    if as_json:
        while True:
            click.echo(json.dumps(_as_json(*_query(plane))))
            time.sleep(REFRESH_S)
    with Live(console=stdout(), auto_refresh=False) as live:
        while True:
            live.update(_tables(*_query(plane), events=True), refresh=True)
            time.sleep(REFRESH_S)


def _query(plane: PlaneAccess) -> tuple[ShownPlane, Activity]:
    return ShownPlane(*plane.call(ControllerApi.status)), plane.call(ControllerApi.activity)


def _tiers(view: ShownPlane) -> tuple[TierStatus, ...]:
    return tier_statuses(view.snapshot, view.tiers)


def _tables(view: ShownPlane, activity: Activity, *, events: bool = False) -> Group:
    unix_s = view.snapshot.unix_s
    parts: list[Any] = [
        status_table(_tiers(view), unix_s),
        *not_ready_lines(_tiers(view), unix_s),
        *activity_lines(activity),
        *firing_summary(view.snapshot.alerts),
        Text(),
        gateway_table(view.snapshot.gateways, unix_s),
    ]
    if events:
        parts.append(Text())
        for event in view.events[-SHOWN_EVENTS:]:
            clock = time.strftime("%H:%M:%S", time.localtime(event.unix_s))
            parts.append(Text(f"{clock}  {event.subject}  {event.kind}: {event.reason}", style="dim"))
    return Group(*parts)


def _as_json(view: ShownPlane, activity: Activity) -> dict[str, Any]:
    unix_s = view.snapshot.unix_s
    return {
        "unix_s": unix_s,
        "epoch": view.snapshot.epoch,
        "version": view.snapshot.version,
        "ready": all(tier.ready for tier in _tiers(view)),
        "tiers": [tier_json(tier, unix_s) for tier in _tiers(view)],
        "gateways": gateways_json(view.snapshot),
        "activity": activity_json(activity),
        "alerts": [asdict(alert) for alert in view.snapshot.alerts],
        "events": [
            {
                "unix_s": event.unix_s,
                "kind": event.kind,
                "subject": event.subject,
                "tier": event.tier,
                "reason": event.reason,
            }
            for event in view.events
        ],
    }
