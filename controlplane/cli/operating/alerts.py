"""``tierplane alerts``: what is wrong, what is told of it, and how to hush it."""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from controlplane.cli.console import age, stdout
from controlplane.cli.controller_access import PlaneAddress, connected, plane_options
from controlplane.cli.operating.events import event_json, event_line
from controlplane.controller.api import ControllerApi, Method, P
from controlplane.core.alerts.alert import AlertState, EvaluatedBy, Unit, duration_text
from controlplane.core.alerts.rules import BY_NAME, PREFIX, RULES
from controlplane.core.alerts.views import AlertView, FiringAlert, SilenceView, WebhookView
from controlplane.core.domain.event import Event
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.errors import SetupError

_STYLES = {"critical": "bold red", "warning": "yellow", "info": "dim"}
_OF_ALERTS = ("alert", "alert over", "alert acknowledged", "silence", "silence ended", "alerts left out")
_LATE = 2000
"""Entries of the audit log that ``--all`` looks through."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _seconds(_: click.Context, __: click.Parameter, value: str) -> float:
    """``90s``, ``30m``, ``2h``, ``1d`` → seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.strip())
    if found is None or float(found[1]) <= 0:
        raise click.BadParameter(f"'{value}' is no duration: write it as 90s, 30m, 2h or 1d")
    return float(found[1]) * _UNITS_S[found[2]]


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_by = click.option("--by", default=None, help="Who you are; by default the name you are logged in with.")


@click.group(invoke_without_command=True)
@click.option("--all", "with_past", is_flag=True, help="Also what happened of late, from the audit log.")
@_json
@plane_options
@click.pass_context
def command(
    ctx: click.Context, with_past: bool, as_json: bool, address: str | None, namespace: str | None
) -> None:
    """Show what is wrong with the plane, acknowledge it, or silence it for a while."""
    if ctx.invoked_subcommand is not None:
        return
    with connected(address, namespace) as plane:
        answer = plane.call(ControllerApi.alerts)
        past = _past(plane) if with_past else []
    if as_json:
        value = asdict(answer)
        if with_past:
            value["past"] = [json.loads(event_json(event)) for event in past]
        click.echo(json.dumps(value, indent=2))
        return
    console = stdout()
    unix_s = time.time()
    if answer.alerts:
        console.print(alert_table(answer.alerts, unix_s))
        for line in advice(answer.alerts):
            console.print(line)
    else:
        console.print("Nothing is wrong that a rule looks for.")
    for silence in answer.silences:
        console.print(Text(silence_line(silence, unix_s), style="dim"))
    for webhook in answer.webhooks:
        if webhook.problem or webhook.dropped or webhook.failed:
            console.print(Text(webhook_line(webhook), style="red" if webhook.problem else "yellow"))
    for event in past:
        console.print(Text(event_line(event), style="dim"))


@command.command(name="ack")
@click.argument("rule")
@click.argument("subject")
@_by
@_json
@plane_options
def ack(
    rule: str, subject: str, by: str | None, as_json: bool, address: str | None, namespace: str | None
) -> None:
    """Say that you look after the alert RULE about SUBJECT: it is not told again while it lasts."""
    _act(as_json, address, namespace, ControllerApi.acknowledge_alert, rule, subject, by or _who())


@command.command(name="silence")
@click.option("--rule", default="", help="Of this rule only.")
@click.option("--subject", default="", help="About this tier, GPU or node only.")
@click.option("--for", "for_s", required=True, callback=_seconds, help="How long: 90s, 30m, 2h, 1d.")
@click.option("--reason", required=True, help="Why; it is shown and kept in the audit log.")
@_by
@_json
@plane_options
def silence(
    rule: str,
    subject: str,
    for_s: float,
    reason: str,
    by: str | None,
    as_json: bool,
    address: str | None,
    namespace: str | None,
) -> None:
    """Have nothing told of alerts that match, for a while; they are judged and listed all the same."""
    _act(
        as_json, address, namespace, ControllerApi.silence_alerts, rule, subject, for_s, reason, by or _who()
    )


@command.command(name="unsilence")
@click.argument("number", type=int)
@_by
@_json
@plane_options
def unsilence(number: int, by: str | None, as_json: bool, address: str | None, namespace: str | None) -> None:
    """End the silence of that NUMBER, as `tierplane alerts` lists it."""
    _act(as_json, address, namespace, ControllerApi.unsilence_alerts, number, by or _who())


@command.command(name="rules")
@_json
def rules(as_json: bool) -> None:
    """List every rule as it is without a configuration: when it rings, how badly, who judges it."""
    if as_json:
        click.echo(json.dumps({"rules": [asdict(rule) for rule in RULES]}, indent=2))
        return
    console = stdout()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("rule", "severity", "of", "rings when", "for", "judged by"):
        table.add_column(head, no_wrap=head != "rings when")
    judges = {
        EvaluatedBy.BOTH: "controller, Prometheus",
        EvaluatedBy.PROGRAM: "controller",
        EvaluatedBy.PROMETHEUS: "Prometheus",
    }
    for rule in RULES:
        sign = "<" if rule.below else ">"
        when = f"{rule.figure} {sign} {rule.unit.text(rule.threshold)}"
        if rule.given is not None:
            given = rule.given
            when += f", while {given.figure} {'<' if given.below else '>'} {given.threshold:g}"
        style = _STYLES[rule.severity.value]
        table.add_row(
            rule.name,
            Text(rule.severity.value, style=style),
            rule.kind.value,
            when,
            duration_text(rule.for_s) if rule.for_s else "at once",
            judges[rule.judge],
        )
    console.print(table)


def alert_table(alerts: Sequence[AlertView], unix_s: float) -> Table:
    """One row per alert, the worst first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("severity", "state", "since", "alert", "subject", "value", "limit", ""):
        right = head in {"since", "value", "limit"}
        table.add_column(head, no_wrap=True, justify="right" if right else "left")
    for alert in alerts:
        rule = BY_NAME.get(alert.rule)
        unit = rule.unit if rule is not None else Unit.COUNT
        sign = "<" if rule is not None and rule.below else ">"
        table.add_row(
            Text(alert.severity.value, style=_STYLES[alert.severity.value]),
            alert.state.value,
            age(unix_s - alert.since_unix_s),
            alert.rule.removeprefix(PREFIX),
            alert.subject,
            unit.text(alert.value),
            f"{sign} {unit.text(alert.threshold)}",
            _hushed(alert, unix_s),
        )
    return table


def advice(alerts: Sequence[AlertView]) -> list[Text]:
    """What each alert that fires means, and what to do first."""
    lines = []
    for alert in alerts:
        if alert.state is not AlertState.FIRING:
            continue
        detail = f" ({alert.detail})" if alert.detail else ""
        style = _STYLES[alert.severity.value]
        lines.append(Text(f"{alert.summary}{detail} {alert.action}", style=style))
    return lines


def firing_lines(alerts: Sequence[FiringAlert]) -> list[Text]:
    """The worst of what fires, in one line below other tables; none if nothing fires."""
    if not alerts:
        return []
    worst, more = alerts[0], len(alerts) - 1
    text = f"{worst.severity.value}: {worst.summary}"
    text += f" And {more} more alert{'s' * (more != 1)}." if more else ""
    return [Text(f"{text} See tierplane alerts.", style=_STYLES[worst.severity.value])]


def silence_line(silence: SilenceView, unix_s: float) -> str:
    """A silence for people."""
    what = f"{silence.rule or 'every rule'} about {silence.subject or 'every subject'}"
    left = age(silence.until_unix_s - unix_s)
    return f"silence {silence.number}: {what}, {left} more: {silence.reason} ({silence.by})"


def webhook_line(webhook: WebhookView) -> str:
    """How deliveries to a webhook go, for people."""
    counts = f"{webhook.delivered} messages taken, {webhook.failed} given up, {webhook.waiting} alerts wait"
    dropped = f", {webhook.dropped} left out" if webhook.dropped else ""
    return f"webhook {webhook.name}: {counts}{dropped}{f': {webhook.problem}' if webhook.problem else ''}"


def _hushed(alert: AlertView, unix_s: float) -> str:
    words = [f"acknowledged by {alert.acknowledged}"] if alert.acknowledged else []
    if alert.silenced_until_unix_s is not None:
        words.append(f"silenced for {age(alert.silenced_until_unix_s - unix_s)}")
    return ", ".join(words)


def _past(plane: PlaneAddress) -> list[Event]:
    events = plane.call(ControllerApi.events, -1, _LATE)
    return [event for event in events if event.kind in _OF_ALERTS]


def _act(
    as_json: bool,
    address: str | None,
    namespace: str | None,
    method: Method[P, ActionResponse],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    with connected(address, namespace) as plane:
        answer = plane.call(method, *args, **kwargs)
    if as_json:
        said = {"outcome": answer.outcome.value, "reason": answer.reason, "subjects": list(answer.subjects)}
        click.echo(json.dumps(said))
    elif answer.outcome in {ActionOutcome.REFUSED, ActionOutcome.UNKNOWN}:
        raise SetupError(answer.reason)
    else:
        unchanged = "nothing to do: " if answer.outcome is ActionOutcome.UNCHANGED else ""
        click.echo(f"{unchanged}{answer.reason}")
    if answer.outcome in {ActionOutcome.REFUSED, ActionOutcome.UNKNOWN}:
        raise SystemExit(1)


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "operator"
