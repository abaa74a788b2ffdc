from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo, TierMode, TierNote
from controlplane.core.cluster.status import DEGRADED, IDLE, WAITING, tier_statuses
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from tests.support.endpoints import make_endpoint

S = EndpointState
SPEC = TierSpec("balanced", "m", "simulated", 2, 10)


def snapshot(*endpoints: Endpoint, gateways: tuple[GatewayInfo, ...] = ()) -> ClusterSnapshot:
    return ClusterSnapshot("e", 1, 0.0, endpoints, gateways)


@pytest.mark.parametrize(
    ("states", "target", "state", "ready"),
    [
        ((), 2, WAITING, False),
        ((), 0, IDLE, True),
        ((S.STARTING,), 1, "starting", False),
        ((S.STARTING, S.RESTARTING), 2, "restarting", False),
        ((S.STARTING, S.FAILED), 2, "failed", False),
        ((S.READY, S.STARTING), 2, DEGRADED, False),
        ((S.READY, S.FAILED), 2, DEGRADED, False),
        ((S.READY, S.READY), 2, "ready", True),
        ((S.READY, S.FAILED), 1, "ready", True),
        ((S.DRAINING,), 1, "draining", False),
    ],
)
def test_state_of_a_tier(states: tuple[EndpointState, ...], target: int, state: str, ready: bool) -> None:
    endpoints = [make_endpoint(f"balanced-{i}", each) for i, each in enumerate(states)]
    (tier,) = tier_statuses(snapshot(*endpoints), [replace(SPEC, replicas=target)])
    assert (tier.state, tier.ready) == (state, ready)
    assert tier.failed == (state == "failed")


def test_phase_is_that_of_the_least_advanced_replica() -> None:
    ahead = make_endpoint("balanced-1", S.READY, phase="serving")
    behind = make_endpoint("balanced-2", S.STARTING, phase="loading weights")
    (tier,) = tier_statuses(snapshot(ahead, behind), [SPEC])
    assert tier.phase == "loading weights"
    (tier,) = tier_statuses(snapshot(ahead, replace(ahead, endpoint_id="balanced-2")), [SPEC])
    assert tier.phase == ""


def test_a_failed_tier_says_why() -> None:
    (tier,) = tier_statuses(snapshot(make_endpoint("b", S.FAILED, diagnosis="no such model")), [SPEC])
    assert tier.diagnosis == "no such model"


def test_requests_in_flight_are_those_of_all_gateways() -> None:
    gateways = (
        GatewayInfo("g1", "n", "", in_flight_by_endpoint=(("b1", 2), ("b2", 1))),
        GatewayInfo("g2", "n", "", in_flight_by_endpoint=(("b1", 3),)),
    )
    one, two = make_endpoint("b1", S.READY, restarts=1), make_endpoint("b2", S.READY, restarts=2)
    (tier,) = tier_statuses(snapshot(one, two, gateways=gateways), [SPEC])
    assert (tier.in_flight, tier.restarts) == (6, 3)
    assert [item.in_flight for item in tier.endpoints] == [5, 1]


def test_tiers_are_in_the_configuration_s_order_and_unknown_ones_come_last() -> None:
    stray = replace(make_endpoint("old-1", S.DRAINING), tier="old")
    first = replace(SPEC, name="capable")
    tiers = tier_statuses(snapshot(stray), [first, SPEC])
    assert [tier.name for tier in tiers] == ["capable", "balanced", "old"]
    assert tiers[2].ready


@pytest.mark.parametrize(
    ("mode", "states", "state", "ready"),
    [
        (TierMode.DRAINED, (), "drained", True),
        (TierMode.DRAINED, (S.DRAINING,), "draining", True),
        (TierMode.STARTING, (), "starting", False),
        (TierMode.STARTING, (S.STARTING,), "starting", False),
        (TierMode.HELD, (S.READY, S.READY), "ready", True),
    ],
)
def test_a_tier_that_is_not_simply_on_says_so(
    mode: TierMode, states: tuple[EndpointState, ...], state: str, ready: bool
) -> None:
    note = TierNote("balanced", mode, f"{mode} by an operator: upgrade", 5.0)
    endpoints = [make_endpoint(f"balanced-{i}", each) for i, each in enumerate(states)]
    (tier,) = tier_statuses(replace(snapshot(*endpoints), notes=(note,)), [SPEC])
    assert (tier.state, tier.ready, tier.note) == (state, ready, note)


def test_an_endpoint_that_missed_reports_has_the_time_of_its_last() -> None:
    silent = replace(snapshot(make_endpoint("balanced-1", S.READY)), silent=(("balanced-1", 7.0),))
    (tier,) = tier_statuses(silent, [SPEC])
    assert tier.endpoints[0].reported_unix_s == 7.0
