"""All alerts of one plane: PENDING → FIRING ⇄ RECOVERING → RESOLVED, and when a notification is due.

As in Prometheus, an alert fires once the breach has lasted ``for_s`` without interruption. Unlike in
Prometheus, it resolves only past a second threshold (``clear``), so that a value near the threshold does not
fire again and again. A firing alert is notified at once and again every ``repeat_s``, unless it is
acknowledged, silenced or already clear. A signal that is stale or missing neither fires nor resolves an
alert."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

from controlplane.core.alerts.alert import ACTIVE, Alert, AlertRule, AlertState, Silence
from controlplane.core.telemetry.series import Signal

MAX_ALERTS: Final = 10_000
"""Maximum number of alerts in a table; while it is full, no new alert begins."""
MAX_SILENCES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Observation:
    """A rule's signal for one subject."""

    rule: AlertRule
    subject: str
    signal: Signal
    precondition_met: bool = True
    """False if the rule does not apply to the subject now, whatever the value."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AlertChanges:
    """What one round of observations changed."""

    fired: tuple[Alert, ...] = ()
    resolved: tuple[Alert, ...] = ()
    due: tuple[Alert, ...] = ()
    """Alerts for which a notification must be sent now, because they fired, are due again (``notified_s`` is
    the last time), or resolved."""


class AlertTable:
    """All alerts that are pending or firing."""

    def __init__(self) -> None:
        self._alerts: dict[tuple[str, str], Alert] = {}
        self._silences: list[Silence] = []
        self._last_number = 0

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """All alerts, in the order in which they began."""
        return tuple(self._alerts.values())

    def contains(self, rule: str, subject: str) -> bool:
        """Whether an alert of this rule and subject is pending or firing."""
        return (rule, subject) in self._alerts

    @property
    def full(self) -> bool:
        """Whether no new alert can begin until one resolves."""
        return len(self._alerts) >= MAX_ALERTS

    @property
    def silences(self) -> tuple[Silence, ...]:
        """All silences, in the order of their numbers; expired ones are dropped by the next
        :meth:`observe`."""
        return tuple(self._silences)

    def observe(self, observations: Iterable[Observation], now_s: float) -> AlertChanges:
        """Apply one round of observations."""
        self._silences = [silence for silence in self._silences if now_s < silence.until_s]
        fired: list[Alert] = []
        resolved: list[Alert] = []
        due: list[Alert] = []
        for observation in observations:
            value = observation.signal.fresh
            if value is None:
                continue
            alert = self._step(observation, value, now_s)
            if alert is None or alert.state is AlertState.PENDING:
                continue
            if alert.state is AlertState.RESOLVED:
                resolved.append(alert)
            elif alert.since_s == now_s:
                fired.append(alert)
            if self._due(alert, now_s):
                due.append(alert)
                if alert.state in ACTIVE:
                    self._alerts[alert.key] = replace(alert, notified_s=now_s)
        return AlertChanges(tuple(fired), tuple(resolved), tuple(due))

    def end(self, keys: Collection[tuple[str, str]], reason: str, now_s: float) -> AlertChanges:
        """Resolve these alerts although their values did not clear, because their subject or rule is gone."""
        resolved = []
        for key in keys:
            alert = self._alerts.pop(key, None)
            if alert is not None and alert.state in ACTIVE:
                resolved.append(replace(alert, state=AlertState.RESOLVED, since_s=now_s, detail=reason))
        due = tuple(alert for alert in resolved if self._due(alert, now_s))
        return AlertChanges((), tuple(resolved), due)

    def acknowledge(self, rule: str, subject: str, by: str) -> bool:
        """Send no more notifications for an alert until it resolves. False if no such alert is firing."""
        alert = self._alerts.get((rule, subject))
        if alert is None or alert.state not in ACTIVE:
            return False
        self._alerts[alert.key] = replace(alert, acknowledged=by)
        return True

    def silence(self, silence: Silence) -> Silence:
        """Add a silence, and return it with its number. Alerts that match still fire and resolve, without
        notifications. Past :data:`MAX_SILENCES` the oldest silence ends."""
        self._last_number += 1
        numbered = replace(silence, number=self._last_number)
        self._silences = [*self._silences, numbered][-MAX_SILENCES:]
        return numbered

    def unsilence(self, number: int) -> Silence | None:
        """End a silence; None if no silence has that number."""
        found = next((silence for silence in self._silences if silence.number == number), None)
        self._silences = [silence for silence in self._silences if silence is not found]
        return found

    def silenced_by(self, alert: Alert, now_s: float) -> Silence | None:
        """The longest of the silences that cover the alert now; None if none does."""
        found = [silence for silence in self._silences if silence.covers(alert, now_s)]
        return max(found, key=lambda silence: silence.until_s, default=None)

    def restore(self, alerts: Iterable[Alert], silences: Iterable[Silence]) -> None:
        """Restore the firing alerts and the silences from before a restart. Pending alerts, and the time for
        which a value had been clear, begin again, because nothing was observed in between."""
        for alert in alerts:
            if alert.state in ACTIVE and not self.full:
                self._alerts[alert.key] = replace(alert, state=AlertState.FIRING, cleared_since_s=None)
        self._silences = sorted([*self._silences, *silences], key=lambda silence: silence.number)
        self._last_number = max([self._last_number, *(silence.number for silence in self._silences)])

    def _step(self, seen: Observation, value: float, now_s: float) -> Alert | None:
        """The alert after this observation; None if there is none."""
        key = seen.rule.name, seen.subject
        alert = self._alerts.get(key)
        breached = seen.precondition_met and seen.rule.breached(value)
        if alert is None:
            if not breached or self.full:
                return None
            alert = Alert(seen.rule, seen.subject, AlertState.PENDING, value, now_s)
        alert = replace(
            alert,
            rule=seen.rule,
            value=value if breached else alert.value,
            current=value if seen.precondition_met else None,
            detail=(seen.detail if breached else "") or alert.detail,
        )
        if alert.state is AlertState.PENDING:
            if not breached:
                self._alerts.pop(key, None)
                return None
            if now_s - alert.since_s >= seen.rule.for_s:
                alert = replace(alert, state=AlertState.FIRING, since_s=now_s)
        elif seen.precondition_met and not seen.rule.cleared(value):
            alert = replace(alert, state=AlertState.FIRING, cleared_since_s=None)
        elif alert.cleared_since_s is None:
            alert = replace(alert, state=AlertState.RECOVERING, cleared_since_s=now_s)
        if alert.cleared_since_s is not None and now_s - alert.cleared_since_s >= seen.rule.for_s:
            self._alerts.pop(key, None)
            # The cause no longer applies once the alert has resolved.
            return replace(alert, state=AlertState.RESOLVED, since_s=now_s, detail="")
        self._alerts[key] = alert
        return alert

    def _due(self, alert: Alert, now_s: float) -> bool:
        """Whether a notification must be sent now."""
        if alert.state is AlertState.PENDING or any(s.covers(alert, now_s) for s in self._silences):
            return False
        if alert.state is AlertState.RESOLVED:
            # Don't notify about a resolution if the alert itself was never notified.
            return alert.notified_s is not None
        if alert.acknowledged or alert.cleared_since_s is not None:
            return False
        return alert.notified_s is None or now_s - alert.notified_s >= alert.rule.repeat_s
