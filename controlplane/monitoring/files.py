"""The configuration files for Prometheus, Alertmanager, Grafana and Kubernetes, by path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from controlplane.monitoring.dashboards import DASHBOARDS, grafana
from controlplane.monitoring.rules import JOB, rule_groups

SCRAPE_S: Final = 15
HEADER: Final = "# Written by: tierplane monitoring {kind}\n"
RAY_TARGETS: Final = "/tmp/ray/prom_metrics_service_discovery.json"  # noqa: S108 - where Ray writes it
"""The file in which Ray on this machine lists its metrics endpoints."""


IMAGES: Final = {
    "prometheus": "prom/prometheus:v3.5.0",
    "alertmanager": "prom/alertmanager:v0.28.1",
    "grafana": "grafana/grafana:12.1.1",
}
"""Images of the compose file."""
PROMETHEUS_URL: Final = "http://127.0.0.1:9090"


def local_files(
    targets: Sequence[str], *, webhook: str = "", ray_targets: str = RAY_TARGETS, alertmanager: str = ""
) -> dict[str, str]:
    """Files for Prometheus, Alertmanager and Grafana outside Kubernetes, and a compose file that runs them.

    ``targets`` are gateways as ``host:port``; one is enough, because each exports the series of all. Alerts
    go to ``webhook`` through the Alertmanager at ``alertmanager`` (``host:port``). ``ray_targets`` lies in
    Ray's folder."""
    return {
        "prometheus.yml": _yaml(_prometheus(targets, ray_targets, alertmanager)),
        "rules.yml": _yaml(rule_groups()),
        "alertmanager.yml": _yaml(_alertmanager(webhook)),
        **{f"dashboards/{board.uid}.json": _json(grafana(board)) for board in DASHBOARDS},
        "grafana/provisioning/dashboards/tierplane.yml": _yaml(_provisioning()),
        "grafana/provisioning/datasources/prometheus.yml": _yaml(_data_source()),
        "compose.yaml": _yaml(_compose(ray_targets)),
    }


def kubernetes_files() -> dict[str, str]:
    """A kustomize component for the Prometheus operator and Grafana's dashboard sidecar."""
    boards = {f"dashboards/{board.uid}.json": _json(grafana(board)) for board in DASHBOARDS}
    return {
        "kustomization.yaml": _yaml(_kustomization(sorted(boards))),
        "podmonitors.yaml": "---\n".join(
            [
                _yaml(_pod_monitor(JOB, {"app.kubernetes.io/component": "gateway"}, "http")),
                _yaml(_pod_monitor("tierplane-ray", {}, "metrics")),
            ]
        ),
        "rules.yaml": _yaml(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PrometheusRule",
                "metadata": _metadata("tierplane"),
                "spec": rule_groups(),
            }
        ),
        **boards,
    }


def _prometheus(targets: Sequence[str], ray_targets: str, alertmanager: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": JOB, "metrics_path": "/metrics", "static_configs": [{"targets": list(targets)}]},
            {"job_name": "tierplane-ray", "file_sd_configs": [{"files": [ray_targets]}]},
        ],
    }
    if alertmanager:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return config


def _alertmanager(webhook: str) -> dict[str, Any]:
    """One message per tier or node rather than per alert; while a tier is down its other alerts are
    inhibited."""
    receiver: dict[str, Any] = {"name": "default"}
    if webhook:
        receiver["webhook_configs"] = [{"url": webhook, "send_resolved": True}]
    return {
        "route": {
            "receiver": "default",
            "group_by": ["tier", "ip"],
            "group_wait": "10s",
            "group_interval": "1m",
            "repeat_interval": "4h",
        },
        "inhibit_rules": [
            {
                "source_matchers": ['alertname="TierplaneTierDown"'],
                "target_matchers": ['severity=~"warning|info"'],
                "equal": ["tier"],
            }
        ],
        "receivers": [receiver],
    }


def _provisioning() -> dict[str, Any]:
    folders = {"tierplane": "/etc/grafana/dashboards", "Ray": "/etc/grafana/ray-dashboards"}
    return {
        "apiVersion": 1,
        "providers": [
            {"name": name, "folder": name, "type": "file", "options": {"path": path}}
            for name, path in folders.items()
        ],
    }


def _data_source() -> dict[str, Any]:
    """Ray's dashboards, and its dashboard's pages, expect a source of this name."""
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": PROMETHEUS_URL,
        "isDefault": True,
    }
    return {"apiVersion": 1, "datasources": [source]}


def _compose(ray_targets: str) -> dict[str, Any]:
    """Prometheus, Alertmanager and Grafana, on loopback only. Ray's dashboard shows Grafana's panels in
    frames, so a viewer needs no password."""
    ray = str(PurePosixPath(ray_targets).parent)

    def service(name: str, volumes: Sequence[str], **more: Any) -> dict[str, Any]:
        return {
            "image": IMAGES[name],
            "network_mode": "host",
            "restart": "unless-stopped",
            "volumes": volumes,
            **more,
        }

    data: dict[str, dict[str, Any]] = {name: {} for name in ("prometheus-data", "grafana-data")}
    return {
        "name": "tierplane-monitoring",
        "services": {
            "prometheus": service(
                "prometheus",
                [
                    "./prometheus.yml:/etc/prometheus/prometheus.yml:ro",
                    "./rules.yml:/etc/prometheus/rules.yml:ro",
                    f"{ray}:{ray}:ro",
                    "prometheus-data:/prometheus",
                ],
                command=[
                    "--config.file=/etc/prometheus/prometheus.yml",
                    "--web.listen-address=127.0.0.1:9090",
                ],
            ),
            "alertmanager": service(
                "alertmanager",
                ["./alertmanager.yml:/etc/alertmanager/alertmanager.yml:ro"],
                command=[
                    "--config.file=/etc/alertmanager/alertmanager.yml",
                    "--web.listen-address=127.0.0.1:9093",
                    "--cluster.listen-address=",
                ],
            ),
            "grafana": service(
                "grafana",
                [
                    "./grafana/provisioning:/etc/grafana/provisioning:ro",
                    "./dashboards:/etc/grafana/dashboards:ro",
                    f"{ray}/session_latest/metrics/grafana/dashboards:/etc/grafana/ray-dashboards:ro",
                    "grafana-data:/var/lib/grafana",
                ],
                environment={
                    "GF_SERVER_HTTP_ADDR": "127.0.0.1",
                    "GF_SECURITY_ALLOW_EMBEDDING": "true",
                    "GF_AUTH_ANONYMOUS_ENABLED": "true",
                    "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
                },
            ),
        },
        "volumes": data,
    }


def _kustomization(boards: Sequence[str]) -> dict[str, Any]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["podmonitors.yaml", "rules.yaml"],
        "configMapGenerator": [
            {
                "name": "tierplane-dashboards",
                "files": list(boards),
                "options": {"disableNameSuffixHash": True, "labels": {"grafana_dashboard": "1"}},
            }
        ],
    }


def _pod_monitor(name: str, more_labels: Mapping[str, str], port: str) -> dict[str, Any]:
    # Alerts and dashboards select series by this job name.
    relabelings = [{"action": "replace", "targetLabel": "job", "replacement": name}]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(name),
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": "tierplane", **more_labels}},
            "podMetricsEndpoints": [
                {
                    "port": port,
                    "path": "/metrics",
                    "interval": f"{SCRAPE_S}s",
                    "scrapeTimeout": "10s",
                    "relabelings": relabelings,
                }
            ],
        },
    }


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app.kubernetes.io/name": "tierplane"}}


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=110, allow_unicode=True)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
