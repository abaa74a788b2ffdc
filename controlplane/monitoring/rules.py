"""Recording rules and alerts for Prometheus: the rules of :mod:`controlplane.core.alerts.rules` with their
figures in PromQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """A series that is computed once for dashboards and alerts."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class PrometheusAlert:
    """One alert in Prometheus."""

    name: str
    severity: str
    expr: str
    lasts: str
    """How long ``expr`` must be true before the alert fires, in Prometheus' syntax."""
    summary: str
    action: str


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
        f"tier:tierplane_slo_missed:ratio5m / (1 - {q.highest('tierplane_slo_target_ratio', ['tier'])})",
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
"""The subject of an alert as a template with Prometheus' labels; the controller uses the ids that operators
know."""
_JOIN_LABELS: Final[Mapping[SubjectType, str]] = {SubjectType.TIER: "tier"}
"""The label that joins a rule's figure with that of its precondition."""

_DUE = q.highest("tierplane_due_replicas", ["tier"])
_READY_OR_0 = f"({q.highest('tierplane_endpoints', ['tier'], state=_READY)} or 0 * {_DUE})"

FIGURES: Final[Mapping[str, str]] = {
    core.TIER_DUE: _DUE,
    core.TIER_READY: _READY_OR_0,
    core.TIER_MISSING: f"{_DUE} - {_READY_OR_0}",
    core.TIER_SAMPLE: f"300 * {_ENDED}",
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
    "endpoint/breaker": q.highest("tierplane_breaker_open", ["tier", "endpoint"]),
    "gateway/up": f'up{{job="{JOB}"}}',
    "gateway/absent": f'absent(up{{job="{JOB}"}})',
    core.GPU_BUSY: f"{q.gpu('ray_node_gpus_utilization')} / 100",
    core.GPU_MEMORY: q.gpu_memory_ratio(),
    core.GPU_TEMPERATURE: q.gpu("ray_node_gpu_temperature_celsius"),
}
"""Figure → PromQL, with a label for the subject."""


def prometheus_alert(rule: AlertRule) -> PrometheusAlert:
    """The rule in PromQL. A rule that only the controller can evaluate is relayed: its alert fires without
    further delay while a gateway exports it, because the controller has already waited ``for_s``."""
    if rule.judge is EvaluatedBy.PROGRAM:
        expr = f"{q.highest('tierplane_alerts', ['subject'], alert=rule.name)} == 1"
        if rule.kind is SubjectType.TIER:
            # Alertmanager groups and inhibits by tier.
            expr = f'label_replace({expr}, "tier", "$1", "subject", "(.+)")'
        lasts, subject = "0s", "{{ $labels.subject }}"
    else:
        expr = f"{FIGURES[rule.figure]} {_sign(rule.below)} {rule.threshold:g}"
        if rule.given is not None:
            condition = rule.given
            other = f"{FIGURES[condition.figure]} {_sign(condition.below)} {condition.threshold:g}"
            expr = f"{expr} and on ({_JOIN_LABELS[rule.kind]}) {other}"
        lasts, subject = _duration(rule.for_s), _SUBJECT.get(rule.kind, "")
    return PrometheusAlert(
        name=rule.name,
        severity=rule.severity.value,
        expr=expr,
        lasts=lasts,
        summary=rule.text(subject),
        action=rule.action,
    )


def _sign(below: bool) -> str:
    return "<" if below else ">"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}m" if whole >= 60 and whole % 60 == 0 else f"{whole}s"


ALERTS: Final = tuple(prometheus_alert(rule) for rule in core.RULES)


def threshold(name: str) -> float:
    """The threshold of the alert with that name, for the lines in dashboards."""
    return core.BY_NAME[name].threshold


def rule_groups() -> dict[str, Any]:
    """All rules, in the form of a Prometheus rule file and of a PrometheusRule."""
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
