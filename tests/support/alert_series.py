"""Test series for every alert rule in Prometheus: some with which it fires, and some with which it does
not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controlplane.core.alerts import rules as core
from controlplane.core.alerts.alert import EvaluatedBy, SubjectType
from controlplane.core.domain.request import RequestOutcome
from controlplane.monitoring import rules
from controlplane.monitoring.rules import JOB, PrometheusAlert


@dataclass(frozen=True, slots=True)
class PromtoolCase:
    """Series in promtool's notation, one sample a minute, and when the alert is evaluated."""

    series: Mapping[str, str]
    at: str = "30m"


@dataclass(frozen=True, slots=True)
class AlertCases:
    """Series with which an alert fires, and series with which it does not."""

    fires: PromtoolCase
    quiet: PromtoolCase
    labels: Mapping[str, str] = field(default_factory=dict)
    """The labels of the alert in ``fires``, besides name and severity."""


_G = 'gateway="g1", instance="a"'


def _requests(outcome: RequestOutcome, values: str, tier: str = "balanced") -> dict[str, str]:
    return {f'tierplane_requests_total{{{_G}, tier="{tier}", outcome="{outcome}", reason=""}}': values}


def _buckets(name: str, labels: str, *, slow: bool) -> dict[str, str]:
    """A histogram of one request a second, all of them within 1 s or all above 5 s."""
    fast = "0+0x60" if slow else "0+60x60"
    return {
        f'{name}_bucket{{{_G}, {labels}, le="1.0"}}': fast,
        f'{name}_bucket{{{_G}, {labels}, le="5.0"}}': fast,
        f'{name}_bucket{{{_G}, {labels}, le="10.0"}}': "0+60x60",
        f'{name}_bucket{{{_G}, {labels}, le="+Inf"}}': "0+60x60",
    }


def _endpoint(state: str, value: str = "1x60") -> dict[str, str]:
    return {f'tierplane_endpoints{{{_G}, tier="balanced", state="{state}"}}': value}


def _due(replicas: int) -> dict[str, str]:
    return {f'tierplane_due_replicas{{{_G}, tier="balanced"}}': f"{replicas}x60"}


def _exported(rule: str, subject: str, value: str = "1x60") -> dict[str, str]:
    """The series that gateways export of an alert that only the controller evaluates."""
    severity = core.BY_NAME[rule].severity
    labels = f'alert="{rule}", severity="{severity}", subject="{subject}"'
    return {f"tierplane_alerts{{{_G}, {labels}}}": value}


def _relayed(rule: str, subject: str) -> AlertCases:
    other = next(each.name for each in core.RULES if each.judge is EvaluatedBy.PROGRAM and each.name != rule)
    tier = {"tier": subject} if core.BY_NAME[rule].kind is SubjectType.TIER else {}
    return AlertCases(
        PromtoolCase(_exported(rule, subject)),
        PromtoolCase(_exported(other, subject)),
        {"subject": subject, **tier},
    )


_GPU = 'ip="10.0.0.1", GpuIndex="0", GpuDeviceName="L4"'
_TIER = {"tier": "balanced"}
_GPU_LABELS = {"ip": "10.0.0.1", "GpuIndex": "0"}


def _load(in_flight: str, rate: str = "0+600x60") -> dict[str, str]:
    return {
        f'tierplane_in_flight_requests{{{_G}, tier="balanced"}}': in_flight,
        f'tierplane_slots{{{_G}, tier="balanced"}}': "20x60",
        **_requests(RequestOutcome.OK, rate),
    }


def _retries(values: str) -> dict[str, str]:
    return {f'tierplane_retries_total{{{_G}, tier="balanced", reason="connect"}}': values}


