"""What a gateway counts: shares, slots, averages, snapshots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.request import Priority
from controlplane.core.routing.circuit_breaker import BreakerState
from controlplane.core.routing.endpoint_table import (
    EndpointTable,
    GatewayShard,
    LoadSettings,
    gateway_shard,
    shard_share,
)
from controlplane.core.routing.tier_table import TierPolicy, TierTable

NOW_S = 50.0
TABLE = TierTable.build([TierPolicy("small", "s"), TierPolicy("large", "l")])
READY = Endpoint("small-0", "small", "s", "vllm", "http://127.0.0.1:1", EndpointState.READY, 10, generation=1)


def one(**settings: Any) -> EndpointTable:
    endpoint_table = EndpointTable(TABLE, LoadSettings(**settings))
    endpoint_table.apply([READY])
    return endpoint_table


@pytest.mark.parametrize(
    ("limit", "count", "offset", "shares"),
    [
        (10, 1, 0, [10]),
        (10, 3, 0, [4, 3, 3]),
        (10, 3, 2, [3, 3, 4]),
        (2, 3, 1, [0, 1, 1]),
        (0, 2, 0, [0, 0]),
    ],
)
def test_shares(limit: int, count: int, offset: int, shares: list[int]) -> None:
    assert [shard_share(limit, index, count, offset) for index in range(count)] == shares


@pytest.mark.parametrize(("limit", "index", "count"), [(-1, 0, 1), (1, 1, 1), (1, 0, 0), (1, -1, 2)])
def test_no_such_share(limit: int, index: int, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        shard_share(limit, index, count)


def test_a_slot_counts_while_it_lasts_and_ends_once() -> None:
    endpoint_table = one()
    load, pool = endpoint_table.by_endpoint_id["small-0"], endpoint_table.pools[0]
    slot = load.begin(NOW_S)
    other = load.begin(NOW_S)
    assert (load.in_flight, load.awaiting_first, pool.in_flight) == (2, 2, 2)
    slot.first_token(NOW_S + 0.5)
    assert (load.in_flight, load.awaiting_first) == (2, 1)
    slot.succeed(NOW_S + 2.0)
    slot.fail(NOW_S + 2.0, weight=9)
    slot.abandon(NOW_S + 2.0)
    slot.succeed(NOW_S + 2.0)
    assert (load.in_flight, load.awaiting_first, pool.in_flight) == (1, 1, 1)
    other.abandon(NOW_S + 3.0)
    assert (load.in_flight, load.awaiting_first, pool.in_flight) == (0, 0, 0)
    assert load.breaker.state is BreakerState.CLOSED


def test_averages_move_towards_new_samples() -> None:
    endpoint_table = one()
    load, pool = endpoint_table.by_endpoint_id["small-0"], endpoint_table.pools[0]
    load.begin(NOW_S).succeed(NOW_S + 1.0)
    assert (load.ttft_s, load.latency_s, pool.ttft_s, pool.service_time_s) == (1.0, 1.0, 1.0, 1.0)
    slot = load.begin(NOW_S)
    slot.first_token(NOW_S + 2.0)
    slot.succeed(NOW_S + 3.0)
    assert load.ttft_s == pytest.approx(1.2)
    assert load.latency_s == pytest.approx(1.4)
    assert pool.service_time_s == pytest.approx(1.1)


def test_the_rate_is_that_of_a_full_tier() -> None:
    endpoint_table = one(reserved_ratio=0.2)
    pool = endpoint_table.pools[0]
    assert pool.rate_per_s(Priority.HIGH) is None
    endpoint_table.by_endpoint_id["small-0"].begin(NOW_S).succeed(NOW_S + 2.0)
    assert pool.rate_per_s(Priority.HIGH) == pytest.approx(5.0)
    assert pool.rate_per_s(Priority.LOW) == pytest.approx(4.0)
    assert endpoint_table.pools[1].rate_per_s(Priority.HIGH) is None


def test_failures_count_for_the_breaker_unless_they_are_the_clients() -> None:
    load = one().by_endpoint_id["small-0"]
    for _ in range(5):
        load.begin(NOW_S).fail(NOW_S, weight=0)
    assert load.breaker.state is BreakerState.CLOSED
    for _ in range(3):
        load.begin(NOW_S).fail(NOW_S)
    assert load.breaker.state is BreakerState.OPEN
    probe = load.begin(NOW_S + 1.0)
    probe.first_token(NOW_S + 1.5)
    assert load.breaker.state is BreakerState.CLOSED
    assert load.in_flight == 1


def test_a_new_process_of_a_replica_starts_afresh() -> None:
    endpoint_table = one()
    old = endpoint_table.by_endpoint_id["small-0"]
    slot = old.begin(NOW_S)
    endpoint_table.apply([replace(READY, generation=2)])
    new = endpoint_table.by_endpoint_id["small-0"]
    assert new is not old
    assert (new.in_flight, endpoint_table.pools[0].in_flight) == (0, 0)
    slot.fail(NOW_S)
    assert (new.in_flight, endpoint_table.pools[0].in_flight) == (0, 0)
    assert new.breaker.state is BreakerState.CLOSED


def test_requests_of_an_endpoint_that_is_not_ready_don_t_count_for_its_tier() -> None:
    endpoint_table = one()
    load = endpoint_table.by_endpoint_id["small-0"]
    slot = load.begin(NOW_S)
    endpoint_table.apply([replace(READY, state=EndpointState.DRAINING)])
    assert endpoint_table.by_endpoint_id["small-0"] is load
    assert (load.in_flight, endpoint_table.pools[0].in_flight, endpoint_table.pools[0].limit) == (1, 0, 0)
    assert endpoint_table.pools[0].load_ratio == 1.0
    slot.succeed(NOW_S + 1.0)
    assert (load.in_flight, endpoint_table.pools[0].in_flight) == (0, 0)


def test_a_snapshot_gives_each_gateway_its_share_and_the_others_load() -> None:
    gateways = tuple(
        GatewayInfo(name, "node", "", in_flight_by_endpoint=(("small-0", count),))
        for name, count in (("a", 1), ("b", 2), ("c", 4))
    )
    snapshot = ClusterSnapshot("e", 1, 0.0, (READY,), gateways)
    limits = []
    for name, others in (("a", 6), ("b", 5), ("c", 3)):
        endpoint_table = EndpointTable(TABLE)
        endpoint_table.apply_snapshot(snapshot, name)
        limits.append(endpoint_table.pools[0].limit)
        assert endpoint_table.by_endpoint_id["small-0"].others_in_flight == others
    assert sorted(limits) == [3, 3, 4]


def test_a_gateway_counts_itself_and_trusts_no_warming_controller() -> None:
    snapshot = ClusterSnapshot("e", 1, 0.0, gateways=(GatewayInfo("b", "node", ""),))
    first = gateway_shard(snapshot, "a")
    assert first == GatewayShard(0, 2)
    warming = ClusterSnapshot("f", 1, 0.0, warming=True)
    assert gateway_shard(warming, "a", first) == first
    assert gateway_shard(warming, "a") == GatewayShard(0, 1)
    assert gateway_shard(ClusterSnapshot("f", 2, 0.0), "a", first) == GatewayShard(0, 1)
