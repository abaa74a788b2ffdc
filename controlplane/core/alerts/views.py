"""Views of alerts, for the controller's responses, snapshots and webhooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from controlplane.core.alerts.alert import ACTIVE, Alert, AlertState, Severity, SubjectType
from controlplane.core.alerts.table import AlertTable

MAX_IN_SNAPSHOT: Final = 500
"""Maximum number of alerts in a snapshot; the worst ones are included."""


@dataclass(frozen=True, slots=True)
class FiringAlert:
    """A firing alert in snapshots and ``GET /alerts``; without value and detail, which would cause a new
    snapshot at every evaluation."""

    rule: str
    severity: Severity
    kind: SubjectType
    subject: str
    summary: str
    action: str
    since_unix_s: float
    acknowledged: str = ""
    silenced: bool = False
    state: AlertState = AlertState.FIRING
    """FIRING or RECOVERING."""


@dataclass(frozen=True, slots=True)
class AlertView:
    """A pending, firing or resolved alert, for ``tierplane alerts`` and webhooks."""

    rule: str
    state: AlertState
    severity: Severity
    kind: SubjectType
    subject: str
    summary: str
    action: str
    detail: str
    """The cause, if it is known."""
    value: float
    """The last value past the threshold."""
    threshold: float
    since_unix_s: float
    """When it became pending; from firing on, when it fired; once resolved, when it was resolved."""
    acknowledged: str = ""
    """Who acknowledged it."""
    silenced_until_unix_s: float | None = None
    current: float | None = None
    """The value now, which is inside the limits while it is recovering; None if the rule does not apply
    now."""
    recovering_since_unix_s: float | None = None


@dataclass(frozen=True, slots=True)
class SilenceView:
    """A silence that has not expired."""

    number: int
    rule: str
    subject: str
    until_unix_s: float
    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class WebhookView:
    """Deliveries to one webhook since the controller started."""

    name: str
    """Scheme and host; the rest of the URL may be secret."""
    delivered: int
    """Messages that the webhook accepted."""
    failed: int
    """Messages given up after the last attempt."""
    dropped: int
    """Alerts dropped because the queue was full."""
    waiting: int
    """Alerts in the queue."""
    problem: str = ""
    """Why the last delivery failed; empty if it succeeded."""


@dataclass(frozen=True, slots=True)
class AlertsResponse:
    """Everything that ``tierplane alerts`` shows."""

    alerts: tuple[AlertView, ...]
    silences: tuple[SilenceView, ...]
    webhooks: tuple[WebhookView, ...]


def view(alert: Alert, table: AlertTable, now_s: float, shift_s: float) -> AlertView:
    """The view of one alert; ``shift_s`` is wall clock less monotonic clock."""
    rule = alert.rule
    silence = table.silenced_by(alert, now_s)
    return AlertView(
        rule=rule.name,
        state=alert.state,
        severity=rule.severity,
        kind=rule.kind,
        subject=alert.subject,
        summary=rule.text(alert.subject),
        action=rule.action,
        detail=alert.detail,
        value=alert.value,
        threshold=rule.threshold,
        since_unix_s=alert.since_s + shift_s,
        acknowledged=alert.acknowledged,
        silenced_until_unix_s=None if silence is None else silence.until_s + shift_s,
        current=alert.current,
        recovering_since_unix_s=(
            alert.cleared_since_s + shift_s
            if alert.state is AlertState.RECOVERING and alert.cleared_since_s is not None
            else None
        ),
    )


def worst_first(views: Iterable[AlertView]) -> list[AlertView]:
    """By severity; then firing, recovering, pending; then the oldest first."""
    order = (AlertState.FIRING, AlertState.RECOVERING, AlertState.PENDING, AlertState.RESOLVED)
    return sorted(views, key=lambda each: (-each.severity.rank, order.index(each.state), each.since_unix_s))


def firing(table: AlertTable, now_s: float, shift_s: float) -> tuple[FiringAlert, ...]:
    """The alerts that fire or recover, for a snapshot, the worst first."""
    views = [view(alert, table, now_s, shift_s) for alert in table.alerts if alert.state in ACTIVE]
    return tuple(
        FiringAlert(
            rule=each.rule,
            severity=each.severity,
            kind=each.kind,
            subject=each.subject,
            summary=each.summary,
            action=each.action,
            since_unix_s=each.since_unix_s,
            acknowledged=each.acknowledged,
            silenced=each.silenced_until_unix_s is not None,
            state=each.state,
        )
        for each in worst_first(views)[:MAX_IN_SNAPSHOT]
    )


def silences(table: AlertTable, now_s: float, shift_s: float) -> tuple[SilenceView, ...]:
    """Silences that have not expired, by number."""
    return tuple(
        SilenceView(each.number, each.rule, each.subject, each.until_s + shift_s, each.reason, each.by)
        for each in table.silences
        if each.until_s > now_s
    )


class AlertTransition(StrEnum):
    """The event that a notification reports."""

    FIRING = "firing"
    REPEATED = "repeated"
    """The alert is still firing."""
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class AlertNotice:
    """One notification."""

    transition: AlertTransition
    alert: AlertView


def notice(alert: Alert, table: AlertTable, now_s: float, shift_s: float) -> AlertNotice:
    """The notification for an alert of :attr:`~controlplane.core.alerts.table.AlertChanges.due`."""
    if alert.state is AlertState.RESOLVED:
        transition = AlertTransition.RESOLVED
    else:
        transition = AlertTransition.FIRING if alert.notified_s is None else AlertTransition.REPEATED
    return AlertNotice(transition, view(alert, table, now_s, shift_s))
