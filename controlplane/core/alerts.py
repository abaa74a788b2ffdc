"""Alerts: when a figure is wrong for long enough, once, until it is right again for long enough.

:class:`AlertBook` is given each rule's signal for each subject at every tick and gives back what must be
told. The life of an alert is PENDING → FIRING → RESOLVED, as in Prometheus: it fires after ``for_s`` without
a break and, unlike there, it resolves only past a threshold of its own (``clear``), so that a figure at the
border does not ring all night. An alert that fires is told once and again every ``repeat_s``, unless it is
acknowledged, silenced or about to resolve. A signal that is missing or stale neither fires nor resolves
anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from controlplane.core.telemetry import Signal


class Severity(StrEnum):
    """How soon someone should look."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class AlertState(StrEnum):
    """Where an alert is in its life."""

    PENDING = "pending"
    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When a figure is wrong."""

    name: str
    severity: Severity
    threshold: float
    """Over it is wrong; with ``below``, under it."""
    summary: str
    """Of what is wrong, with ``{subject}`` and ``{value}``."""
    clear: float | None = None
    """Where it is right again; None: at the threshold."""
    below: bool = False
    for_s: float = 60.0
    """How long it must be wrong, and how long right again."""
    repeat_s: float = 14_400.0

    def wrong(self, value: float) -> bool:
        """Is that value past the threshold?"""
        return value < self.threshold if self.below else value > self.threshold

    def right(self, value: float) -> bool:
        """Is it back for good?"""
        limit = self.threshold if self.clear is None else self.clear
        return value >= limit if self.below else value <= limit


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule about one subject."""

    rule: AlertRule
    subject: str
    state: AlertState
    value: float
    since_s: float
    """When this state was entered."""
    right_since_s: float | None = None
    told_s: float | None = None
    acknowledged: str = ""
    """By whom; it is not told again while it lasts."""

    @property
    def key(self) -> tuple[str, str]:
        """What makes two alerts the same."""
        return self.rule.name, self.subject

    @property
    def text(self) -> str:
        """For people."""
        return self.rule.summary.format(subject=self.subject, value=f"{self.value:g}")


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing is told of what matches, until then."""

    until_s: float
    rule: str = ""
    """Empty: every rule."""
    subject: str = ""
    """Empty: every subject."""
    reason: str = ""

    def covers(self, alert: Alert, now_s: float) -> bool:
        """Does it hold for that alert now?"""
        fits = self.rule in ("", alert.rule.name) and self.subject in ("", alert.subject)
        return fits and now_s < self.until_s


@dataclass(frozen=True, slots=True)
class Observation:
    """A rule's signal for one subject."""

    rule: AlertRule
    subject: str
    signal: Signal


class AlertBook:
    """All alerts that are pending or firing."""

    def __init__(self) -> None:
        self._alerts: dict[tuple[str, str], Alert] = {}
        self._silences: list[Silence] = []

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """In the order in which they began."""
        return tuple(self._alerts.values())

    @property
    def silences(self) -> tuple[Silence, ...]:
        """Those that were given and have not been found to be over."""
        return tuple(self._silences)

    def observe(self, observations: Iterable[Observation], now_s: float) -> tuple[Alert, ...]:
        """One tick; the alerts that must be told now: begun, repeated or resolved."""
        self._silences = [silence for silence in self._silences if now_s < silence.until_s]
        told: list[Alert] = []
        for seen in observations:
            value = seen.signal.fresh
            if value is None:
                continue
            alert = self._step(seen, value, now_s)
            if alert is not None and self._tells(alert, now_s):
                told.append(alert)
                if alert.state is AlertState.FIRING:
                    self._alerts[alert.key] = replace(alert, told_s=now_s)
        return tuple(told)

    def acknowledge(self, rule: str, subject: str, by: str) -> bool:
        """Someone looks after it. True if there is such an alert that fires."""
        alert = self._alerts.get((rule, subject))
        if alert is None or alert.state is not AlertState.FIRING:
            return False
        self._alerts[alert.key] = replace(alert, acknowledged=by)
        return True

    def silence(self, silence: Silence) -> None:
        """Nothing is told of what matches until then; the alerts go on."""
        self._silences.append(silence)

    def forget(self, subject: str) -> None:
        """The subject is gone on purpose: so are its alerts, untold."""
        self._alerts = {key: alert for key, alert in self._alerts.items() if alert.subject != subject}

    def _step(self, seen: Observation, value: float, now_s: float) -> Alert | None:
        """The alert after this reading; None: there is none."""
        key = seen.rule.name, seen.subject
        alert = self._alerts.get(key)
        if alert is None:
            if not seen.rule.wrong(value):
                return None
            alert = Alert(seen.rule, seen.subject, AlertState.PENDING, value, now_s)
        alert = replace(alert, rule=seen.rule, value=value)
        if alert.state is AlertState.PENDING:
            if not seen.rule.wrong(value):
                self._alerts.pop(key, None)
                return None
            if now_s - alert.since_s >= seen.rule.for_s:
                alert = replace(alert, state=AlertState.FIRING, since_s=now_s)
        elif not seen.rule.right(value):
            alert = replace(alert, right_since_s=None)
        elif alert.right_since_s is None:
            alert = replace(alert, right_since_s=now_s)
        if alert.right_since_s is not None and now_s - alert.right_since_s >= seen.rule.for_s:
            self._alerts.pop(key, None)
            return replace(alert, state=AlertState.RESOLVED, since_s=now_s)
        self._alerts[key] = alert
        return alert

    def _tells(self, alert: Alert, now_s: float) -> bool:
        if alert.state is AlertState.PENDING or any(s.covers(alert, now_s) for s in self._silences):
            return False
        if alert.state is AlertState.RESOLVED:
            return alert.told_s is not None  # who never heard of it need not hear that it is over
        if alert.acknowledged or alert.right_since_s is not None:
            return False
        return alert.told_s is None or now_s - alert.told_s >= alert.rule.repeat_s
