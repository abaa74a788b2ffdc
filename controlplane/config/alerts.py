"""Alerts: where they go, and what of their rules is to be otherwise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from controlplane.config.strict import ConfigFinding, Strict
from controlplane.core.alerts.alert import EvaluatedBy, Severity, Unit
from controlplane.core.alerts.rules import BY_NAME, RuleChange, rule_named

SeverityName = Literal["info", "warning", "critical"]


class WebhookConfig(Strict):
    """An address that alerts are posted to as JSON; see ``controlplane/core/alerts/alerts.md``."""

    url: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")]
    """Where to; it may hold a secret of its own, and only its host is logged."""
    secret_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """The environment variable, on every node, that holds the secret which messages are signed with; without
    it they are not signed."""
    min_severity: SeverityName = "warning"
    """Alerts of less are not sent there."""
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """How long one attempt may take."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """A message that was not taken so often is given up; the pauses between attempts grow to a minute."""


class AlertRuleConfig(Strict):
    """What of a rule is to be otherwise; its name is the key."""

    enabled: bool = True
    """``false``: it is not judged."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Where its figure becomes wrong."""
    for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """How long it must be wrong to fire, and right to be over."""
    severity: SeverityName | None = None
    """How soon someone should look."""


class AlertsConfig(Strict):
    """What the controller rings for."""

    interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """How often the rules are judged."""
    repeat_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 14_400.0
    """An alert that lasts is told again after so long, unless it is acknowledged or silenced."""
    webhooks: Annotated[list[WebhookConfig], Field(max_length=20)] = Field(default_factory=list)
    """Where alerts are sent, besides the log."""
    rules: dict[str, AlertRuleConfig] = Field(default_factory=dict)
    """Rule → what of it is to be otherwise: ``{TierplaneTierDown: {for_s: 30}}``. `tierplane alerts rules`
    lists them."""

    def findings(self) -> list[ConfigFinding]:
        """What doesn't fit."""
        found = []
        seen: set[str] = set()
        for i, webhook in enumerate(self.webhooks):
            if webhook.url in seen:
                message = "an earlier webhook has this address too"
                found.append(ConfigFinding(("webhooks", i, "url"), message, "name it once"))
            seen.add(webhook.url)
        for name, change in self.rules.items():
            found += _rule_findings(name, change)
        return found

    def changes(self) -> dict[str, RuleChange]:
        """As the core has them."""
        return {
            name: RuleChange(
                each.enabled,
                each.threshold,
                each.for_s,
                None if each.severity is None else Severity(each.severity),
            )
            for name, each in self.rules.items()
        }


def _rule_findings(name: str, change: AlertRuleConfig) -> list[ConfigFinding]:
    rule = BY_NAME.get(name)
    if rule is None:
        near = rule_named(name)
        known = ", ".join(rule.name for rule in BY_NAME.values() if rule.judge is not EvaluatedBy.PROMETHEUS)
        remedy = f"did you mean '{near.name}'?" if near is not None else f"known: {known}"
        return [ConfigFinding(("rules", name), f"there is no alert rule '{name}'", remedy)]
    if rule.judge is EvaluatedBy.PROMETHEUS:
        remedy = "remove it; change it in Prometheus' rule file"
        return [ConfigFinding(("rules", name), "only Prometheus judges this rule", remedy)]
    if change.threshold is None:
        return []
    where = ("rules", name, "threshold")
    if rule.fixed:
        return [ConfigFinding(where, "this rule is a matter of yes or no", "remove it")]
    if change.threshold <= 0 or (rule.unit is Unit.RATIO and change.threshold >= 1):
        bounds = "between 0 and 1" if rule.unit is Unit.RATIO else "over 0"
        return [
            ConfigFinding(where, f"{change.threshold:g} would always or never ring", f"name one {bounds}")
        ]
    return []
