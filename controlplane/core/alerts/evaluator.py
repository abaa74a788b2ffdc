"""The alert rules of one plane at work: figures in, what began, ended and must be told out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from controlplane.core.alerts.book import AlertBook, AlertChanges, AlertRule, EvaluatedBy, Observation
from controlplane.core.alerts.rules import RULES, RuleChange, changed
from controlplane.core.alerts.signals import AlertSignals

GONE_AFTER_S: Final = 60.0
"""A subject that nobody names for so long is gone, and so are its alerts: after a restart some are named
late."""


class AlertEvaluator:
    """The book, and the rules that the configuration leaves."""

    def __init__(self, changes: Mapping[str, RuleChange] | None = None, repeat_s: float = 14_400.0) -> None:
        self.rules: tuple[AlertRule, ...] = ()
        self.book = AlertBook()
        self._absent_since_s: dict[tuple[str, str], float] = {}
        self.configure(changes or {}, repeat_s)

    def configure(self, changes: Mapping[str, RuleChange], repeat_s: float) -> None:
        """The rules as a configuration has them, from now on."""
        self.rules = tuple(
            replace(changed(rule, changes.get(rule.name, RuleChange())), repeat_s=repeat_s)
            for rule in RULES
            if rule.judge is not EvaluatedBy.PROMETHEUS and changes.get(rule.name, RuleChange()).enabled
        )

    def look(self, known: AlertSignals, now_s: float) -> AlertChanges:
        """One look at all figures."""
        seen = self.book.observe(self._observations(known), now_s)
        off = self.book.end(self._switched_off(), "the rule is switched off", now_s)
        gone = self.book.end(self._gone(known, now_s), "it is no longer there", now_s)
        return AlertChanges(
            seen.begun,
            (*seen.ended, *off.ended, *gone.ended),
            (*seen.told, *off.told, *gone.told),
        )

    def _observations(self, known: AlertSignals) -> Iterator[Observation]:
        for rule in self.rules:
            given = rule.given
            conditions = known.figures.get(given.figure, {}) if given is not None else {}
            for subject, signal in known.figures.get(rule.figure, {}).items():
                value = signal.fresh
                if value is None or not (rule.wrong(value) or self.book.knows(rule.name, subject)):
                    continue  # nearly all, where there are thousands of GPUs
                holds = True
                if given is not None:
                    condition = conditions.get(subject)
                    given_value = condition.fresh if condition is not None else None
                    if given_value is None:
                        continue  # not known, so not judged
                    holds = given.holds(given_value)
                detail = known.details.get((rule.figure, subject), "")
                yield Observation(rule, subject, signal, holds, detail)

    def _switched_off(self) -> list[tuple[str, str]]:
        names = {rule.name for rule in self.rules}
        return [alert.key for alert in self.book.alerts if alert.rule.name not in names]

    def _gone(self, known: AlertSignals, now_s: float) -> list[tuple[str, str]]:
        absent = {
            alert.key: self._absent_since_s.get(alert.key, now_s)
            for alert in self.book.alerts
            if alert.subject not in known.present.get(alert.rule.kind, (alert.subject,))
        }
        self._absent_since_s = absent
        return [key for key, since_s in absent.items() if now_s - since_s >= GONE_AFTER_S]
