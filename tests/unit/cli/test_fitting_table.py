"""Tables on a terminal of 80 columns: whole, whatever is in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from controlplane.cli.checking import validate
from controlplane.cli.fitting_table import FittingTable
from controlplane.cli.lifecycle.tables import gateway_table, status_table
from controlplane.cli.operating import explain, recommendations, report
from controlplane.cli.operating.alerts import alert_table
from controlplane.cli.operating.gpus import gpu_table
from controlplane.cli.operating.nodes import node_table
from controlplane.cli.operating.requests import requests_table, sessions_table
from controlplane.cli.operating.usage import usage_table
from controlplane.cli.planning import plan_view
from controlplane.core.alerts.alert import AlertState, Severity, SubjectType
from controlplane.core.alerts.views import AlertView
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.status import EndpointStatus, TierStatus
from controlplane.core.gpus.node_views import DiskView, NodeView
from controlplane.core.gpus.views import GpuHolder, GpuView
from controlplane.core.recommendations.log import TrackRecord
from controlplane.core.recommendations.views import ScalingReport, TierScalingView
from controlplane.core.reports.report import InstanceKind, InstanceReport
from controlplane.core.telemetry.series import Freshness
from controlplane.core.traffic.request_log import (
    LoggedRequest,
    RequestsView,
    SessionsView,
    SessionUsage,
    UsageBy,
    UsageSums,
    UsageView,
)
from tests.support.endpoints import make_endpoint

NOW_S = time.time()
TIER = "summarisation-and-extraction"
ENDPOINT = f"{TIER}-8o6dzzmi"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B-Instruct-AWQ"
ADDRESS = "http://192.168.100.200:54321"
UUID = "GPU-8a6f1c5e-7b1d-4c8e-9f60-123456789abc"
NODE = "host-with-a-long-name.rack-12.example.org"
REASON = "forecast 123.45 requests/s in 95 s need 14 replicas at 9.12/s each; the GPU budget allows 8"
GIB = 2**30


def _status() -> FittingTable:
    endpoint = make_endpoint(ENDPOINT, tier=TIER, model=MODEL, base_url=ADDRESS, since_unix_s=NOW_S - 30_000)
    item = EndpointStatus(endpoint, 10)
    tier = TierStatus(TIER, MODEL, "vllm", "ready", 2, 12, 20, 3, "", "", (item, item))
    return status_table((tier, replace(tier, endpoints=())), NOW_S)


def _gateways() -> FittingTable:
    info = GatewayInfo(f"gateway-{'x' * 40}", "n", "", in_flight=1234, queued=567, seen_unix_s=NOW_S)
    return gateway_table((info,), NOW_S)


def _gpus() -> FittingTable:
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(GpuView)), 12)
    values |= {"uuid": UUID, "node_id": "49eb0ba7830e90f1d130", "state": "returned", "node_cordoned": False}
    values |= {"gpu_ratio": 1.0, "memory_used_bytes": 70 * GIB, "memory_total_bytes": 80 * GIB}
    values |= {"holders": (GpuHolder(ENDPOINT, 500, 38 * GIB), GpuHolder("other-1", 250, 0))}
    return gpu_table((GpuView(**values),))


def _nodes() -> FittingTable:
    disks = (
        DiskView("/mnt/models/huggingface/hub", 1000 * GIB, 4 * GIB),
        DiskView("/tmp", GIB, 9),
    )
    node = NodeView(
        "0123456789abcdef", NODE, Freshness.FRESH, 1.0, "", 128, 1.0, 128.5, 2048 * GIB, 100 * GIB, disks, 8
    )
    return node_table((node,))


def _alerts() -> FittingTable:
    alert = AlertView(
        *("TierplaneNodeMemoryLow", AlertState.FIRING, Severity.CRITICAL, SubjectType.GPU, UUID, "", "", ""),
        *(1.0, 0.9, NOW_S - 9000),
        acknowledged="someone@example.org",
        silenced_until_unix_s=NOW_S + 3000,
    )
    return alert_table((alert,), NOW_S)


def _report() -> FittingTable:
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(InstanceReport)), 123_456.0)
    values |= {"kind": InstanceKind.ENDPOINT, "tier": TIER, "instance": ENDPOINT, "slo_missed": True}
    values |= {"attainment": 0.9, "slo_target": 0.99, "availability": 1.0, "gpu_ratio": 0.5}
    return report._table((InstanceReport(**values),))


def _targets() -> FittingTable:
    view = TierScalingView(TIER, 12, 14, 14, REASON, "advise", 123.45, 9.12, 95.0, 0.6)
    return recommendations._targets(ScalingReport("advise", (view,), (), TrackRecord(0, 0, 0, None)))


def _requests() -> FittingTable:
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(LoggedRequest)), 125.5)
    values |= {"unix_s": NOW_S, "request_id": "chatcmpl-8a6f1c5e-7b1d-4c8e-9f60-123456789abc", "asked": TIER}
    values |= {
        "session": "agent-run-2026-11-30-0001",
        "tier": "capable",
        "endpoint": ENDPOINT,
        "model": MODEL,
    }
    values |= {"api": "completions", "outcome": "client_error", "reason": "context_length_exceeded"}
    values |= {"key": "0123456789ab", "key_name": "the search agent of production", "team": "search"}
    values |= {"prompt_tokens": 120_000, "generated_tokens": 8192, "attempts": 3, "resumed": 2}
    item = LoggedRequest(**values)
    return requests_table(RequestsView((item,), 1, 1, 1, 3.5), NOW_S)


def _sessions() -> FittingTable:
    item = SessionUsage(f"sha256:{'0' * 64}", 123_456, 789, 12_345_678, 1_234_567, 98_765.4, NOW_S)
    return sessions_table(SessionsView((item,), 1, 3.5), NOW_S)


def _usage() -> FittingTable:
    item = UsageSums(
        *("0123456789ab", "the search agent of production", "search", "", "", 123_456, 789, 12_345_678),
        *(1_234_567, 98_765.4, 197_530.8, 123_000, 98_765.4, NOW_S),
    )
    return usage_table(UsageView(UsageBy.KEY, (item,), 0.0, 3600.0, 3.5))


TABLES: dict[str, tuple[Callable[[], RenderableType], tuple[str, ...]]] = {
    "status": (_status, (TIER, ENDPOINT, MODEL, ADDRESS, "10/10", "2/12")),
    "gateways": (
        _gateways,
        (f"gateway-{'x' * 40}", "1234", "567"),
    ),
    "gpus": (_gpus, (UUID[:12], ENDPOINT, "returned", "70.0 of 80 GiB", "100%")),
    "nodes": (
        _nodes,
        ("0123456789ab", NODE, "/mnt/models/huggingface/hub", "4.0 of 1000.0 GiB free", "/tmp"),
    ),
    "alerts": (_alerts, (UUID, "NodeMemoryLow", "critical", "someone@example.org")),
    "report": (_report, (TIER, ENDPOINT, "123456", "99%, missed", "246912")),
    "recommendations": (_targets, (TIER, "123.45/s", "9.12/s", "requests/s")),
    "requests": (
        _requests,
        (
            *("chatcmpl-8a6f1c5e-7b1d-4c8e-9f60-123456789abc", "agent-run-2026-11-30-0001", TIER, ENDPOINT),
            *(MODEL, "client_error: context_length_exceeded", "120000+8192", "125.500"),
        ),
    ),
    "usage": (_usage, ("0123456789ab", "the search agent", "123456", "12345678", "98765.400", "x 2.00")),
    "sessions": (_sessions, (f"sha256:{'0' * 64}", "123456", "12345678", "98765.400")),
}


def shown(table: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_whole_at_80_columns(name: str) -> None:
    make, parts = TABLES[name]
    lines = shown(make())
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)
    for part in parts:
        assert any(part in line for line in lines), f"{part} in\n" + "\n".join(lines)


@pytest.mark.parametrize("module", [explain, plan_view, validate])
def test_every_other_table_is_made_so_too(module: Any) -> None:
    assert module.FittingTable is FittingTable
    assert not hasattr(module, "Table")


def table() -> FittingTable:
    made = FittingTable("name", "count", "what", "where", right=("count",), leave=("where",))
    made.add_row("a", "7", "x" * 20, "here")
    made.add_row("bb", "12", "y", "")
    return made


def test_what_fits_is_one_line_per_row_in_aligned_columns() -> None:
    assert [line.rstrip() for line in shown(table(), 60)] == [
        "name  count  what                  where",
        "a         7  xxxxxxxxxxxxxxxxxxxx  here",
        "bb       12  y",
    ]


def test_columns_that_do_not_fit_follow_their_row_with_their_names() -> None:
    assert [line.rstrip() for line in shown(table(), 36)] == [
        "name  count  what",
        "a         7  xxxxxxxxxxxxxxxxxxxx",
        "  where here",
        "bb       12  y",
    ]
    assert [line.rstrip() for line in shown(table(), 24)] == [
        "name  count",
        "a         7",
        "  what",
        "  xxxxxxxxxxxxxxxxxxxx",
        "  where here",
        "bb       12",
        "  what y",
    ]


def test_a_column_without_values_is_left_out_if_it_may_be() -> None:
    made = FittingTable("name", "cost", without_empty=("cost",))
    made.add_row("a", "")
    assert [line.rstrip() for line in shown(made)] == ["name", "a"]
