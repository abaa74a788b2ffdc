"""Alerts: when a figure is wrong for long enough, once, until it is right again for long enough.

:class:`AlertBook` is given each rule's signal for each subject at every tick and gives back what changed
and what must be told. The life of an alert is PENDING → FIRING → RESOLVED, as in Prometheus: it fires after
``for_s`` without a break and, unlike there, it resolves only past a threshold of its own (``clear``), so that
a figure at the border does not ring all night. An alert that fires is told once and again every
``repeat_s``, unless it is acknowledged, silenced or about to resolve. A signal that is missing or stale
neither fires nor resolves anything. The rules themselves are in :mod:`controlplane.core.alerts.rules`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from controlplane.core.telemetry.series import Signal

MAX_ALERTS: Final = 10_000
"""Alerts that one book remembers; past it no new one begins."""
MAX_SILENCES: Final = 1_000


class Severity(StrEnum):
    """How soon someone should look."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """Larger is worse."""
        return list(Severity).index(self)


class AlertState(StrEnum):
    """Where an alert is in its life."""

    PENDING = "pending"
    FIRING = "firing"
    RESOLVED = "resolved"


class SubjectType(StrEnum):
    """What a rule's subjects are."""

    TIER = "tier"
    GPU = "GPU"
    NODE = "node"
    ENDPOINT = "endpoint"
    GATEWAY = "gateway"
    PRIORITY = "priority"
    PLANE = "plane"
    """The plane as a whole; its only subject is :data:`PLANE`."""


PLANE: Final = "plane"


class Unit(StrEnum):
    """What a rule's figure is measured in."""

    COUNT = "count"
    RATIO = "ratio"
    SECONDS = "s"
    CELSIUS = "C"
    TIMES = "x"
    """As many times as is allowed."""

    def text(self, value: float) -> str:
        """A value for people: ``10 %``, ``3 s``."""
        if self is Unit.RATIO:
            return f"{100 * value:.4g} %"
        suffix = {Unit.SECONDS: " s", Unit.CELSIUS: " °C", Unit.TIMES: " ×"}.get(self, "")
        return f"{value:.4g}{suffix}"


class EvaluatedBy(StrEnum):
    """Who can tell whether a rule's figure is wrong."""

    BOTH = "both"
    PROGRAM = "program"
    """Only the controller knows the figure; Prometheus relays what the controller says."""
    PROMETHEUS = "prometheus"
    """Only Prometheus sees it, such as a gateway that does not answer it."""


@dataclass(frozen=True, slots=True)
class Precondition:
    """What must hold of another figure of the same subject for a rule to count."""

    figure: str
    threshold: float
    """Over it the rule counts; with ``below``, under it."""
    below: bool = False

    def holds(self, value: float) -> bool:
        """Does that value let the rule count?"""
        return value < self.threshold if self.below else value > self.threshold


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When a figure is wrong."""

    name: str
    """As Prometheus knows it, too."""
    severity: Severity
    threshold: float
    """Over it is wrong; with ``below``, under it."""
    summary: str
    """Of what is wrong, with ``{subject}``, ``{threshold}`` and ``{lasts}`` (``for_s`` for people)."""
    clear: float | None = None
    """Where it is right again; None: at the threshold."""
    below: bool = False
    for_s: float = 60.0
    """How long it must be wrong, and how long right again."""
    repeat_s: float = 14_400.0
    action: str = ""
    """What to do first."""
    figure: str = ""
    """What it judges; see :mod:`controlplane.core.alerts.signals`."""
    kind: SubjectType = SubjectType.TIER
    unit: Unit = Unit.COUNT
    given: Precondition | None = None
    judge: EvaluatedBy = EvaluatedBy.BOTH
    fixed: bool = False
    """It asks for yes or no: another threshold would mean nothing."""

    def wrong(self, value: float) -> bool:
        """Is that value past the threshold?"""
        return value < self.threshold if self.below else value > self.threshold

    def right(self, value: float) -> bool:
        """Is it back for good?"""
        limit = self.threshold if self.clear is None else self.clear
        return value >= limit if self.below else value <= limit

    def text(self, subject: str) -> str:
        """The summary about a subject."""
        return self.summary.format(
            subject=subject, threshold=self.unit.text(self.threshold), lasts=lasts_text(self.for_s)
        )


def lasts_text(seconds: float) -> str:
    """A rule's duration for people: ``90 s``, ``5 min``."""
    return f"{seconds / 60:g} min" if seconds >= 60 and seconds % 60 == 0 else f"{seconds:g} s"


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
    """When it was told last; of an alert that has to be told now: the time before."""
    acknowledged: str = ""
    """By whom; it is not told again while it lasts."""
    detail: str = ""
    """What is known of the cause."""

    @property
    def key(self) -> tuple[str, str]:
        """What makes two alerts the same."""
        return self.rule.name, self.subject

    @property
    def text(self) -> str:
        """For people."""
        summary = self.rule.text(self.subject)
        return f"{summary.removesuffix('.')}: {self.detail}" if self.detail else summary


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing is told of what matches, until then."""

    until_s: float
    rule: str = ""
    """Empty: every rule."""
    subject: str = ""
    """Empty: every subject."""
    reason: str = ""
    by: str = ""
    number: int = 0
    """Given by the book."""

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
    given: bool = True
    """False: the rule does not count for the subject now, whatever the value."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class AlertChanges:
    """What one look brought."""

    begun: tuple[Alert, ...] = ()
    ended: tuple[Alert, ...] = ()
    told: tuple[Alert, ...] = ()
    """What must be told now: begun, repeated (``told_s`` is set) or resolved."""


