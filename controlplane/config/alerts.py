"""Settings of alerts: where they are sent, and changes to the built-in rules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from controlplane.config.addresses import EnvName, WebhookUrl
from controlplane.config.strict import ConfigFinding, Strict
from controlplane.core.alerts.alert import EvaluatedBy, Severity, Unit
from controlplane.core.alerts.rules import BY_NAME, RuleChange, rule_named

SeverityName = Literal["info", "warning", "critical"]


class WebhookConfig(Strict):
    """An address that alerts are posted to as JSON; see ``controlplane/core/alerts/alerts.md``."""

    url: WebhookUrl
    """The address to post to. It may contain a secret: only its host appears in logs."""
    secret_env: EnvName | None = None
    """The environment variable, set on every node, that holds the secret for signing messages; without it
    messages are not signed."""
    min_severity: SeverityName = "warning"
    """Alerts of a lower severity are not sent to this webhook."""
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Time limit of one delivery attempt."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """A message is dropped after this many failed attempts; the pause between attempts grows up to one
    minute."""


class AlertRuleConfig(Strict):
    """Changes to one alert rule; the key is the name of the rule."""

    enabled: bool = True
    """``false`` switches the rule off."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The limit that the rule compares its value with, in the rule's unit."""
    for_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """How long the limit must be exceeded before the alert fires, and respected before it resolves."""
    severity: SeverityName | None = None
    """How urgent the alert is."""


class AlertsConfig(Strict):
    """Which alerts the controller raises, and where it sends them."""

    interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    """How often the rules are evaluated."""
    repeat_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 14_400.0
    """An alert that keeps firing is sent again after this long, unless it is acknowledged or silenced."""
    webhooks: Annotated[list[WebhookConfig], Field(max_length=20)] = Field(default_factory=list)
    """Where alerts are sent, besides the log."""
    rules: dict[str, AlertRuleConfig] = Field(default_factory=dict)
    """Changes to rules, by the rule's name: ``{TierplaneTierDown: {for_s: 30}}``. `tierplane alerts rules`
    lists the rules."""

    def findings(self) -> list[ConfigFinding]:
        """Webhooks that are named twice, and changes that their rule does not allow."""
        found = []
        seen: set[str] = set()
        for i, webhook in enumerate(self.webhooks):
            if webhook.url in seen:
                message = "an earlier webhook has the same address"
                found.append(ConfigFinding(("webhooks", i, "url"), message, "remove one of the two"))
            seen.add(webhook.url)
        for name, change in self.rules.items():
            found += _rule_findings(name, change)
        return found

    def changes(self) -> dict[str, RuleChange]:
        """The changes as the alert evaluator takes them."""
        return {
            name: RuleChange(
                enabled=each.enabled,
                threshold=each.threshold,
                for_s=each.for_s,
                severity=None if each.severity is None else Severity(each.severity),
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
        remedy = "remove it here, and change the rule in Prometheus' rule file"
        return [ConfigFinding(("rules", name), "only Prometheus evaluates this rule", remedy)]
    if change.threshold is None:
        return []
    where = ("rules", name, "threshold")
    if rule.fixed:
        return [ConfigFinding(where, "the threshold of this rule is fixed", "remove it")]
    if change.threshold <= 0 or (rule.unit is Unit.RATIO and change.threshold >= 1):
        bounds = "between 0 and 1" if rule.unit is Unit.RATIO else "above 0"
        message = f"with {change.threshold:g} the alert would fire always or never"
        return [ConfigFinding(where, message, f"choose a value {bounds}")]
    return []
