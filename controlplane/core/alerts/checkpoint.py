"""What has to survive the controller of its alerts, as JSON values by key (as
:mod:`controlplane.controller.checkpoint`).

Times are monotonic inside and wall-clock seconds in the values; ``shift_s`` is wall clock less monotonic.
What is pending is not kept: nobody looks while the controller is away, so it begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controlplane.core.alerts.alert import Alert, AlertState, Silence
from controlplane.core.alerts.rules import BY_NAME
from controlplane.core.alerts.table import AlertTable
from controlplane.core.json_values import Values, from_value, shifted, to_value, under

_ALERT, _SILENCE = "alert/", "silence/"


@dataclass(frozen=True, slots=True)
class _Firing:
    """An alert as it is kept."""

    rule: str
    subject: str
    value: float
    since_s: float
    told_s: float | None
    acknowledged: str = ""
    detail: str = ""


def to_values(table: AlertTable, shift_s: float) -> Values:
    """Alerts that fire and silences, by key."""
    values: Values = {}
    for alert in table.alerts:
        if alert.state is AlertState.FIRING:
            name, subject = alert.key
            times = alert.since_s, alert.notified_s
            firing = _Firing(name, subject, alert.value, *times, alert.acknowledged, alert.detail)
            values[f"{_ALERT}{name}/{subject}"] = shifted(to_value(firing), shift_s, "since_s", "told_s")
    for silence in table.silences:
        values[f"{_SILENCE}{silence.number}"] = shifted(to_value(silence), shift_s, "until_s")
    return values


def restore(values: Mapping[str, Any], table: AlertTable, shift_s: float) -> None:
    """What :func:`to_values` said before. Alerts of rules that are no more are left out."""
    firing = [
        from_value(_Firing, shifted(value, -shift_s, "since_s", "told_s"))
        for value in under(values, _ALERT).values()
    ]
    alerts = [
        Alert(
            BY_NAME[item.rule],
            item.subject,
            AlertState.FIRING,
            item.value,
            item.since_s,
            notified_s=item.told_s,
            acknowledged=item.acknowledged,
            detail=item.detail,
        )
        for item in firing
        if item.rule in BY_NAME
    ]
    silences = [
        from_value(Silence, shifted(value, -shift_s, "until_s")) for value in under(values, _SILENCE).values()
    ]
    table.restore(sorted(alerts, key=lambda alert: alert.since_s), silences)
