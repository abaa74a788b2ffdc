"""Recording rules and alerts. Each alert carries the series that make it fire, and those that don't, as a
test of its own: a rule can't be added without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from controlplane.core.domain import EndpointState
from controlplane.monitoring import queries as q

Severity = Literal["critical", "warning", "info"]

JOB: Final = "tierplane-gateway"
"""The scrape job of the gateways."""

FAILED_RATIO: Final = 0.1
SLOW_S: Final = 3.0
LONG_QUEUE: Final = 50
SATURATED_RATIO: Final = 0.9
IDLE_PER_S: Final = 1.0
IDLE_RATIO: Final = 0.2
SHED_RATIO: Final = 0.01
RETRY_RATIO: Final = 0.2
GPU_BUSY_PERCENT: Final = 95
GPU_MEMORY_RATIO: Final = 0.98
GPU_HOT_CELSIUS: Final = 87


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that is worked out once for dashboards and alerts."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class Case:
    """Series in promtool's notation, one sample a minute, and when to look."""

    series: Mapping[str, str]
    at: str = "30m"


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert with its proof."""

    name: str
    severity: Severity
    expr: str
    lasts: str
    summary: str
    action: str
    """What to do first."""
    fires: Case
    quiet: Case
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the alert in ``fires`` is labelled with, besides its name and severity."""


_FAILED = q.rate("tierplane_requests_total", ["tier"], outcome="failed")
_ENDED = q.rate("tierplane_requests_total", ["tier"])
_READY = EndpointState.READY.value

RECORDINGS: Final = (
    Recording("tier:tierplane_requests:rate5m", _ENDED),
    Recording("tier:tierplane_failed:ratio5m", f"({_FAILED} or 0 * {_ENDED}) / ({_ENDED} > 0)"),
    Recording(
        "tier:tierplane_time_to_first_token_seconds:p95_5m",
        q.quantile(0.95, "tierplane_time_to_first_token_seconds", ["tier"]),
    ),
    Recording(
        "tier:tierplane_request_seconds:p95_5m", q.quantile(0.95, "tierplane_request_seconds", ["tier"])
    ),
    Recording(
        "tier:tierplane_inter_token_seconds:p95_5m",
        q.quantile(0.95, "tierplane_inter_token_seconds", ["tier"]),
    ),
    Recording(
        "tier:tierplane_saturation:ratio",
        f"{q.total('tierplane_in_flight_requests', ['tier'])} / ({q.total('tierplane_slots', ['tier'])} > 0)",
    ),
    Recording("priority:tierplane_queued_requests:sum", q.total("tierplane_queued_requests", ["priority"])),
)

_G = 'gateway="g1", instance="a"'


def _requests(outcome: str, values: str, tier: str = "balanced") -> dict[str, str]:
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


_TIER_THERE = {f'tierplane_in_flight_requests{{{_G}, tier="balanced"}}': "0x60"}
_GPU = 'ip="10.0.0.1", GpuIndex="0", GpuDeviceName="L4"'
_TIER = {"tier": "balanced"}
_GPU_LABELS = {"ip": "10.0.0.1", "GpuIndex": "0"}


def _load(in_flight: str, rate: str = "0+600x60") -> dict[str, str]:
    return {
        f'tierplane_in_flight_requests{{{_G}, tier="balanced"}}': in_flight,
        f'tierplane_slots{{{_G}, tier="balanced"}}': "20x60",
        **_requests("ok", rate),
    }


