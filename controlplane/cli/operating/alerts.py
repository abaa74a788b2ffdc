"""``tierplane alerts``: shows alerts, acknowledges one, and silences some for a while."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.text import Text

from controlplane.cli.console import age, parse_duration, stdout, user_name
from controlplane.cli.controller_access import PlaneAccess, connected, plane_options
from controlplane.cli.fitting_table import FittingTable
from controlplane.cli.operating.events import event_json, event_line
from controlplane.cli.operating.operate import show_response
from controlplane.controller.api import ControllerApi, Method, P
from controlplane.core.alerts.alert import ACTIVE, AlertState, EvaluatedBy, Unit, duration_text
from controlplane.core.alerts.rules import BY_NAME, PREFIX, RULES
from controlplane.core.alerts.views import AlertView, FiringAlert, SilenceView, WebhookView
from controlplane.core.domain.event import Event
from controlplane.core.reconcile.commands import ActionResponse

_STYLES = {"critical": "bold red", "warning": "yellow", "info": "dim"}
_EVENT_KINDS = ("alert", "alert over", "alert acknowledged", "silence", "silence ended", "alerts left out")
_PAST_EVENTS = 2000
"""How many of the last entries in the audit log ``--all`` searches."""


def _seconds(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_by = click.option("--by", default=None, help="Your name, for the audit log; by default your login name.")


@click.group(invoke_without_command=True)
@click.option("--all", "with_past", is_flag=True, help="Also show recent alerts, from the audit log.")
@_json
@plane_options
@click.pass_context
def command(
    ctx: click.Context, with_past: bool, as_json: bool, address: str | None, namespace: str | None
) -> None:
    """Show the plane's alerts, acknowledge one, or silence some for a while."""
    if ctx.invoked_subcommand is not None:
        return
    with connected(address, namespace) as plane:
        response = plane.call(ControllerApi.alerts)
        past = _past(plane) if with_past else []
    if as_json:
        value = asdict(response)
        if with_past:
            value["past"] = [json.loads(event_json(event)) for event in past]
        click.echo(json.dumps(value, indent=2))
        return
    console = stdout()
    unix_s = time.time()
    if response.alerts:
        console.print(alert_table(response.alerts, unix_s))
        for line in action_lines(response.alerts):
            console.print(line)
    else:
        console.print("No alerts.")
    for silence in response.silences:
        console.print(Text(silence_line(silence, unix_s), style="dim"))
    for webhook in response.webhooks:
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
    """Acknowledge the alert RULE about SUBJECT: no further notifications are sent while it fires."""
    _act(as_json, address, namespace, ControllerApi.acknowledge_alert, rule, subject, by or _who())


@command.command(name="silence")
@click.option("--rule", default="", help="Silence only alerts of this rule.")
@click.option("--subject", default="", help="Silence only alerts about this tier, GPU or node.")
@click.option(
    "--for", "for_s", required=True, callback=_seconds, help="How long, such as 90s, 30m, 2h or 1d."
)
@click.option("--reason", required=True, help="The reason; it is displayed, and recorded in the audit log.")
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
    """Send no notifications of matching alerts for a while; they are still evaluated and listed."""
    _act(
        as_json, address, namespace, ControllerApi.silence_alerts, rule, subject, for_s, reason, by or _who()
    )


@command.command(name="unsilence")
@click.argument("number", type=int)
@_by
@_json
@plane_options
def unsilence(number: int, by: str | None, as_json: bool, address: str | None, namespace: str | None) -> None:
    """End the silence with this NUMBER; `tierplane alerts` lists the numbers."""
    _act(as_json, address, namespace, ControllerApi.unsilence_alerts, number, by or _who())


@command.command(name="rules")
@_json
def rules(as_json: bool) -> None:
    """List every rule with its default settings: severity, condition, duration, and what evaluates it."""
    if as_json:
        click.echo(json.dumps({"rules": [asdict(rule) for rule in RULES]}, indent=2))
        return
    console = stdout()
    table = FittingTable(
        *("rule", "severity", "subject", "fires when", "for", "evaluated by"),
        leave=("fires when", "evaluated by"),
    )
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


