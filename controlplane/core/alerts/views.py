"""Alerts as people and programs are shown them: in the controller's answers, in snapshots, in webhooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from controlplane.core.alerts.book import Alert, AlertBook, AlertState, Severity, SubjectType

MAX_IN_SNAPSHOT: Final = 500
"""Alerts that gateways are told of, the worst first."""


@dataclass(frozen=True, slots=True)
class FiringAlert:
    """An alert that fires, as snapshots carry it: without what changes at every look."""

    rule: str
    severity: Severity
    kind: SubjectType
    subject: str
    summary: str
    action: str
    since_unix_s: float
    acknowledged: str = ""
    silenced: bool = False


@dataclass(frozen=True, slots=True)
class AlertView:
    """An alert that is pending, fires, or is over."""

    rule: str
    state: AlertState
    severity: Severity
    kind: SubjectType
    subject: str
    summary: str
    action: str
    detail: str
    """What is known of the cause; may be empty."""
    value: float
    threshold: float
    since_unix_s: float
    """When ``state`` was entered."""
    acknowledged: str = ""
    """By whom."""
    silenced_until_unix_s: float | None = None


@dataclass(frozen=True, slots=True)
class SilenceView:
    """A silence that holds."""

    number: int
    rule: str
    subject: str
    until_unix_s: float
    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class WebhookView:
    """How deliveries to one webhook go, since the controller started."""

    name: str
    """Its scheme and host: the rest of its address may be secret."""
    delivered: int
    """Messages that it took."""
    failed: int
    """Messages that were given up."""
    dropped: int
    """Alerts that were left out because too many waited."""
    waiting: int
    problem: str = ""
    """What is wrong now."""


@dataclass(frozen=True, slots=True)
class AlertsResponse:
    """All that ``tierplane alerts`` shows."""

    alerts: tuple[AlertView, ...]
    silences: tuple[SilenceView, ...]
    webhooks: tuple[WebhookView, ...]


def view(alert: Alert, book: AlertBook, now_s: float, shift_s: float) -> AlertView:
    """One alert; ``shift_s`` is wall clock less monotonic clock."""
    rule = alert.rule
    silence = book.silenced_by(alert, now_s)
    return AlertView(
        rule.name,
        alert.state,
        rule.severity,
        rule.kind,
        alert.subject,
        rule.text(alert.subject),
        rule.action,
        alert.detail,
        alert.value,
        rule.threshold,
        alert.since_s + shift_s,
        alert.acknowledged,
        None if silence is None else silence.until_s + shift_s,
    )


def worst_first(views: Iterable[AlertView]) -> list[AlertView]:
    """By severity, then those that fire before those that are pending, then the oldest."""
    return sorted(
        views, key=lambda each: (-each.severity.rank, each.state is AlertState.PENDING, each.since_unix_s)
    )


def firing(book: AlertBook, now_s: float, shift_s: float) -> tuple[FiringAlert, ...]:
    """For a snapshot."""
    views = [view(alert, book, now_s, shift_s) for alert in book.alerts if alert.state is AlertState.FIRING]
    return tuple(
        FiringAlert(
            each.rule,
            each.severity,
            each.kind,
            each.subject,
            each.summary,
            each.action,
            each.since_unix_s,
            each.acknowledged,
            each.silenced_until_unix_s is not None,
        )
        for each in worst_first(views)[:MAX_IN_SNAPSHOT]
    )


def silences(book: AlertBook, now_s: float, shift_s: float) -> tuple[SilenceView, ...]:
    """Those that hold, in the order in which they were given."""
    return tuple(
        SilenceView(each.number, each.rule, each.subject, each.until_s + shift_s, each.reason, each.by)
        for each in book.silences
        if each.until_s > now_s
    )


class AlertTransition(StrEnum):
    """What is told of an alert."""

    FIRING = "firing"
    REPEATED = "repeated"
    """It still fires."""
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class AlertNotice:
    """Something that must be told."""

    happening: AlertTransition
    alert: AlertView


def notice(alert: Alert, book: AlertBook, now_s: float, shift_s: float) -> AlertNotice:
    """Of an alert that :attr:`~controlplane.core.alerts.book.AlertChanges.told` names."""
    if alert.state is AlertState.RESOLVED:
        happening = AlertTransition.RESOLVED
    else:
        happening = AlertTransition.FIRING if alert.told_s is None else AlertTransition.REPEATED
    return AlertNotice(happening, view(alert, book, now_s, shift_s))
