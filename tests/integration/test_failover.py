"""GPUs, drivers, nodes and controllers are lost under load, on Ray nodes with scripted GPUs: nothing fails.

The scenarios are those of ``tierplane bench failover``, one after the other on one running plane.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.benchmarks.bench_failover import (
    REPLICAS,
    SCENARIOS,
    Timeline,
    failover_cluster,
    measure,
)
from tests.support.gpu_cluster import GpuCluster

pytestmark = [pytest.mark.ray, pytest.mark.alone, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[GpuCluster]:
    with failover_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def timeline(cluster: GpuCluster) -> Iterator[Timeline]:
    with Timeline(cluster) as following:
        yield following


def endpoints(cluster: GpuCluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.plane.get("/status")["endpoints"]
    return found


def test_every_replica_has_gpus_of_its_own_and_its_engine_sees_those_only(cluster: GpuCluster) -> None:
    here = endpoints(cluster)
    assert Counter(each["tier"] for each in here) == REPLICAS
    assert {uuid for each in here for uuid in each["gpu_uuids"]} == set(cluster.head.uuids())
    for endpoint in here:
        seen = psutil.Process(endpoint["pid"]).environ()["CUDA_VISIBLE_DEVICES"]
        assert seen == ",".join(endpoint["gpu_uuids"])
    shared = 0
    for gpu in cluster.gpus():
        parts = [holder["milli"] for holder in gpu["holders"]]
        assert parts in ([1000], [500, 500])
        if len(parts) == 2:
            shared += 1
            held_bytes = [holder["memory_bytes"] for holder in gpu["holders"]]
            assert min(held_bytes) > 0.4 * gpu["memory_total_bytes"]
            assert sum(held_bytes) <= gpu["memory_total_bytes"]
    assert shared == 1


# Overheating is how the controller's scenario begins.
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "hot"])
def test_no_request_fails(
    cluster: GpuCluster, timeline: Timeline, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row, lines = asyncio.run(measure(cluster, timeline, SCENARIOS[name], seconds=1.0, rate=8.0))
    with capsys.disabled():
        print(f"\n{name}: the time line", *lines, sep="\n")
    story = "\n".join([json.dumps(row), *lines])
    assert row["requests"] > 15, story
    assert row["failed"] == 0, story
    assert row["recovered_s"] is not None, story
    if name == "driver":
        assert row["cordoned_s"] is None, story
        assert row["started"] == row["ended"] == 0, story
        assert not any("cordoned" in line or "elsewhere" in line for line in lines), story
    elif name != "node":
        assert row["cordoned_s"] is not None, story
        assert (row["started"], row["ended"]) == (1, 1), story
        assert row["kept"] == sum(REPLICAS.values()) - 1, story
        assert row["moved_s"] is not None, story