def alert_table(alerts: Sequence[AlertView], unix_s: float) -> FittingTable:
    """One row per alert, the most severe first."""
    table = FittingTable(
        *("severity", "state", "since", "alert", "subject", "value", "limit", ""),
        right=("since", "value", "limit"),
        leave=("", "limit", "value", "subject", "since"),
    )
    for alert in alerts:
        rule = BY_NAME.get(alert.rule)
        unit = rule.unit if rule is not None else Unit.COUNT
        sign = "<" if rule is not None and rule.below else ">"
        recovering = alert.recovering_since_unix_s
        table.add_row(
            Text(alert.severity.value, style=_STYLES[alert.severity.value]),
            alert.state.value,
            age(unix_s - (alert.since_unix_s if recovering is None else recovering)),
            alert.rule.removeprefix(PREFIX),
            alert.subject,
            unit.text(alert.value),
            f"{sign} {unit.text(alert.threshold)}",
            _notification_state(alert, unix_s),
        )
    return table


def action_lines(alerts: Sequence[AlertView]) -> list[Text]:
    """For each firing alert a line with its meaning and the first thing to do."""
    lines = []
    for alert in alerts:
        if alert.state not in ACTIVE:
            continue
        detail = f" ({alert.detail})" if alert.detail else ""
        style = _STYLES[alert.severity.value]
        lines.append(Text(f"{alert.summary}{detail} {alert.action}", style=style))
    return lines


def firing_summary(alerts: Sequence[FiringAlert]) -> list[Text]:
    """One line with the most severe firing alert, for display below other tables; empty if none fires."""
    if not alerts:
        return []
    worst, more = alerts[0], len(alerts) - 1
    recovering = " (recovering)" if worst.state is AlertState.RECOVERING else ""
    text = f"{worst.severity.value}: {worst.summary}{recovering}"
    text += f" {more} more alert{'s' * (more != 1)}." if more else ""
    return [Text(f"{text} See `tierplane alerts`.", style=_STYLES[worst.severity.value])]


def silence_line(silence: SilenceView, unix_s: float) -> str:
    """A silence as text."""
    scope = f"{silence.rule or 'every rule'} about {silence.subject or 'every subject'}"
    left = age(silence.until_unix_s - unix_s)
    return f"silence {silence.number}: {scope}, {left} left: {silence.reason} ({silence.by})"


def webhook_line(webhook: WebhookView) -> str:
    """The state of deliveries to a webhook as text."""
    counts = (
        f"{webhook.delivered} messages delivered, {webhook.failed} failed, {webhook.waiting} alerts waiting"
    )
    dropped = f", {webhook.dropped} dropped" if webhook.dropped else ""
    return f"webhook {webhook.name}: {counts}{dropped}{f': {webhook.problem}' if webhook.problem else ''}"


def _notification_state(alert: AlertView, unix_s: float) -> str:
    parts = []
    if alert.state is AlertState.RECOVERING:
        rule = BY_NAME.get(alert.rule)
        unit = rule.unit if rule is not None else Unit.COUNT
        parts.append("no longer applies" if alert.current is None else f"now {unit.text(alert.current)}")
        parts.append(f"fired {age(unix_s - alert.since_unix_s)} ago")
    if alert.acknowledged:
        parts.append(f"acknowledged by {alert.acknowledged}")
    if alert.silenced_until_unix_s is not None:
        parts.append(f"silenced for {age(alert.silenced_until_unix_s - unix_s)}")
    return ", ".join(parts)


def _past(plane: PlaneAccess) -> list[Event]:
    events = plane.call(ControllerApi.events, -1, _PAST_EVENTS)
    return [event for event in events if event.kind in _EVENT_KINDS]


def _act(
    as_json: bool,
    address: str | None,
    namespace: str | None,
    method: Method[P, ActionResponse],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    with connected(address, namespace) as plane:
        response = plane.call(method, *args, **kwargs)
    show_response(response, as_json)


def _who() -> str:
    return user_name() or "operator"