class AlertBook:
    """All alerts that are pending or firing."""

    def __init__(self, limit: int = MAX_ALERTS) -> None:
        self._alerts: dict[tuple[str, str], Alert] = {}
        self._silences: list[Silence] = []
        self._numbered = 0
        self._limit = limit

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """In the order in which they began."""
        return tuple(self._alerts.values())

    def knows(self, rule: str, subject: str) -> bool:
        """Whether there is such an alert, pending or firing."""
        return (rule, subject) in self._alerts

    @property
    def full(self) -> bool:
        """No new alert can begin until one is over."""
        return len(self._alerts) >= self._limit

    @property
    def silences(self) -> tuple[Silence, ...]:
        """Those that were given and have not been found to be over."""
        return tuple(self._silences)

    def observe(self, observations: Iterable[Observation], now_s: float) -> AlertChanges:
        """One tick; what began or ended by it, and what must be told."""
        self._silences = [silence for silence in self._silences if now_s < silence.until_s]
        begun: list[Alert] = []
        ended: list[Alert] = []
        told: list[Alert] = []
        for seen in observations:
            value = seen.signal.fresh
            if value is None:
                continue
            alert = self._step(seen, value, now_s)
            if alert is None or alert.state is AlertState.PENDING:
                continue
            if alert.state is AlertState.RESOLVED:
                ended.append(alert)
            elif alert.since_s == now_s:
                begun.append(alert)
            if self._tells(alert, now_s):
                told.append(alert)
                if alert.state is AlertState.FIRING:
                    self._alerts[alert.key] = replace(alert, told_s=now_s)
        return AlertChanges(tuple(begun), tuple(ended), tuple(told))

    def end(self, keys: Collection[tuple[str, str]], why: str, now_s: float) -> AlertChanges:
        """These are over without having become right: their subject or their rule is gone."""
        ended = []
        for key in keys:
            alert = self._alerts.pop(key, None)
            if alert is not None and alert.state is AlertState.FIRING:
                ended.append(replace(alert, state=AlertState.RESOLVED, since_s=now_s, detail=why))
        return AlertChanges((), tuple(ended), tuple(alert for alert in ended if self._tells(alert, now_s)))

    def acknowledge(self, rule: str, subject: str, by: str) -> bool:
        """Someone looks after it. True if there is such an alert that fires."""
        alert = self._alerts.get((rule, subject))
        if alert is None or alert.state is not AlertState.FIRING:
            return False
        self._alerts[alert.key] = replace(alert, acknowledged=by)
        return True

    def silence(self, silence: Silence) -> Silence:
        """Nothing is told of what matches until then; the alerts go on. Answers with it numbered; past
        :data:`MAX_SILENCES` the oldest ends."""
        self._numbered += 1
        numbered = replace(silence, number=self._numbered)
        self._silences = [*self._silences, numbered][-MAX_SILENCES:]
        return numbered

    def unsilence(self, number: int) -> Silence | None:
        """End a silence; None if there is none of that number."""
        found = next((silence for silence in self._silences if silence.number == number), None)
        self._silences = [silence for silence in self._silences if silence is not found]
        return found

    def silenced_by(self, alert: Alert, now_s: float) -> Silence | None:
        """The silence that holds for an alert longest; None if there is none."""
        found = [silence for silence in self._silences if silence.covers(alert, now_s)]
        return max(found, key=lambda silence: silence.until_s, default=None)

    def restore(self, alerts: Iterable[Alert], silences: Iterable[Silence]) -> None:
        """What fired and was silenced before a restart. What was pending or about to resolve begins anew:
        nobody looked in between."""
        for alert in alerts:
            if alert.state is AlertState.FIRING and not self.full:
                self._alerts[alert.key] = replace(alert, right_since_s=None)
        self._silences = sorted([*self._silences, *silences], key=lambda silence: silence.number)
        self._numbered = max([self._numbered, *(silence.number for silence in self._silences)])

    def _step(self, seen: Observation, value: float, now_s: float) -> Alert | None:
        """The alert after this reading; None: there is none."""
        key = seen.rule.name, seen.subject
        alert = self._alerts.get(key)
        wrong = seen.given and seen.rule.wrong(value)
        if alert is None:
            if not wrong or self.full:
                return None
            alert = Alert(seen.rule, seen.subject, AlertState.PENDING, value, now_s)
        alert = replace(alert, rule=seen.rule, value=value, detail=seen.detail or alert.detail)
        if alert.state is AlertState.PENDING:
            if not wrong:
                self._alerts.pop(key, None)
                return None
            if now_s - alert.since_s >= seen.rule.for_s:
                alert = replace(alert, state=AlertState.FIRING, since_s=now_s)
        elif seen.given and not seen.rule.right(value):
            alert = replace(alert, right_since_s=None)
        elif alert.right_since_s is None:
            alert = replace(alert, right_since_s=now_s)
        if alert.right_since_s is not None and now_s - alert.right_since_s >= seen.rule.for_s:
            self._alerts.pop(key, None)
            # what was known of the cause is no longer so
            return replace(alert, state=AlertState.RESOLVED, since_s=now_s, detail="")
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
