"""The gateway's benchmarks on real planes, briefly: their rows have the right form and nothing was lost.

Times are not looked at: they are the machine's.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from click.testing import CliRunner

from tests.benchmarks import bench_chaos, bench_gateway, bench_priority

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]


def rows_of(command: Any, *options: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(command, [*options, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["rows"]
    assert isinstance(rows, list)
    return rows


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")
def test_bench_gateway() -> None:
    rows = rows_of(
        bench_gateway.command, "--seconds", "1", "--rounds", "1", "--paths", "engine,gateway,gateway-serve"
    )
    assert {(row["path"], row["workload"], row["concurrency"]) for row in rows} == {
        (path, workload, concurrency)
        for path in ("engine", "gateway", "gateway-serve")
        for workload in ("post", "stream")
        for concurrency in (1, 32)
    }
    for row in rows:
        assert list(row) == ["path", "workload", "concurrency", "per_s", "p50_ms", "p99_ms"]
        assert row["per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]


def test_bench_gateway_refuses_a_path_it_does_not_know() -> None:
    result = CliRunner().invoke(bench_gateway.command, ["--paths", "engine,teleport"])
    assert result.exit_code == 2
    assert "teleport" in result.output


def test_bench_chaos() -> None:
    rows = rows_of(bench_chaos.command, "--seconds", "1.5", "--faults", "engine,cut")
    assert [row["fault"] for row in rows] == ["engine", "cut"]
    for row in rows:
        assert set(row) >= {
            *("fault", "requests", "failed", "resumed", "duplicated", "truncated"),
            *("p99_before_ms", "p99_during_ms", "p99_after_ms", "recovered_s"),
        }
        assert row["requests"] > 30
        assert (row["failed"], row["duplicated"], row["truncated"]) == (0, 0, 0)
        assert row["resumed"] >= 1
        assert row["recovered_s"] is not None


def test_bench_priority() -> None:
    rows = rows_of(bench_priority.command, "--seconds", "2")
    assert [(row["load_ratio"], row["priority"]) for row in rows] == [
        (ratio, priority) for ratio in (0.5, 2.0) for priority in ("high", "normal", "low")
    ]
    for row in rows:
        assert list(row) == ["load_ratio", "priority", "requests", "ok", "shed", "p50_ms", "p99_ms"]
        assert row["ok"] + row["shed"] == row["requests"] > 0
