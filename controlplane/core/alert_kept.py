"""What has to survive the controller of its alerts, as JSON values by key (as :mod:`controlplane.core.kept`).

Times are monotonic inside and wall-clock seconds in the values; ``shift_s`` is wall clock less monotonic.
What is pending is not kept: nobody looks while the controller is away, so it begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlplane.core.alert_rules import BY_NAME
from controlplane.core.alerts import Alert, AlertBook, AlertState, Silence

_ALERT, _SILENCE = "alert/", "silence/"


def to_values(book: AlertBook, shift_s: float) -> dict[str, Any]:
    """Alerts that fire and silences, by key."""
    values: dict[str, Any] = {}
    for alert in book.alerts:
        if alert.state is AlertState.FIRING:
            values[f"{_ALERT}{alert.rule.name}/{alert.subject}"] = {
                "rule": alert.rule.name,
                "subject": alert.subject,
                "value": alert.value,
                "since_s": alert.since_s + shift_s,
                "told_s": None if alert.told_s is None else alert.told_s + shift_s,
                "acknowledged": alert.acknowledged,
                "detail": alert.detail,
            }
    for silence in book.silences:
        values[f"{_SILENCE}{silence.number}"] = {
            "until_s": silence.until_s + shift_s,
            "rule": silence.rule,
            "subject": silence.subject,
            "reason": silence.reason,
            "by": silence.by,
            "number": silence.number,
        }
    return values


def restore(values: Mapping[str, Any], book: AlertBook, shift_s: float) -> None:
    """What :func:`to_values` said before. Alerts of rules that are no more are left out."""
    alerts = [
        Alert(
            rule=BY_NAME[value["rule"]],
            subject=value["subject"],
            state=AlertState.FIRING,
            value=value["value"],
            since_s=value["since_s"] - shift_s,
            told_s=None if value["told_s"] is None else value["told_s"] - shift_s,
            acknowledged=value["acknowledged"],
            detail=value["detail"],
        )
        for key, value in values.items()
        if key.startswith(_ALERT) and value["rule"] in BY_NAME
    ]
    silences = [
        Silence(**{**value, "until_s": value["until_s"] - shift_s})
        for key, value in values.items()
        if key.startswith(_SILENCE)
    ]
    book.restore(sorted(alerts, key=lambda alert: alert.since_s), silences)