def _slo(tier: str, target: str, missed: str) -> dict[str, str]:
    """A tier with one request a second."""
    return {
        f'tierplane_slo_target_ratio{{{_G}, tier="{tier}"}}': f"{target}x60",
        f'tierplane_slo_judged_requests_total{{{_G}, tier="{tier}"}}': "0+60x60",
        f'tierplane_slo_missed_requests_total{{{_G}, tier="{tier}"}}': missed,
    }


_ENOUGH = _requests(RequestOutcome.OK, "0+60x60")
"""Enough requests for a ratio to mean something."""

CASES: Final[Mapping[str, AlertCases]] = {
    "TierplaneTierDown": AlertCases(
        PromtoolCase(_due(1) | _endpoint("failed")),
        PromtoolCase(_due(1) | _endpoint("ready") | _endpoint("failed")),
        _TIER,
    ),
    "TierplaneReplicasMissing": AlertCases(
        PromtoolCase(_due(2) | _endpoint("ready") | _endpoint("failed")),
        PromtoolCase(_due(1) | _endpoint("ready")),
        _TIER,
    ),
    "TierplaneTierHeld": _relayed("TierplaneTierHeld", "balanced"),
    "TierplaneGatewayUnreachable": AlertCases(
        PromtoolCase({f'up{{job="{JOB}", instance="a"}}': "0x60"}),
        PromtoolCase({f'up{{job="{JOB}", instance="a"}}': "1x60"}),
        {"instance": "a", "job": JOB},
    ),
    "TierplaneGatewayMissing": AlertCases(
        PromtoolCase({'up{job="other"}': "1x60"}),
        PromtoolCase({f'up{{job="{JOB}", instance="a"}}': "1x60"}),
        {"job": JOB},
    ),
    "TierplaneRequestsFail": AlertCases(
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _requests(RequestOutcome.FAILED, "0+20x60")),
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _requests(RequestOutcome.FAILED, "0+1x60")),
        _TIER,
    ),
    # Of two tiers with the same misses, only the one with the stricter target fires.
    "TierplaneSloMissed": AlertCases(
        PromtoolCase(_slo("balanced", "0.99", "0+3x60") | _slo("capable", "0.9", "0+3x60") | _ENOUGH),
        PromtoolCase(_slo("balanced", "0.99", "0+0.3x60") | _slo("capable", "0.9", "0+5x60") | _ENOUGH),
        _TIER,
    ),
    "TierplaneFirstTokenSlow": AlertCases(
        PromtoolCase(
            _buckets("tierplane_time_to_first_token_seconds", 'tier="balanced"', slow=True) | _ENOUGH
        ),
        PromtoolCase(
            _buckets("tierplane_time_to_first_token_seconds", 'tier="balanced"', slow=False) | _ENOUGH
        ),
        _TIER,
    ),
    "TierplaneQueueLong": AlertCases(
        PromtoolCase({f'tierplane_queued_requests{{{_G}, priority="normal"}}': "80x60"}),
        PromtoolCase({f'tierplane_queued_requests{{{_G}, priority="normal"}}': "20x60"}),
    ),
    "TierplaneQueueWaitLong": AlertCases(
        PromtoolCase(_buckets("tierplane_queue_wait_seconds", 'priority="high"', slow=True)),
        PromtoolCase(_buckets("tierplane_queue_wait_seconds", 'priority="high"', slow=False)),
        {"priority": "high"},
    ),
    "TierplaneSheds": AlertCases(
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _requests(RequestOutcome.SHED, "0+10x60")),
        PromtoolCase(_requests(RequestOutcome.OK, "0+6000x60") | _requests(RequestOutcome.SHED, "0+10x60")),
        _TIER,
    ),
    "TierplaneRetriesMany": AlertCases(
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _retries("0+30x60")),
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _retries("0+3x60")),
        _TIER,
    ),
    "TierplaneStreamsLost": AlertCases(
        PromtoolCase({f'tierplane_resumes_total{{{_G}, method="refused"}}': "0x28 1x30"}),
        PromtoolCase({f'tierplane_resumes_total{{{_G}, method="continue"}}': "0x28 1x30"}),
    ),
    "TierplaneBreakerOpen": AlertCases(
        PromtoolCase({f'tierplane_breaker_open{{{_G}, tier="balanced", endpoint="balanced-1"}}': "1x60"}),
        PromtoolCase({f'tierplane_breaker_open{{{_G}, tier="balanced", endpoint="balanced-1"}}': "0.5x60"}),
        {"tier": "balanced", "endpoint": "balanced-1"},
    ),
    "TierplaneTierSaturated": AlertCases(PromtoolCase(_load("19x60")), PromtoolCase(_load("10x60")), _TIER),
    "TierplaneTierIdle": AlertCases(
        PromtoolCase(_load("0x60", "0+6x60")), PromtoolCase(_load("10x60", "0+6x60")), _TIER
    ),
    "TierplaneGpuBusy": AlertCases(
        PromtoolCase({f"ray_node_gpus_utilization{{{_GPU}}}": "99x60"}),
        PromtoolCase({f"ray_node_gpus_utilization{{{_GPU}}}": "60x60"}),
        _GPU_LABELS,
    ),
    "TierplaneGpuMemoryFull": AlertCases(
        PromtoolCase(
            {f"ray_node_gram_used{{{_GPU}}}": "23000x60", f"ray_node_gram_available{{{_GPU}}}": "100x60"}
        ),
        PromtoolCase(
            {f"ray_node_gram_used{{{_GPU}}}": "20000x60", f"ray_node_gram_available{{{_GPU}}}": "3000x60"}
        ),
        _GPU_LABELS,
    ),
    "TierplaneGpuHot": AlertCases(
        PromtoolCase({f"ray_node_gpu_temperature_celsius{{{_GPU}}}": "92x60"}),
        PromtoolCase({f"ray_node_gpu_temperature_celsius{{{_GPU}}}": "70x60"}),
        _GPU_LABELS,
    ),
    "TierplaneGpuOutOfUse": _relayed("TierplaneGpuOutOfUse", "GPU-1"),
    "TierplaneNodeLost": _relayed("TierplaneNodeLost", "node-1"),
    "TierplaneNodeSilent": _relayed("TierplaneNodeSilent", "node-1"),
    "TierplaneNodeMemoryLow": _relayed("TierplaneNodeMemoryLow", "node-a"),
    "TierplaneNodeDiskFull": _relayed("TierplaneNodeDiskFull", "node-a"),
    "TierplaneStoreUnsafe": _relayed("TierplaneStoreUnsafe", "plane"),
    "TierplaneStoreUnreadable": _relayed("TierplaneStoreUnreadable", "plane"),
}


def rule_tests(rule_file: str) -> dict[str, Any]:
    """A test file for ``promtool test rules``: every alert fires where it should, and is quiet elsewhere."""
    tests = []
    for alert in rules.ALERTS:
        cases = CASES[alert.name]
        for case, fires in ((cases.fires, True), (cases.quiet, False)):
            tests.append(
                {
                    "name": f"{alert.name} {'fires' if fires else 'is quiet'}",
                    "interval": "1m",
                    "input_series": [{"series": s, "values": v} for s, v in case.series.items()],
                    "alert_rule_test": [
                        {
                            "eval_time": case.at,
                            "alertname": alert.name,
                            "exp_alerts": [_expected(alert)] if fires else [],
                        }
                    ],
                }
            )
    return {"rule_files": [rule_file], "evaluation_interval": "1m", "tests": tests}


def _expected(alert: PrometheusAlert) -> dict[str, Any]:
    summary = alert.summary
    for label, value in CASES[alert.name].labels.items():
        summary = summary.replace(f"{{{{ $labels.{label} }}}}", value)
    return {
        "exp_labels": {"severity": alert.severity, **CASES[alert.name].labels},
        "exp_annotations": {"summary": summary, "action": alert.action},
    }
