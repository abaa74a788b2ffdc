"""Tiers and gateways as tables, lines and JSON, for ``up`` and ``status``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from controlplane.cli.console import age
from controlplane.cli.fitting_table import FittingTable
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.cluster.status import EndpointStatus, TierStatus
from controlplane.core.domain.endpoint import Endpoint

_STYLES = {
    "ready": "green",
    "starting": "yellow",
    "restarting": "yellow",
    "waiting": "dim",
    "idle": "dim",
    "drained": "cyan",
    "degraded": "yellow",
    "draining": "cyan",
    "failed": "bold red",
    "stopped": "dim",
}


def diagnosis_or_phase(tier: TierStatus) -> str:
    """Why the tier failed or, if it has not failed, the phase that it is in."""
    return tier.diagnosis or tier.phase or (tier.note.reason if tier.note is not None else "")


def progress_table(tiers: Sequence[TierStatus], elapsed_s: float) -> Table:
    """One row per tier while a plane starts."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("tier", no_wrap=True)
    table.add_column("state", min_width=10, no_wrap=True)
    table.add_column("ready", justify="right", no_wrap=True)
    table.add_column(f"{elapsed_s:5.1f} s", overflow="fold")
    for tier in tiers:
        table.add_row(
            tier.name,
            _state(tier.state),
            f"{tier.replicas_ready}/{tier.replicas_wanted}",
            diagnosis_or_phase(tier),
        )
    return table


def status_table(tiers: Sequence[TierStatus], unix_s: float) -> FittingTable:
    """One row per endpoint, grouped by tier."""
    table = FittingTable(
        *("tier", "state", "ready", "busy", "restarts", "age", "endpoint", "model", "address"),
        right=("ready", "busy", "restarts", "age"),
    )
    for tier in tiers:
        ready = f"{tier.replicas_ready}/{tier.replicas_wanted}"
        if not tier.endpoints:
            table.add_row(tier.name, _state(tier.state), ready, "", "", "", "", tier.model, "")
        for index, item in enumerate(tier.endpoints):
            endpoint = item.endpoint
            table.add_row(
                tier.name if index == 0 else "",
                _state(endpoint.state.value),
                ready if index == 0 else "",
                f"{item.in_flight}/{endpoint.concurrency_limit}",
                str(endpoint.restarts),
                age(unix_s - endpoint.since_unix_s) if endpoint.since_unix_s else "",
                endpoint.endpoint_id,
                endpoint.model,
                endpoint.base_url,
            )
    return table


def not_ready_lines(tiers: Sequence[TierStatus], unix_s: float) -> list[Text]:
    """A line for each tier that is drained, held, starting or at zero; for each endpoint that is not ready,
    why it is not; and for each that has missed reports."""
    lines = []
    for tier in tiers:
        if tier.note is not None:
            text = f"tier {tier.name} is {tier.note.reason} ({age(unix_s - tier.note.since_unix_s)})"
            lines.append(Text(text, style=_STYLES.get(tier.state, "")))
        for item in tier.endpoints:
            endpoint = item.endpoint
            parts = [] if endpoint.state == "ready" else [endpoint.phase, endpoint.diagnosis]
            if item.reported_unix_s is not None:
                parts.append(f"no report for {age(unix_s - item.reported_unix_s)}")
            if text := "; ".join(filter(None, parts)):
                lines.append(Text(f"{endpoint.endpoint_id}: {text}", style=_STYLES[endpoint.state.value]))
    return lines


def gateway_table(gateways: Sequence[GatewayInfo], unix_s: float) -> FittingTable:
    """One row per gateway."""
    table = FittingTable("gateway", "in flight", "queued", "last report", right=("in flight", "queued"))
    for item in gateways:
        table.add_row(
            item.gateway_id,
            str(item.in_flight),
            str(item.queued),
            f"{age(unix_s - item.seen_unix_s)} ago",
        )
    return table


def tier_json(tier: TierStatus, unix_s: float) -> dict[str, Any]:
    """A tier for ``--json``."""
    return {
        "name": tier.name,
        "state": tier.state,
        "model": tier.model,
        "engine": tier.engine,
        "replicas_ready": tier.replicas_ready,
        "replicas_wanted": tier.replicas_wanted,
        "in_flight": tier.in_flight,
        "restarts": tier.restarts,
        "phase": tier.phase,
        "diagnosis": tier.diagnosis,
        "mode": None
        if tier.note is None
        else {
            "mode": tier.note.mode.value,
            "reason": tier.note.reason,
            "since_unix_s": tier.note.since_unix_s,
        },
        "endpoints": [_endpoint_json(item, unix_s) for item in tier.endpoints],
    }


def gateways_json(snapshot: ClusterSnapshot) -> list[dict[str, Any]]:
    """The gateways for ``--json``."""
    return [
        {
            "gateway_id": item.gateway_id,
            "url": item.url,
            "node_id": item.node_id,
            "in_flight": item.in_flight,
            "queued": item.queued,
            "seen_unix_s": item.seen_unix_s,
        }
        for item in snapshot.gateways
    ]


def _endpoint_json(item: EndpointStatus, unix_s: float) -> dict[str, Any]:
    endpoint: Endpoint = item.endpoint
    return {
        "endpoint_id": endpoint.endpoint_id,
        "state": endpoint.state.value,
        "model": endpoint.model,
        "base_url": endpoint.base_url,
        "generation": endpoint.generation,
        "pid": endpoint.pid,
        "node_id": endpoint.node_id,
        "actor_id": endpoint.actor_id,
        "gpus": list(endpoint.gpu_uuids),
        "age_s": round(unix_s - endpoint.since_unix_s, 1) if endpoint.since_unix_s else None,
        "no_report_for_s": None if item.reported_unix_s is None else round(unix_s - item.reported_unix_s, 1),
        "in_flight": item.in_flight,
        "concurrency_limit": endpoint.concurrency_limit,
        "restarts": endpoint.restarts,
        "phase": endpoint.phase,
        "diagnosis": endpoint.diagnosis,
        "simulated": endpoint.capabilities.simulated,
    }


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))
