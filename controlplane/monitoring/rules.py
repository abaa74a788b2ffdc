"""Recording rules and alerts for Prometheus. What an alert is about, when it rings and what to do then is
in :mod:`controlplane.core.alerts.rules`; here are the figures in PromQL, and for each alert the series that
make it fire, and those that don't, as a test of its own: a rule can't be added without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from controlplane.core.alerts import rules as core
from controlplane.core.alerts.alert import AlertRule, EvaluatedBy, SubjectType
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.domain.request import RequestOutcome
from controlplane.monitoring import queries as q

JOB: Final = "tierplane-gateway"
"""The scrape job of the gateways."""


@dataclass(frozen=True, slots=True)
class RecordingRule:
    """A series that is worked out once for dashboards and alerts."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class PromtoolCase:
    """Series in promtool's notation, one sample a minute, and when to look."""

    series: Mapping[str, str]
    at: str = "30m"


@dataclass(frozen=True, slots=True)
class AlertProof:
    """When an alert fires and when it does not."""

    fires: PromtoolCase
    quiet: PromtoolCase
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the alert in ``fires`` is labelled with, besides its name and severity."""


@dataclass(frozen=True, slots=True)
class PrometheusAlert:
    """One alert as Prometheus has it, with its proof."""

    name: str
    severity: str
    expr: str
    lasts: str
    summary: str
    action: str
    proof: AlertProof


_FAILED = q.rate("tierplane_requests_total", ["tier"], outcome=RequestOutcome.FAILED)
_SHED = q.rate("tierplane_requests_total", ["tier"], outcome=RequestOutcome.SHED)
_ENDED = q.rate("tierplane_requests_total", ["tier"])
_MISSED = q.rate("tierplane_slo_missed_requests_total", ["tier"])
_JUDGED = q.rate("tierplane_slo_judged_requests_total", ["tier"])
_READY = EndpointState.READY.value

RECORDINGS: Final = (
    RecordingRule("tier:tierplane_requests:rate5m", _ENDED),
    RecordingRule("tier:tierplane_failed:ratio5m", f"({_FAILED} or 0 * {_ENDED}) / ({_ENDED} > 0)"),
    RecordingRule(
        "tier:tierplane_time_to_first_token_seconds:p95_5m",
        q.quantile(0.95, "tierplane_time_to_first_token_seconds", ["tier"]),
    ),
    RecordingRule(
        "tier:tierplane_request_seconds:p95_5m", q.quantile(0.95, "tierplane_request_seconds", ["tier"])
    ),
    RecordingRule(
        "tier:tierplane_inter_token_seconds:p95_5m",
        q.quantile(0.95, "tierplane_inter_token_seconds", ["tier"]),
    ),
    RecordingRule(
        "tier:tierplane_saturation:ratio",
        f"{q.total('tierplane_in_flight_requests', ['tier'])} / ({q.total('tierplane_slots', ['tier'])} > 0)",
    ),
    RecordingRule("tier:tierplane_slo_missed:ratio5m", f"{_MISSED} / ({_JUDGED} > 0)"),
    RecordingRule(
        "tier:tierplane_slo_burn:ratio5m",
        f"tier:tierplane_slo_missed:ratio5m / (1 - {q.seen('tierplane_slo_target_ratio', ['tier'])})",
    ),
    RecordingRule(
        "priority:tierplane_queued_requests:sum", q.total("tierplane_queued_requests", ["priority"])
    ),
)

_SUBJECT: Final[Mapping[SubjectType, str]] = {
    SubjectType.TIER: "{{ $labels.tier }}",
    SubjectType.GPU: "{{ $labels.GpuIndex }} of {{ $labels.ip }}",
    SubjectType.ENDPOINT: "{{ $labels.endpoint }}",
    SubjectType.GATEWAY: "{{ $labels.instance }}",
    SubjectType.PRIORITY: "{{ $labels.priority }}",
}
"""What Prometheus calls a subject; the controller has the ids that operators use."""
_ON: Final[Mapping[SubjectType, str]] = {SubjectType.TIER: "tier"}

_DUE = q.seen("tierplane_due_replicas", ["tier"])
_SHOWN_READY = f"({q.seen('tierplane_endpoints', ['tier'], state=_READY)} or 0 * {_DUE})"

FIGURES: Final[Mapping[str, str]] = {
    core.TIER_DUE: _DUE,
    core.TIER_READY: _SHOWN_READY,
    core.TIER_MISSING: f"{_DUE} - {_SHOWN_READY}",
    core.TIER_SATURATION: "tier:tierplane_saturation:ratio",
    core.TIER_SLO_BURN: "tier:tierplane_slo_burn:ratio5m",
    "tier/failed_ratio": "tier:tierplane_failed:ratio5m",
    "tier/ttft_p95_s": "tier:tierplane_time_to_first_token_seconds:p95_5m",
    "tier/shed_ratio": f"{_SHED} / ({_ENDED} > 0)",
    "tier/retried_ratio": f"{q.rate('tierplane_retries_total', ['tier'])} / ({_ENDED} > 0)",
    "tier/requests_per_s": "tier:tierplane_requests:rate5m",
    core.QUEUE_WAITING: "sum(priority:tierplane_queued_requests:sum)",
    "queue/wait_p95_s": q.quantile(0.95, "tierplane_queue_wait_seconds", ["priority"]),
    "stream/refused_per_s": q.rate("tierplane_resumes_total", method="refused"),
    "endpoint/breaker": q.seen("tierplane_breaker_open", ["tier", "endpoint"]),
    "gateway/up": f'up{{job="{JOB}"}}',
    "gateway/absent": f'absent(up{{job="{JOB}"}})',
    core.GPU_BUSY: f"{q.gpu('ray_node_gpus_utilization')} / 100",
    core.GPU_MEMORY: q.gpu_memory_ratio(),
    core.GPU_TEMPERATURE: q.gpu("ray_node_gpu_temperature_celsius"),
}
"""Figure → PromQL, with a label for the subject."""

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


def _shown(rule: str, subject: str, value: str = "1x60") -> dict[str, str]:
    """What a gateway shows of an alert that only the controller judges."""
    severity = core.BY_NAME[rule].severity
    labels = f'alert="{rule}", severity="{severity}", subject="{subject}"'
    return {f"tierplane_alerts{{{_G}, {labels}}}": value}


def _relayed(rule: str, subject: str) -> AlertProof:
    other = next(each.name for each in core.RULES if each.judge is EvaluatedBy.PROGRAM and each.name != rule)
    tier = {"tier": subject} if core.BY_NAME[rule].kind is SubjectType.TIER else {}
    return AlertProof(
        PromtoolCase(_shown(rule, subject)),
        PromtoolCase(_shown(other, subject)),
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
    """A tier that is asked once a second."""
    return {
        f'tierplane_slo_target_ratio{{{_G}, tier="{tier}"}}': f"{target}x60",
        f'tierplane_slo_judged_requests_total{{{_G}, tier="{tier}"}}': "0+60x60",
        f'tierplane_slo_missed_requests_total{{{_G}, tier="{tier}"}}': missed,
    }


PROOFS: Final[Mapping[str, AlertProof]] = {
    "TierplaneTierDown": AlertProof(
        PromtoolCase(_due(1) | _endpoint("failed")),
        PromtoolCase(_due(1) | _endpoint("ready") | _endpoint("failed")),
        _TIER,
    ),
    "TierplaneReplicasMissing": AlertProof(
        PromtoolCase(_due(2) | _endpoint("ready") | _endpoint("failed")),
        PromtoolCase(_due(1) | _endpoint("ready")),
        _TIER,
    ),
    "TierplaneTierHeld": _relayed("TierplaneTierHeld", "balanced"),
    "TierplaneGatewayUnreachable": AlertProof(
        PromtoolCase({f'up{{job="{JOB}", instance="a"}}': "0x60"}),
        PromtoolCase({f'up{{job="{JOB}", instance="a"}}': "1x60"}),
        {"instance": "a", "job": JOB},
    ),
    "TierplaneGatewayMissing": AlertProof(
        PromtoolCase({'up{job="other"}': "1x60"}),
        PromtoolCase({f'up{{job="{JOB}", instance="a"}}': "1x60"}),
        {"job": JOB},
    ),
    "TierplaneRequestsFail": AlertProof(
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _requests(RequestOutcome.FAILED, "0+20x60")),
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _requests(RequestOutcome.FAILED, "0+1x60")),
        _TIER,
    ),
    # Of the two tiers that miss as much, only the one that promises more than it keeps.
    "TierplaneSloMissed": AlertProof(
        PromtoolCase(_slo("balanced", "0.99", "0+3x60") | _slo("capable", "0.9", "0+3x60")),
        PromtoolCase(_slo("balanced", "0.99", "0+0.3x60") | _slo("capable", "0.9", "0+5x60")),
        _TIER,
    ),
    "TierplaneFirstTokenSlow": AlertProof(
        PromtoolCase(_buckets("tierplane_time_to_first_token_seconds", 'tier="balanced"', slow=True)),
        PromtoolCase(_buckets("tierplane_time_to_first_token_seconds", 'tier="balanced"', slow=False)),
        _TIER,
    ),
    "TierplaneQueueLong": AlertProof(
        PromtoolCase({f'tierplane_queued_requests{{{_G}, priority="normal"}}': "80x60"}),
        PromtoolCase({f'tierplane_queued_requests{{{_G}, priority="normal"}}': "20x60"}),
    ),
    "TierplaneQueueWaitLong": AlertProof(
        PromtoolCase(_buckets("tierplane_queue_wait_seconds", 'priority="high"', slow=True)),
        PromtoolCase(_buckets("tierplane_queue_wait_seconds", 'priority="high"', slow=False)),
        {"priority": "high"},
    ),
    "TierplaneSheds": AlertProof(
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _requests(RequestOutcome.SHED, "0+10x60")),
        PromtoolCase(_requests(RequestOutcome.OK, "0+6000x60") | _requests(RequestOutcome.SHED, "0+10x60")),
        _TIER,
    ),
    "TierplaneRetriesMany": AlertProof(
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _retries("0+30x60")),
        PromtoolCase(_requests(RequestOutcome.OK, "0+60x60") | _retries("0+3x60")),
        _TIER,
    ),
    "TierplaneStreamsLost": AlertProof(
        PromtoolCase({f'tierplane_resumes_total{{{_G}, method="refused"}}': "0x28 1x30"}),
        PromtoolCase({f'tierplane_resumes_total{{{_G}, method="continue"}}': "0x28 1x30"}),
    ),
    "TierplaneBreakerOpen": AlertProof(
        PromtoolCase({f'tierplane_breaker_open{{{_G}, tier="balanced", endpoint="balanced-1"}}': "1x60"}),
        PromtoolCase({f'tierplane_breaker_open{{{_G}, tier="balanced", endpoint="balanced-1"}}': "0.5x60"}),
        {"tier": "balanced", "endpoint": "balanced-1"},
    ),
    "TierplaneTierSaturated": AlertProof(PromtoolCase(_load("19x60")), PromtoolCase(_load("10x60")), _TIER),
    "TierplaneTierIdle": AlertProof(
        PromtoolCase(_load("0x60", "0+6x60")), PromtoolCase(_load("10x60", "0+6x60")), _TIER
    ),
    "TierplaneGpuBusy": AlertProof(
        PromtoolCase({f"ray_node_gpus_utilization{{{_GPU}}}": "99x60"}),
        PromtoolCase({f"ray_node_gpus_utilization{{{_GPU}}}": "60x60"}),
        _GPU_LABELS,
    ),
    "TierplaneGpuMemoryFull": AlertProof(
        PromtoolCase(
            {f"ray_node_gram_used{{{_GPU}}}": "23000x60", f"ray_node_gram_available{{{_GPU}}}": "100x60"}
        ),
        PromtoolCase(
            {f"ray_node_gram_used{{{_GPU}}}": "20000x60", f"ray_node_gram_available{{{_GPU}}}": "3000x60"}
        ),
        _GPU_LABELS,
    ),
    "TierplaneGpuHot": AlertProof(
        PromtoolCase({f"ray_node_gpu_temperature_celsius{{{_GPU}}}": "92x60"}),
        PromtoolCase({f"ray_node_gpu_temperature_celsius{{{_GPU}}}": "70x60"}),
        _GPU_LABELS,
    ),
    "TierplaneGpuOutOfUse": _relayed("TierplaneGpuOutOfUse", "GPU-1"),
    "TierplaneNodeLost": _relayed("TierplaneNodeLost", "node-1"),
    "TierplaneNodeSilent": _relayed("TierplaneNodeSilent", "node-1"),
    "TierplaneStoreUnsafe": _relayed("TierplaneStoreUnsafe", "plane"),
}


def prometheus_alert(rule: AlertRule) -> PrometheusAlert:
    """The rule in PromQL. One that only the controller judges is relayed: it has waited there already, and
    fires for as long as a gateway shows it."""
    if rule.judge is EvaluatedBy.PROGRAM:
        expr = f"{q.seen('tierplane_alerts', ['subject'], alert=rule.name)} == 1"
        if rule.kind is SubjectType.TIER:
            # Alertmanager groups and inhibits by tier.
            expr = f'label_replace({expr}, "tier", "$1", "subject", "(.+)")'
        lasts, subject = "0s", "{{ $labels.subject }}"
    else:
        expr = f"{FIGURES[rule.figure]} {_sign(rule.below)} {rule.threshold:g}"
        if rule.given is not None:
            given = rule.given
            other = f"{FIGURES[given.figure]} {_sign(given.below)} {given.threshold:g}"
            expr = f"{expr} and on ({_ON[rule.kind]}) {other}"
        lasts, subject = _duration(rule.for_s), _SUBJECT.get(rule.kind, "")
    return PrometheusAlert(
        rule.name, rule.severity.value, expr, lasts, rule.text(subject), rule.action, PROOFS[rule.name]
    )


def _sign(below: bool) -> str:
    return "<" if below else ">"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}m" if whole >= 60 and whole % 60 == 0 else f"{whole}s"


ALERTS: Final = tuple(prometheus_alert(rule) for rule in core.RULES)


def threshold(name: str) -> float:
    """Where the alert of that name begins, for the lines in dashboards."""
    return core.BY_NAME[name].threshold


def rule_groups() -> dict[str, Any]:
    """All rules, as a Prometheus rule file and a PrometheusRule take them."""
    recordings = [{"record": each.name, "expr": each.expr} for each in RECORDINGS]
    alerts = [
        {
            "alert": each.name,
            "expr": each.expr,
            "for": each.lasts,
            "labels": {"severity": each.severity},
            "annotations": {"summary": each.summary, "action": each.action},
        }
        for each in ALERTS
    ]
    return {
        "groups": [
            {"name": "tierplane-recordings", "interval": "15s", "rules": recordings},
            {"name": "tierplane-alerts", "rules": alerts},
        ]
    }


def rule_tests(rule_file: str) -> dict[str, Any]:
    """A test file for ``promtool test rules``: every alert fires where it should, and is quiet elsewhere."""
    tests = []
    for alert in ALERTS:
        for case, fires in ((alert.proof.fires, True), (alert.proof.quiet, False)):
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
    for label, value in alert.proof.labels.items():
        summary = summary.replace(f"{{{{ $labels.{label} }}}}", value)
    return {
        "exp_labels": {"severity": alert.severity, **alert.proof.labels},
        "exp_annotations": {"summary": summary, "action": alert.action},
    }
