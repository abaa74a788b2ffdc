"""Evaluates the alert rules of one plane: takes signals, and returns which alerts fired, resolved or are due
for a notification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from controlplane.core.alerts.alert import AlertRule, EvaluatedBy
from controlplane.core.alerts.rules import RULES, RuleChange, changed
from controlplane.core.alerts.signals import AlertSignals
from controlplane.core.alerts.table import AlertChanges, AlertTable, Observation
from controlplane.core.telemetry.series import known_now

GONE_AFTER_S: Final = 60.0
"""Alerts of a subject that has been absent for this long resolve. Not shorter, because after a restart some
subjects appear late."""


class AlertEvaluator:
    """The configured rules and the table of alerts."""

    def __init__(self, changes: Mapping[str, RuleChange], repeat_s: float) -> None:
        self.rules: tuple[AlertRule, ...] = ()
        self.table = AlertTable()
        self._absent_since_s: dict[tuple[str, str], float] = {}
        self.configure(changes, repeat_s)

    def configure(self, changes: Mapping[str, RuleChange], repeat_s: float) -> None:
        """Apply a configuration's changes, by rule name."""
        self.rules = tuple(
            replace(changed(rule, changes.get(rule.name, RuleChange())), repeat_s=repeat_s)
            for rule in RULES
            if rule.judge is not EvaluatedBy.PROMETHEUS and changes.get(rule.name, RuleChange()).enabled
        )

    def evaluate(self, signals: AlertSignals, now_s: float) -> AlertChanges:
        """Evaluate all rules once."""
        seen = self.table.observe(self._observations(signals), now_s)
        off = self.table.end(self._switched_off(), "the rule is switched off", now_s)
        gone = self.table.end(self._gone(signals, now_s), "it is no longer there", now_s)
        return AlertChanges(
            seen.fired, (*seen.resolved, *off.resolved, *gone.resolved), (*seen.due, *off.due, *gone.due)
        )

    def _observations(self, signals: AlertSignals) -> Iterator[Observation]:
        for rule in self.rules:
            condition = rule.given
            others = signals.figures.get(condition.figure, {}) if condition is not None else {}
            for subject, signal in signals.figures.get(rule.figure, {}).items():
                value = signal.fresh
                known = self.table.contains(rule.name, subject)
                # Skips nearly all subjects, which matters with thousands of GPUs.
                if not known and (value is None or not rule.breached(value)):
                    continue
                met = True
                if condition is not None:
                    other = others.get(subject)
                    other_value = other.fresh if other is not None else None
                    if other_value is None:
                        continue
                    met = condition.holds(other_value)
                if value is None and met:
                    continue
                # Without a value the rule no longer applies, such as a ratio of requests once none come.
                judged = signal if value is not None else known_now(rule.threshold)
                detail = signals.details.get((rule.figure, subject), "")
                yield Observation(rule, subject, judged, met, detail)

    def _switched_off(self) -> list[tuple[str, str]]:
        names = {rule.name for rule in self.rules}
        return [alert.key for alert in self.table.alerts if alert.rule.name not in names]

    def _gone(self, signals: AlertSignals, now_s: float) -> list[tuple[str, str]]:
        absent = {
            alert.key: self._absent_since_s.get(alert.key, now_s)
            for alert in self.table.alerts
            if alert.subject not in signals.present.get(alert.rule.kind, (alert.subject,))
        }
        self._absent_since_s = absent
        return [key for key, since_s in absent.items() if now_s - since_s >= GONE_AFTER_S]
