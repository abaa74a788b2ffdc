"""The alerts that survive a restart of the controller, as JSON values by key.

Times are monotonic in memory and wall clock in the store; ``shift_s`` is wall clock less monotonic clock.
Pending alerts are not stored: nothing is evaluated while the controller is down, so they begin again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.core.alerts.alert import ACTIVE, Alert, AlertState, Silence
from controlplane.core.alerts.rules import BY_NAME
from controlplane.core.alerts.table import AlertTable
from controlplane.core.json_values import StoredState, Values, shifted, to_value

_ALERT, _SILENCE = "alert/", "silence/"


@dataclass(frozen=True, slots=True)
class _StoredAlert:
    """A firing alert; the field names are the keys in the store."""

    rule: str
    subject: str
    value: float
    since_s: float
    told_s: float | None
    """:attr:`Alert.notified_s`."""
    acknowledged: str = ""
    detail: str = ""


def to_values(table: AlertTable, shift_s: float) -> Values:
    """Firing alerts and silences, by key."""
    values: Values = {}
    for alert in table.alerts:
        if alert.state in ACTIVE:
            name, subject = alert.key
            stored = _StoredAlert(
                rule=name,
                subject=subject,
                value=alert.value,
                since_s=alert.since_s,
                told_s=alert.notified_s,
                acknowledged=alert.acknowledged,
                detail=alert.detail,
            )
            values[f"{_ALERT}{name}/{subject}"] = to_value(shifted(stored, shift_s, "since_s", "told_s"))
    for silence in table.silences:
        values[f"{_SILENCE}{silence.number}"] = to_value(shifted(silence, shift_s, "until_s"))
    return values


def restore(
    stored: StoredState, table: AlertTable, shift_s: float, now_s: float, max_silence_s: float
) -> None:
    """Restore what :func:`to_values` wrote. Alerts of rules that no longer exist are dropped. No silence
    lasts longer than ``max_silence_s``, even if a clock was wrong when it was stored."""
    alerts = [
        Alert(
            BY_NAME[item.rule],
            item.subject,
            AlertState.FIRING,
            item.value,
            min(item.since_s - shift_s, now_s),
            notified_s=None if item.told_s is None else min(item.told_s - shift_s, now_s),
            acknowledged=item.acknowledged,
            detail=item.detail,
        )
        for item in stored.entries(_ALERT, _StoredAlert).values()
        if item.rule in BY_NAME
    ]
    silences = stored.entries(_SILENCE, Silence).values()
    table.restore(
        sorted(alerts, key=lambda alert: alert.since_s),
        [
            replace(silence, until_s=min(silence.until_s - shift_s, now_s + max_silence_s))
            for silence in silences
        ],
    )
