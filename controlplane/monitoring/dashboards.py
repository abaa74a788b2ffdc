"""Grafana dashboards: the gateway, the tiers, the GPUs, and what speaks for scaling."""

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
    """One graph: what it shows, and its queries by legend."""

    title: str
    queries: Mapping[str, str]
    """Legend, with ``{{label}}`` for a label's value → PromQL."""
    unit: Unit = "short"
    about: str = ""
    limit: float | None = None
    """Drawn as a line: where an alert begins."""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page of panels."""

    uid: str
    title: str
    panels: Sequence[Panel]


_SHARES: Final = (0.5, 0.95, 0.99)


def _quantiles(name: str, by: str) -> dict[str, str]:
    return {f"{{{{{by}}}}} p{share * 100:g}": q.quantile(share, name, [by]) for share in _SHARES}


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
            about="Requests that wait for an engine, by priority.",
            limit=threshold("TierplaneQueueLong"),
        ),
        Panel(
            "Wait in the queue",
            _quantiles("tierplane_queue_wait_seconds", "priority"),
            "s",
            limit=threshold("TierplaneQueueWaitLong"),
        ),
        Panel("Shed by reason", {"{{reason}}": q.rate("tierplane_shed_requests_total", ["reason"])}, "reqps"),
        Panel("Retries by reason", {"{{reason}}": q.rate("tierplane_retries_total", ["reason"])}, "reqps"),
        Panel(
            "Streams whose engine was lost",
            {"{{method}}": q.rate("tierplane_resumes_total", ["method"])},
            "cps",
            about="How they went on; refused: they could not.",
        ),
        Panel("Hedges", {"{{outcome}}": q.rate("tierplane_hedges_total", ["outcome"])}, "cps"),
        Panel(
            "Alerts that fire",
            {
                "{{severity}} {{alert}} {{subject}}": q.seen(
                    "tierplane_alerts", ["alert", "severity", "subject"]
                ),
                "Prometheus: {{alertname}} {{tier}}": 'ALERTS{alertstate="firing", alertname=~"Tierplane.+"}',
            },
            about="As the controller judges them, and as Prometheus does.",
            wide=True,
        ),
        Panel(
            "Requests by gateway",
            {"{{gateway}}": q.rate("tierplane_requests_total", ["gateway"])},
            "reqps",
            about="Whether the load balancer in front of them shares fairly.",
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
            "Failed share",
            {"{{tier}}": "tier:tierplane_failed:ratio5m"},
            "percentunit",
            limit=threshold("TierplaneRequestsFail"),
        ),
        Panel(
            "Endpoints by state",
            {
                "{{tier}} {{state}}": q.seen("tierplane_endpoints", ["tier", "state"]),
                "{{tier}} due": q.seen("tierplane_due_replicas", ["tier"]),
            },
            about="Due: how many have to be there, none while an operator has drained the tier.",
        ),
        Panel(
            "Circuit breakers",
            {"{{endpoint}}": q.seen("tierplane_breaker_open", ["tier", "endpoint"])},
            about="1: kept from requests. 0.5: probing.",
        ),
        Panel(
            "Time to first token",
            _quantiles("tierplane_time_to_first_token_seconds", "tier"),
            "s",
            limit=threshold("TierplaneFirstTokenSlow"),
        ),
        Panel("Between tokens", _quantiles("tierplane_inter_token_seconds", "tier"), "s"),
        Panel("Whole answers", _quantiles("tierplane_request_seconds", "tier"), "s"),
        Panel("Mean of whole answers", {"{{tier}}": q.mean("tierplane_request_seconds", ["tier"])}, "s"),
        Panel("Tokens", {"{{tier}} {{kind}}": q.rate("tierplane_tokens_total", ["tier", "kind"])}, "cps"),
        Panel(
            "Failures at endpoints",
            {"{{tier}} {{kind}}": q.rate("tierplane_endpoint_failures_total", ["tier", "kind"])},
            "cps",
        ),
        Panel(
            "Served by another tier",
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
            "GPU time that requests took",
            {"{{tier}}": q.rate("tierplane_gpu_seconds_total", ["tier"])},
            about="GPUs' worth of work, by processor sharing; device time where there is no GPU.",
        ),
        Panel(
            "What the next tier would have taken",
            {"{{tier}}": q.rate("tierplane_next_tier_gpu_seconds_total", ["tier"])},
        ),
    ),
)

SCALING: Final = Dashboard(
    "tierplane-scaling",
    "tierplane: scaling advice",
    (
        Panel(
            "Places taken",
            {"{{tier}}": "tier:tierplane_saturation:ratio"},
            "percentunit",
            about="Near 1 for long: scale out. Near 0 for long: scale in.",
            limit=threshold("TierplaneTierSaturated"),
        ),
        Panel(
            "Requests at the engines, and places",
            {
                "{{tier}} in flight": q.total("tierplane_in_flight_requests", ["tier"]),
                "{{tier}} places": q.total("tierplane_slots", ["tier"]),
            },
        ),
        Panel(
            "Waiting for a place",
            {"{{priority}}": "priority:tierplane_queued_requests:sum"},
            limit=threshold("TierplaneQueueLong"),
        ),
        Panel(
            "Time to first token, p95",
            {"{{tier}}": "tier:tierplane_time_to_first_token_seconds:p95_5m"},
            "s",
            limit=threshold("TierplaneFirstTokenSlow"),
        ),
        Panel("Between tokens, p95", {"{{tier}}": "tier:tierplane_inter_token_seconds:p95_5m"}, "s"),
        Panel("Whole answers, p95", {"{{tier}}": "tier:tierplane_request_seconds:p95_5m"}, "s"),
        Panel("Ready endpoints", {"{{tier}}": q.seen("tierplane_endpoints", ["tier"], state="ready")}),
        Panel(
            "Requests that missed the SLO",
            {
                "{{tier}}": "tier:tierplane_slo_missed:ratio5m",
                "{{tier}} may": f"1 - {q.seen('tierplane_slo_target_ratio', ['tier'])}",
            },
            "percentunit",
            about="Of those meant for the tier; what failed or was shed missed it. May: by slo.attainment.",
        ),
        Panel(
            "Missed the SLO, in times what it allows",
            {"{{tier}}": "tier:tierplane_slo_burn:ratio5m"},
            about="Above 1 the tier does not keep what it promises.",
            limit=threshold("TierplaneSloMissed"),
        ),
        Panel(
            "Replicas: ready, to be, and wanted by the policy",
            {
                "{{tier}} ready": q.seen("tierplane_endpoints", ["tier"], state="ready"),
                "{{tier}} to be": q.seen("tierplane_target_replicas", ["tier"]),
                "{{tier}} wanted": q.seen("tierplane_wanted_replicas", ["tier"]),
            },
            about="Wanted and to be differ where the mode is to advise, or a number was set by hand.",
        ),
        Panel(
            "Requests: what comes, what is forecast",
            {
                "{{tier}}": "tier:tierplane_requests:rate5m",
                "{{tier}} forecast": q.seen("tierplane_forecast_requests_per_second", ["tier"]),
            },
            "reqps",
            about="The forecast is for the moment at which a replica ordered now is ready.",
        ),
        Panel(
            "Recommendations that hold",
            {"{{tier}} {{kind}}": q.seen("tierplane_recommendation", ["tier", "kind"])},
            about="tierplane recommendations says why, and what each would bring.",
        ),
        Panel(
            "Advice that fires",
            {"{{alertname}} {{tier}}": 'ALERTS{alertname=~"TierplaneTier(Saturated|Idle)"}'},
            about="The alerts that ask for more or fewer replicas.",
        ),
    ),
)

DASHBOARDS: Final = (GATEWAY, TIERS, GPUS, SCALING)


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana imports it; the data source is chosen there."""
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


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
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
        "gridPos": place,
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
