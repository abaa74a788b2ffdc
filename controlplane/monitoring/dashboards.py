"""Grafana dashboards: gateways, tiers, GPUs and scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from controlplane.core.domain.request import RequestOutcome
from controlplane.monitoring import queries as q
from controlplane.monitoring.rules import threshold

Unit = Literal["reqps", "s", "percentunit", "percent", "short", "mwatt", "celsius", "cps"]

COLUMNS: Final = 24
HEIGHT: Final = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    queries: Mapping[str, str]
    """Legend → PromQL; ``{{label}}`` in a legend is replaced by the label's value."""
    unit: Unit = "short"
    about: str = ""
    limit: float | None = None
    """The threshold of an alert, drawn as a line."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    panels: Sequence[Panel]


_QUANTILES: Final = (0.5, 0.95, 0.99)


def _quantiles(name: str, by: str) -> dict[str, str]:
    return {f"{{{{{by}}}}} p{quantile * 100:g}": q.quantile(quantile, name, [by]) for quantile in _QUANTILES}


GATEWAY: Final = Dashboard(
    "tierplane-gateway",
    "tierplane: gateway",
    (
        Panel(
            "Requests by outcome", {"{{outcome}}": q.rate("tierplane_requests_total", ["outcome"])}, "reqps"
        ),
        Panel(
            "Failures by reason",
            {
                "{{tier}} {{reason}}": q.rate(
                    "tierplane_requests_total", ["tier", "reason"], outcome=RequestOutcome.FAILED
                )
            },
            "reqps",
        ),
        Panel(
            "Queued requests",
            {"{{priority}}": "priority:tierplane_queued_requests:sum"},
            about="Requests that wait for a free slot, by priority.",
            limit=threshold("TierplaneQueueLong"),
        ),
        Panel(
            "Time in the queue",
            _quantiles("tierplane_queue_wait_seconds", "priority"),
            "s",
            limit=threshold("TierplaneQueueWaitLong"),
        ),
        Panel("Shed by reason", {"{{reason}}": q.rate("tierplane_shed_requests_total", ["reason"])}, "reqps"),
        Panel("Retries by reason", {"{{reason}}": q.rate("tierplane_retries_total", ["reason"])}, "reqps"),
        Panel(
            "Streams that lost their engine",
            {"{{method}}": q.rate("tierplane_resumes_total", ["method"])},
            "cps",
            about="How they were resumed; refused: they could not be.",
        ),
        Panel(
            "Impossible token counts",
            {"{{tier}}": q.rate("tierplane_wrong_usage_total", ["tier"])},
            "cps",
            about="Responses whose token counts can't be right; they are not counted.",
        ),
        Panel("Hedged requests", {"{{outcome}}": q.rate("tierplane_hedges_total", ["outcome"])}, "cps"),
        Panel(
            "Firing alerts",
            {
                "{{severity}} {{alert}} {{subject}}": q.highest(
                    "tierplane_alerts", ["alert", "severity", "subject"]
                ),
                "Prometheus: {{alertname}} {{tier}}": 'ALERTS{alertstate="firing", alertname=~"Tierplane.+"}',
            },
            about="Evaluated by the controller, and by Prometheus.",
            wide=True,
        ),
        Panel(
            "Requests by gateway",
            {"{{gateway}}": q.rate("tierplane_requests_total", ["gateway"])},
            "reqps",
            about="Shows whether the load balancer distributes requests evenly.",
            wide=True,
        ),
    ),
)

TIERS: Final = Dashboard(
    "tierplane-tiers",
    "tierplane: tiers",
    (
        Panel("Requests", {"{{tier}}": "tier:tierplane_requests:rate5m"}, "reqps"),
        Panel(
            "Failed requests",
            {"{{tier}}": "tier:tierplane_failed:ratio5m"},
            "percentunit",
            limit=threshold("TierplaneRequestsFail"),
        ),
        Panel(
            "Endpoints by state",
            {
                "{{tier}} {{state}}": q.highest("tierplane_endpoints", ["tier", "state"]),
                "{{tier}} due": q.highest("tierplane_due_replicas", ["tier"]),
            },
            about="Due: replicas that must be ready now; 0 while an operator has drained the tier.",
        ),
        Panel(
            "Circuit breakers",
            {"{{endpoint}}": q.highest("tierplane_breaker_open", ["tier", "endpoint"])},
            about="1: open, no requests are sent. 0.5: half open, probing.",
        ),
        Panel(
            "Time to first token",
            _quantiles("tierplane_time_to_first_token_seconds", "tier"),
            "s",
            limit=threshold("TierplaneFirstTokenSlow"),
        ),
        Panel("Inter-token latency", _quantiles("tierplane_inter_token_seconds", "tier"), "s"),
        Panel("Request duration", _quantiles("tierplane_request_seconds", "tier"), "s"),
        Panel("Mean request duration", {"{{tier}}": q.mean("tierplane_request_seconds", ["tier"])}, "s"),
        Panel("Tokens", {"{{tier}} {{kind}}": q.rate("tierplane_tokens_total", ["tier", "kind"])}, "cps"),
        Panel(
            "Failures at endpoints",
            {"{{tier}} {{kind}}": q.rate("tierplane_endpoint_failures_total", ["tier", "kind"])},
            "cps",
        ),
        Panel(
            "Requests served by another tier",
            {
                "{{kind}} {{from_tier}} → {{to_tier}}": q.rate(
                    "tierplane_spills_total", ["kind", "from_tier", "to_tier"]
                )
            },
            "reqps",
            wide=True,
        ),
    ),
)

GPUS: Final = Dashboard(
    "tierplane-gpus",
    "tierplane: GPUs",
    (
        Panel(
            "Utilisation",
            {"{{ip}} GPU {{GpuIndex}}": q.gpu("ray_node_gpus_utilization")},
            "percent",
            limit=100 * threshold("TierplaneGpuBusy"),
        ),
        Panel(
            "Memory",
            {"{{ip}} GPU {{GpuIndex}}": q.gpu_memory_ratio()},
            "percentunit",
            limit=threshold("TierplaneGpuMemoryFull"),
        ),
        Panel("Power", {"{{ip}} GPU {{GpuIndex}}": q.gpu("ray_node_gpu_power_milliwatts")}, "mwatt"),
        Panel(
            "Temperature",
            {"{{ip}} GPU {{GpuIndex}}": q.gpu("ray_node_gpu_temperature_celsius")},
            "celsius",
            limit=threshold("TierplaneGpuHot"),
        ),
        Panel(
            "GPU time of requests",
            {"{{tier}}": q.rate("tierplane_gpu_seconds_total", ["tier"])},
            about="A busy GPU's time divided among its requests; engine time for tiers without a GPU.",
        ),
        Panel(
            "GPU time on the next tier",
            {"{{tier}}": q.rate("tierplane_next_tier_gpu_seconds_total", ["tier"])},
        ),
        Panel(
            "Nodes: CPU",
            {"{{node}}": q.highest("tierplane_node_cpu_ratio", ["node"])},
            "percentunit",
            about="Busy share of all CPUs of a node.",
        ),
        Panel(
            "Nodes: memory in use",
            {
                "{{node}}": (
                    f"1 - {q.highest('tierplane_node_memory_available_bytes', ['node'])}"
                    f" / {q.highest('tierplane_node_memory_total_bytes', ['node'])}"
                )
            },
            "percentunit",
            limit=threshold("TierplaneNodeMemoryLow"),
        ),
        Panel(
            "Nodes: disks in use",
            {
                "{{node}} {{path}}": (
                    f"1 - {q.highest('tierplane_node_disk_free_bytes', ['node', 'path'])}"
                    f" / {q.highest('tierplane_node_disk_total_bytes', ['node', 'path'])}"
                )
            },
            "percentunit",
            about="The file systems of the run folder, of temporary files and of models.",
            limit=threshold("TierplaneNodeDiskFull"),
        ),
        Panel(
            "Nodes: load, and age of the figures",
            {
                "{{node}} load": q.highest("tierplane_node_load_1m", ["node"]),
                "{{node}} age in s": q.highest("tierplane_node_report_age_seconds", ["node"]),
            },
            about="Processes that run or wait for a CPU, averaged over a minute.",
        ),
    ),
)

SCALING: Final = Dashboard(
    "tierplane-scaling",
    "tierplane: scaling",
    (
        Panel(
            "Slots in use",
            {"{{tier}}": "tier:tierplane_saturation:ratio"},
            "percentunit",
            about="Near 1 for a long time: scale out. Near 0 for a long time: scale in.",
            limit=threshold("TierplaneTierSaturated"),
        ),
        Panel(
            "Requests in flight, and slots",
            {
                "{{tier}} in flight": q.total("tierplane_in_flight_requests", ["tier"]),
                "{{tier}} slots": q.total("tierplane_slots", ["tier"]),
            },
        ),
        Panel(
            "Queued requests",
            {"{{priority}}": "priority:tierplane_queued_requests:sum"},
            limit=threshold("TierplaneQueueLong"),
        ),
        Panel(
            "Time to first token, p95",
            {"{{tier}}": "tier:tierplane_time_to_first_token_seconds:p95_5m"},
            "s",
            limit=threshold("TierplaneFirstTokenSlow"),
        ),
        Panel("Inter-token latency, p95", {"{{tier}}": "tier:tierplane_inter_token_seconds:p95_5m"}, "s"),
        Panel("Request duration, p95", {"{{tier}}": "tier:tierplane_request_seconds:p95_5m"}, "s"),
        Panel("Ready endpoints", {"{{tier}}": q.highest("tierplane_endpoints", ["tier"], state="ready")}),
        Panel(
            "Requests that missed the SLO",
            {
                "{{tier}}": "tier:tierplane_slo_missed:ratio5m",
                "{{tier}} allowed": f"1 - {q.highest('tierplane_slo_target_ratio', ['tier'])}",
            },
            "percentunit",
            about=(
                "Of the requests meant for the tier; failed and shed ones count as missed. "
                "Allowed: by slo.attainment."
            ),
        ),
        Panel(
            "SLO burn rate",
            {"{{tier}}": "tier:tierplane_slo_burn:ratio5m"},
            about="Misses as a multiple of what the SLO allows: above 1 the tier does not meet it.",
            limit=threshold("TierplaneSloMissed"),
        ),
        Panel(
            "Replicas: ready, target, and wanted by the policy",
            {
                "{{tier}} ready": q.highest("tierplane_endpoints", ["tier"], state="ready"),
                "{{tier}} target": q.highest("tierplane_target_replicas", ["tier"]),
                "{{tier}} wanted": q.highest("tierplane_wanted_replicas", ["tier"]),
            },
            about="Wanted and target differ in mode `advise`, and where an operator set the number.",
        ),
        Panel(
            "Requests: rate and forecast",
            {
                "{{tier}}": "tier:tierplane_requests:rate5m",
                "{{tier}} forecast": q.highest("tierplane_forecast_requests_per_second", ["tier"]),
            },
            "reqps",
            about="The forecast is for the time when a replica ordered now would be ready.",
        ),
        Panel(
            "Open recommendations",
            {"{{tier}} {{kind}}": q.highest("tierplane_recommendation", ["tier", "kind"])},
            about="`tierplane recommendations` shows the reasons and the predicted effects.",
        ),
        Panel(
            "Scaling alerts",
            {"{{alertname}} {{tier}}": 'ALERTS{alertname=~"TierplaneTier(Saturated|Idle)"}'},
            about="Alerts that suggest more or fewer replicas.",
        ),
    ),
)

DASHBOARDS: Final = (GATEWAY, TIERS, GPUS, SCALING)


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as JSON for Grafana, where the data source is chosen on import."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(dashboard.panels, 1):
        width = COLUMNS if panel.wide else COLUMNS // 2
        if x + width > COLUMNS:
            x, y = 0, y + HEIGHT
        panels.append(_panel(panel, number, {"h": HEIGHT, "w": width, "x": x, "y": y}))
        x += width
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["tierplane"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
            ]
        },
        "annotations": {"list": []},
        "links": [
            {
                "title": "tierplane",
                "type": "dashboards",
                "tags": ["tierplane"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "panels": panels,
    }


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    custom: dict[str, Any] = {"fillOpacity": 10, "lineWidth": 1, "showPoints": "never"}
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
        custom["thresholdsStyle"] = {"mode": "line"}
    return {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "type": "timeseries",
        "datasource": source,
        "gridPos": position,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": custom,
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }
