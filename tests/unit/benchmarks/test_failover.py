"""What ``bench failover`` makes of events; its scenarios run in tests/integration/test_failover.py."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from controlplane.config import parse_plane
from tests.benchmarks import bench_failover
from tests.benchmarks.bench_failover import REPLICAS, SCENARIOS, Strike, Timeline, plane_args
from tests.support.gpu_cluster import GPUS, GpuCluster


def timeline(*events: tuple[float, str, str]) -> Timeline:
    recorded = Timeline(object.__new__(GpuCluster))
    recorded.events = [{"unix_s": at, "kind": kind, "subject": subject} for at, kind, subject in events]
    return recorded


def test_a_scenario_that_is_not_known_is_refused() -> None:
    result = CliRunner().invoke(bench_failover.command, ["--scenarios", "xid,flood"])
    assert result.exit_code == 2
    assert "flood" in result.output
    assert all(name in result.output for name in SCENARIOS)


def test_the_planes_tiers_take_all_gpus_of_a_node() -> None:
    config = parse_plane(plane_args())
    assert {tier.name: tier.replicas for tier in config.tiers} == REPLICAS
    assert sum(tier.gpus * tier.replicas for tier in config.tiers) == GPUS


@pytest.mark.parametrize(
    ("events", "moved_s"),
    [
        ([(11.0, "ready", "b"), (12.5, "deregistered", "a")], 2.5),
        ([(11.0, "lost", "a"), (14.0, "ready", "b")], 4.0),
        ([(9.0, "ready", "b"), (12.0, "deregistered", "a")], None),
        ([(11.0, "ready", "b")], None),
        ([(11.0, "ready", "kept"), (12.0, "deregistered", "a")], None),
    ],
    ids=["elsewhere first", "gone first", "before the strike", "still there", "no other"],
)
def test_a_move_is_over_when_the_old_one_is_gone_and_another_serves(
    events: Any, moved_s: float | None
) -> None:
    strike = Strike("GPU-1", leaves=frozenset({"a"}))
    assert bench_failover._moved_s(timeline(*events), 10.0, strike, {"a", "kept"}) == moved_s


def test_the_first_event_of_a_kind_after_the_strike() -> None:
    recorded = timeline((9.0, "xid", "g"), (10.5, "xid", "g"), (11.0, "xid", "g"))
    assert recorded.first_s(10.0, lambda event: event["kind"] == "xid") == 0.5
    assert recorded.first_s(10.0, lambda event: event["kind"] == "ready") is None
