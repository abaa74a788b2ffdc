"""Data types of alert rules, alerts and silences, and when a value breaches or clears a rule.

The rules themselves are in :mod:`controlplane.core.alerts.rules`, and the life cycle of an alert in
:class:`~controlplane.core.alerts.table.AlertTable`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Severity(StrEnum):
    """How urgent an alert is."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """A larger rank is more severe."""
        return list(Severity).index(self)


class AlertState(StrEnum):
    """The state of an alert in its life cycle."""

    PENDING = "pending"
    """The value is past the threshold, but not yet for long enough."""
    FIRING = "firing"
    RECOVERING = "recovering"
    """It fires, but its value is past ``clear`` again; after the rule's duration it is resolved."""
    RESOLVED = "resolved"


ALERT_TRANSITIONS: Final = MappingProxyType(
    {
        AlertState.PENDING: frozenset({AlertState.FIRING}),
        AlertState.FIRING: frozenset({AlertState.RECOVERING, AlertState.RESOLVED}),
        AlertState.RECOVERING: frozenset({AlertState.FIRING, AlertState.RESOLVED}),
        AlertState.RESOLVED: frozenset(),
    }
)
"""From each state, the states that an alert may enter next. A pending alert that clears is dropped."""
ACTIVE: Final = frozenset({AlertState.FIRING, AlertState.RECOVERING})
"""The states from firing until it is resolved."""


class SubjectType(StrEnum):
    """The type of a rule's subjects."""

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
    """The unit of a rule's value."""

    COUNT = "count"
    RATIO = "ratio"
    SECONDS = "s"
    CELSIUS = "C"
    TIMES = "x"
    """A multiple of what is allowed."""

    def text(self, value: float) -> str:
        """The value with its unit: ``10 %``, ``3 s``."""
        if self is Unit.RATIO:
            return f"{100 * value:.4g} %"
        suffix = {Unit.SECONDS: " s", Unit.CELSIUS: " °C", Unit.TIMES: " ×"}.get(self, "")
        return f"{value:.4g}{suffix}"


class EvaluatedBy(StrEnum):
    """Which programs can evaluate a rule."""

    BOTH = "both"
    PROGRAM = "program"
    """The controller only; Prometheus relays the controller's result."""
    PROMETHEUS = "prometheus"
    """Prometheus only, for example whether a gateway responds to a scrape."""


@dataclass(frozen=True, slots=True)
class Precondition:
    """A condition on another figure of the same subject; while it is not met, a rule does not fire."""

    figure: str
    threshold: float
    """The figure must be above this; with ``below``, below this."""
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether the condition is met at that value."""
        return value < self.threshold if self.below else value > self.threshold


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When an alert fires and when it resolves. ``tierplane alerts rules --json`` uses these field names."""

    name: str
    """The same in Prometheus."""
    severity: Severity
    threshold: float
    """A value above this is a breach; with ``below``, a value below this."""
    summary: str
    """With the placeholders ``{subject}``, ``{threshold}`` and ``{lasts}`` (``for_s`` as text)."""
    clear: float | None = None
    """The value must return to this for the alert to resolve; None means the threshold."""
    below: bool = False
    for_s: float = 60.0
    """How long a breach must last to fire, and how long the value must stay clear to resolve."""
    repeat_s: float = 14_400.0
    action: str = ""
    """What to do first."""
    figure: str = ""
    """The figure that the rule evaluates; see :mod:`controlplane.core.alerts.signals`."""
    kind: SubjectType = SubjectType.TIER
    unit: Unit = Unit.COUNT
    given: Precondition | None = None
    judge: EvaluatedBy = EvaluatedBy.BOTH
    fixed: bool = False
    """The threshold can't be configured, because it has only one meaningful value."""

    def breached(self, value: float) -> bool:
        """Whether the value is past the threshold."""
        return value < self.threshold if self.below else value > self.threshold

    def cleared(self, value: float) -> bool:
        """Whether the value is past ``clear``, on the good side."""
        limit = self.threshold if self.clear is None else self.clear
        return value >= limit if self.below else value <= limit

    def text(self, subject: str) -> str:
        """The summary for one subject."""
        return self.summary.format(
            subject=subject, threshold=self.unit.text(self.threshold), lasts=duration_text(self.for_s)
        )


def duration_text(seconds: float) -> str:
    """A duration as text: ``90 s``, ``5 min``."""
    return f"{seconds / 60:g} min" if seconds >= 60 and seconds % 60 == 0 else f"{seconds:g} s"


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule about one subject. Times are the caller's monotonic clock."""

    rule: AlertRule
    subject: str
    state: AlertState
    value: float
    """The last value past the threshold."""
    since_s: float
    """When it became pending; from firing on, when it fired; once resolved, when it was resolved."""
    cleared_since_s: float | None = None
    """Since when it has been recovering without interruption; it resolves ``for_s`` later. None in every
    other state."""
    current: float | None = None
    """The last value, which may be inside the limits; None if it does not apply any more."""
    notified_s: float | None = None
    """When the last notification was sent; None if none was sent."""
    acknowledged: str = ""
    """Who acknowledged it; no more notifications are sent until it resolves."""
    detail: str = ""
    """The cause, if it is known."""

    @property
    def key(self) -> tuple[str, str]:
        """Rule and subject: two alerts with the same key are the same alert."""
        return self.rule.name, self.subject

    @property
    def text(self) -> str:
        """Summary and detail."""
        summary = self.rule.text(self.subject)
        return f"{summary.removesuffix('.')}: {self.detail}" if self.detail else summary


@dataclass(frozen=True, slots=True)
class Silence:
    """Suppresses notifications for matching alerts until ``until_s``."""

    until_s: float
    rule: str = ""
    """Empty means every rule."""
    subject: str = ""
    """Empty means every subject."""
    reason: str = ""
    by: str = ""
    number: int = 0
    """Assigned by :class:`~controlplane.core.alerts.table.AlertTable`."""

    def covers(self, alert: Alert, now_s: float) -> bool:
        """Whether the silence applies to that alert now."""
        matches = self.rule in ("", alert.rule.name) and self.subject in ("", alert.subject)
        return matches and now_s < self.until_s