ALERTS: Final = (
    Alert(
        "TierplaneTierDown", "critical",
        f"{q.seen('tierplane_in_flight_requests', ['tier'])} "
        f"unless on (tier) ({q.seen('tierplane_endpoints', ['tier'], state=_READY)} > 0)",
        "2m",
        "Tier {{ $labels.tier }} has no ready endpoint.",
        "tierplane status says why; its neighbour bridges it as far as bridge allows.",
        fires=Case(_TIER_THERE | _endpoint("failed")),
        quiet=Case(_TIER_THERE | _endpoint("ready") | _endpoint("failed")),
        labels=_TIER,
    ),
    Alert(
        "TierplaneGatewayUnreachable", "critical",
        f'up{{job="{JOB}"}} == 0',
        "1m",
        "The gateway at {{ $labels.instance }} does not answer Prometheus.",
        "tierplane logs gateway; is its node there?",
        fires=Case({f'up{{job="{JOB}", instance="a"}}': "0x60"}),
        quiet=Case({f'up{{job="{JOB}", instance="a"}}': "1x60"}),
        labels={"instance": "a", "job": JOB},
    ),
    Alert(
        "TierplaneGatewayMissing", "critical",
        f'absent(up{{job="{JOB}"}})',
        "5m",
        "Prometheus knows no gateway.",
        "Is the plane up, and does the scrape configuration find it?",
        fires=Case({'up{job="other"}': "1x60"}),
        quiet=Case({f'up{{job="{JOB}", instance="a"}}': "1x60"}),
        labels={"job": JOB},
    ),
    Alert(
        "TierplaneRequestsFail", "critical",
        f"tier:tierplane_failed:ratio5m > {FAILED_RATIO}",
        "5m",
        "More than a tenth of tier {{ $labels.tier }}'s requests fail.",
        "The panel «Failures by reason», then tierplane logs of the tier.",
        fires=Case(_requests("ok", "0+60x60") | _requests("failed", "0+20x60")),
        quiet=Case(_requests("ok", "0+60x60") | _requests("failed", "0+1x60")),
        labels=_TIER,
    ),
    Alert(
        "TierplaneFirstTokenSlow", "warning",
        f"tier:tierplane_time_to_first_token_seconds:p95_5m > {SLOW_S:g}",
        "10m",
        "One stream in twenty of tier {{ $labels.tier }} waits more than 3 s for its first token.",
        "Is the tier saturated? Then more replicas; otherwise look at prefill (max-num-batched-tokens).",
        fires=Case(_buckets("tierplane_time_to_first_token_seconds", 'tier="balanced"', slow=True)),
        quiet=Case(_buckets("tierplane_time_to_first_token_seconds", 'tier="balanced"', slow=False)),
        labels=_TIER,
    ),
    Alert(
        "TierplaneQueueLong", "warning",
        f"sum(priority:tierplane_queued_requests:sum) > {LONG_QUEUE}",
        "5m",
        "More than 50 requests wait for an engine.",
        "More replicas of the saturated tier, or a spill that is allowed to go further.",
        fires=Case({f'tierplane_queued_requests{{{_G}, priority="normal"}}': "80x60"}),
        quiet=Case({f'tierplane_queued_requests{{{_G}, priority="normal"}}': "20x60"}),
    ),
    Alert(
        "TierplaneQueueWaitLong", "warning",
        f"{q.quantile(0.95, 'tierplane_queue_wait_seconds', ['priority'])} > {SLOW_S:g}",
        "10m",
        "One waiting request in twenty of {{ $labels.priority }} priority waits more than 3 s.",
        "More replicas of the saturated tier.",
        fires=Case(_buckets("tierplane_queue_wait_seconds", 'priority="high"', slow=True)),
        quiet=Case(_buckets("tierplane_queue_wait_seconds", 'priority="high"', slow=False)),
        labels={"priority": "high"},
    ),
    Alert(
        "TierplaneSheds", "warning",
        f"{q.rate('tierplane_shed_requests_total')} > {SHED_RATIO} * {q.rate('tierplane_requests_total')}",
        "5m",
        "More than one request in a hundred is not admitted.",
        "The panel «Shed by reason»: a full queue, deadlines that can't be kept, or no endpoint.",
        fires=Case(
            _requests("ok", "0+60x60")
            | {f'tierplane_shed_requests_total{{{_G}, reason="queue_full"}}': "0+10x60"}
        ),
        quiet=Case(
            _requests("ok", "0+6000x60")
            | {f'tierplane_shed_requests_total{{{_G}, reason="queue_full"}}': "0+10x60"}
        ),
    ),
    Alert(
        "TierplaneRetriesMany", "warning",
        f"{q.rate('tierplane_retries_total')} > {RETRY_RATIO} * {q.rate('tierplane_requests_total')}",
        "10m",
        "More than one request in five needs another attempt.",
        "The panel «Failures at endpoints»: which tier, and what kind.",
        fires=Case(
            _requests("ok", "0+60x60") | {f'tierplane_retries_total{{{_G}, reason="connect"}}': "0+30x60"}
        ),
        quiet=Case(
            _requests("ok", "0+60x60") | {f'tierplane_retries_total{{{_G}, reason="connect"}}': "0+3x60"}
        ),
    ),
    Alert(
        "TierplaneStreamsLost", "warning",
        f"{q.rate('tierplane_resumes_total', method='refused')} > 0",
        "0m",
        "A stream whose engine was lost could not go on.",
        "Why was the engine lost? Sampling without a seed goes on only with resume: best_effort.",
        fires=Case({f'tierplane_resumes_total{{{_G}, method="refused"}}': "0x28 1x30"}),
        quiet=Case({f'tierplane_resumes_total{{{_G}, method="continue"}}': "0x28 1x30"}),
    ),
    Alert(
        "TierplaneBreakerOpen", "warning",
        f"{q.seen('tierplane_breaker_open', ['tier', 'endpoint'])} == 1",
        "5m",
        "Endpoint {{ $labels.endpoint }} of tier {{ $labels.tier }} has been kept from requests for 5 min.",
        "tierplane logs of the tier; its supervisor replaces an engine that hangs.",
        fires=Case({f'tierplane_breaker_open{{{_G}, tier="balanced", endpoint="balanced-1"}}': "1x60"}),
        quiet=Case({f'tierplane_breaker_open{{{_G}, tier="balanced", endpoint="balanced-1"}}': "0.5x60"}),
        labels={"tier": "balanced", "endpoint": "balanced-1"},
    ),
    Alert(
        "TierplaneTierSaturated", "warning",
        f"tier:tierplane_saturation:ratio > {SATURATED_RATIO}",
        "10m",
        "Tier {{ $labels.tier }} has had nine tenths of its places taken for 10 min.",
        "Scale out: more replicas, or a higher concurrency_limit if its GPUs have room.",
        fires=Case(_load("19x60")),
        quiet=Case(_load("10x60")),
        labels=_TIER,
    ),
    Alert(
        "TierplaneTierIdle", "info",
        f"tier:tierplane_saturation:ratio < {IDLE_RATIO} "
        f"and on (tier) tier:tierplane_requests:rate5m < {IDLE_PER_S:g}",
        "15m",
        "Tier {{ $labels.tier }} has had next to nothing to do for 15 min.",
        "Scale in: fewer replicas, or let its neighbour serve it.",
        fires=Case(_load("0x60", "0+6x60")),
        quiet=Case(_load("10x60", "0+6x60")),
        labels=_TIER,
    ),
    Alert(
        "TierplaneGpuBusy", "info",
        f"{q.gpu('ray_node_gpus_utilization')} > {GPU_BUSY_PERCENT}",
        "15m",
        "GPU {{ $labels.GpuIndex }} of {{ $labels.ip }} has been busy for 15 min.",
        "With a queue or a saturated tier: scale out.",
        fires=Case({f"ray_node_gpus_utilization{{{_GPU}}}": "99x60"}),
        quiet=Case({f"ray_node_gpus_utilization{{{_GPU}}}": "60x60"}),
        labels=_GPU_LABELS,
    ),
    Alert(
        "TierplaneGpuMemoryFull", "warning",
        f"{q.gpu_memory_ratio()} > {GPU_MEMORY_RATIO}",
        "5m",
        "GPU {{ $labels.GpuIndex }} of {{ $labels.ip }} has no memory left.",
        "Something besides the engine may use it; lower gpu-memory-utilization.",
        fires=Case(
            {f"ray_node_gram_used{{{_GPU}}}": "23000x60", f"ray_node_gram_available{{{_GPU}}}": "100x60"}
        ),
        quiet=Case(
            {f"ray_node_gram_used{{{_GPU}}}": "20000x60", f"ray_node_gram_available{{{_GPU}}}": "3000x60"}
        ),
        labels=_GPU_LABELS,
    ),
    Alert(
        "TierplaneGpuHot", "warning",
        f"{q.gpu('ray_node_gpu_temperature_celsius')} > {GPU_HOT_CELSIUS}",
        "5m",
        "GPU {{ $labels.GpuIndex }} of {{ $labels.ip }} is hot and will slow down.",
        "Look at the node's cooling; a cordon keeps new engines away.",
        fires=Case({f"ray_node_gpu_temperature_celsius{{{_GPU}}}": "92x60"}),
        quiet=Case({f"ray_node_gpu_temperature_celsius{{{_GPU}}}": "70x60"}),
        labels=_GPU_LABELS,
    ),
)  # fmt: skip


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
        for case, fires in ((alert.fires, True), (alert.quiet, False)):
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


def _expected(alert: Alert) -> dict[str, Any]:
    summary = alert.summary
    for label, value in alert.labels.items():
        summary = summary.replace(f"{{{{ $labels.{label} }}}}", value)
    return {
        "exp_labels": {"severity": alert.severity, **alert.labels},
        "exp_annotations": {"summary": summary, "action": alert.action},
    }
