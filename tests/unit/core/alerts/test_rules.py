"""The alert rules, which the controller and Prometheus share."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from controlplane.core.alerts import rules as core
from controlplane.core.alerts.alert import AlertRule, EvaluatedBy, Severity, SubjectType, Unit, duration_text
from controlplane.core.alerts.rules import BY_NAME, RULES, RuleChange, changed, rule_named
from controlplane.core.traffic.counters import TierFigures
from controlplane.monitoring import rules as prometheus
from tests.support import alert_series

PROM = {alert.name: alert for alert in prometheus.ALERTS}
OURS = {value for name, value in vars(core).items() if name.isupper() and isinstance(value, str)}
SUPPLIED = OURS | {f"tier/{field.name}" for field in fields(TierFigures)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_prometheus_has_the_same_rule(rule: AlertRule) -> None:
    alert = PROM[rule.name]
    assert (alert.severity, alert.action) == (rule.severity.value, rule.action)
    assert alert.summary.split("{{")[0] in rule.text("{{")
    if rule.judge is EvaluatedBy.PROGRAM:
        assert f'alert="{rule.name}"' in alert.expr
        assert alert.lasts == "0s", "the controller has already waited"
        assert rule.figure not in prometheus.FIGURES
        return
    sign = "<" if rule.below else ">"
    assert alert.expr.startswith(f"{prometheus.FIGURES[rule.figure]} {sign} {rule.threshold:g}")
    unit = {"s": 1, "m": 60}[alert.lasts[-1]]
    assert int(alert.lasts[:-1]) * unit == rule.for_s


def test_controller_and_prometheus_have_the_same_rules() -> None:
    assert set(PROM) == set(alert_series.CASES) == set(BY_NAME)
    assert len(BY_NAME) == len(RULES)
    used = {rule.figure for rule in RULES if rule.judge is not EvaluatedBy.PROGRAM}
    used |= {rule.given.figure for rule in RULES if rule.given is not None}
    assert set(prometheus.FIGURES) == used


@pytest.mark.parametrize(
    "rule", [r for r in RULES if r.judge is not EvaluatedBy.PROMETHEUS], ids=lambda rule: rule.name
)
def test_the_controllers_figures_are_supplied(rule: AlertRule) -> None:
    assert rule.figure in SUPPLIED
    assert rule.given is None or rule.given.figure in SUPPLIED


def test_thresholds_are_not_repeated_in_the_monitoring_package() -> None:
    """In the monitoring package numbers belong to recordings, layouts and test series only."""
    thresholds = {rule.threshold for rule in RULES if not rule.fixed} - {1, 3}
    for path in Path(prometheus.__file__).parent.glob("*.py"):
        numbers = {
            node.value
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        }
        assert not (numbers - {0.95, 0.5}) & (thresholds - {0.95}), path.name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_is_complete(rule: AlertRule) -> None:
    text = rule.text("SUBJECT")
    assert "{" not in text
    assert text.endswith(".")
    assert rule.action
    assert ("SUBJECT" in text) == (rule.kind is not SubjectType.PLANE)
    if rule.clear is not None:
        assert rule.cleared(rule.clear)
        assert not rule.breached(rule.clear)
    assert not rule.breached(rule.threshold), "the threshold itself is no breach"


def test_texts_show_the_configured_threshold_and_duration() -> None:
    rule = changed(BY_NAME["TierplaneRequestsFail"], RuleChange(threshold=0.25))
    assert rule.text("small") == "More than 25 % of tier small's requests fail."
    assert rule.clear == pytest.approx(0.125)
    slow = changed(BY_NAME["TierplaneTierSaturated"], RuleChange(for_s=90.0, severity=Severity.CRITICAL))
    assert slow.text("small").endswith("in use for 90 s.")
    assert slow.severity is Severity.CRITICAL
    assert (duration_text(600), duration_text(0.5)) == ("10 min", "0.5 s")
    assert (Unit.SECONDS.text(3.0), Unit.CELSIUS.text(87), Unit.COUNT.text(51.0)) == ("3 s", "87 °C", "51")
    burn = changed(BY_NAME["TierplaneSloMissed"], RuleChange(threshold=2.5))
    assert (
        burn.text("small") == "Tier small misses its SLO more than 2.5 × as often as slo.attainment allows."
    )
    assert burn.clear == pytest.approx(1.5)


def test_a_ratio_that_must_stay_above_its_threshold_can_always_clear() -> None:
    rule = BY_NAME["TierplaneTierIdle"]
    for threshold in (0.05, 0.5, 0.95, 0.999):
        clear = changed(rule, RuleChange(threshold=threshold)).clear
        assert clear is not None
        assert threshold < clear < 1


def test_rules_are_found_by_their_short_name() -> None:
    assert rule_named("TierDown") is rule_named("tierplanetierdown") is BY_NAME["TierplaneTierDown"]
    assert rule_named("Nonsense") is None
    assert rule_named("") is None


def test_severities_have_an_order() -> None:
    assert Severity.INFO.rank < Severity.WARNING.rank < Severity.CRITICAL.rank
