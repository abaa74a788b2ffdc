"""Placing requests on endpoints: filters, scorers, spilling, bridging, refusing, explaining."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.domain.endpoint import Capabilities, Endpoint, EndpointState
from controlplane.core.domain.request import Complexity, Priority
from controlplane.core.routing import scorers
from controlplane.core.routing.endpoint_table import EndpointLoad, EndpointTable, LoadSettings
from controlplane.core.routing.router import Overflow, RouteOutcome, explain
from controlplane.core.routing.tier_table import (
    Api,
    OverflowDirection,
    RouteRefusal,
    RouteRequest,
    TierPolicy,
    TierTable,
)
from tests.support.routing import decide

NOW_S = 1000.0
ALL = Capabilities(embeddings=True, responses=True, messages=True)


def endpoint(name: str, **fields: Any) -> Endpoint:
    tier = name.split("-", maxsplit=1)[0]
    base = Endpoint(
        name, tier, tier + "-model", "vllm", "http://127.0.0.1:1", EndpointState.READY, 2, generation=1
    )
    return replace(base, **fields)


def plane(
    *endpoints: Endpoint,
    spill: OverflowDirection = OverflowDirection.UP,
    bridge: OverflowDirection | None = None,
    **settings: Any,
) -> EndpointTable:
    table = TierTable.build(
        [
            TierPolicy(name, f"{name}-model", spill=spill, bridge=bridge)
            for name in ("lightweight", "balanced", "capable")
        ]
    )
    endpoint_table = EndpointTable(table, LoadSettings(**settings))
    endpoint_table.apply(endpoints)
    return endpoint_table


def fill(load: EndpointLoad, count: int | None = None) -> None:
    for _ in range(load.limit - load.in_flight if count is None else count):
        load.begin(NOW_S)


def chosen(request: RouteRequest, endpoint_table: EndpointTable, pick: int = 0) -> str:
    decision = decide(request, endpoint_table, NOW_S, pick)
    assert decision.load is not None, decision
    return decision.load.endpoint.endpoint_id


BALANCED = RouteRequest(model="balanced")


def test_sends_to_the_tier_asked_for_with_the_reason() -> None:
    endpoint_table = plane(endpoint("lightweight-0"), endpoint("balanced-0"))
    decision = decide(RouteRequest(complexity=Complexity.SIMPLE), endpoint_table, NOW_S, 0)
    assert (decision.outcome, decision.tier, decision.reason) == (
        RouteOutcome.SEND,
        "lightweight",
        "complexity=simple",
    )


def test_equal_endpoints_get_equal_shares() -> None:
    endpoint_table = plane(*(endpoint(f"balanced-{i}") for i in range(3)))
    counts: dict[str, int] = {}
    for pick in range(600):
        name = chosen(BALANCED, endpoint_table, pick)
        counts[name] = counts.get(name, 0) + 1
    assert counts == {f"balanced-{i}": 200 for i in range(3)}


def slower(load: EndpointLoad) -> None:
    load.ttft_s, load.sampled_s = 3.0, NOW_S


@pytest.mark.parametrize(
    "worse",
    [
        pytest.param(lambda load: load.begin(NOW_S), id="in flight"),
        pytest.param(lambda load: setattr(load, "others_in_flight", 1), id="in flight from other gateways"),
        pytest.param(lambda load: load.observe(NOW_S, kv_usage_ratio=0.2, waiting=2), id="queue"),
        pytest.param(lambda load: load.observe(NOW_S, kv_usage_ratio=0.9, waiting=0), id="KV cache"),
        pytest.param(lambda load: load.observe(NOW_S - 11, kv_usage_ratio=0.1, waiting=0), id="stale"),
        pytest.param(slower, id="slow"),
    ],
)
def test_the_worse_of_two_is_not_taken(worse: Any) -> None:
    endpoint_table = plane(
        endpoint("balanced-0", concurrency_limit=10), endpoint("balanced-1", concurrency_limit=10)
    )
    for load in endpoint_table.by_endpoint_id.values():
        load.observe(NOW_S, kv_usage_ratio=0.2, waiting=0)
    endpoint_table.pools[1].ttft_s = 0.5
    worse(endpoint_table.by_endpoint_id["balanced-0"])
    assert {chosen(BALANCED, endpoint_table, pick) for pick in range(6)} == {"balanced-1"}


def test_an_endpoint_that_owes_tokens_and_is_silent_loses_to_a_fuller_one() -> None:
    endpoint_table = plane(
        endpoint("balanced-0", concurrency_limit=10), endpoint("balanced-1", concurrency_limit=10)
    )
    endpoint_table.by_endpoint_id["balanced-0"].begin(NOW_S - 2.5)
    for _ in range(8):
        endpoint_table.by_endpoint_id["balanced-1"].begin(NOW_S).first_token(NOW_S)
    assert {chosen(BALANCED, endpoint_table, pick) for pick in range(6)} == {"balanced-1"}


def test_an_old_latency_is_ignored() -> None:
    endpoint_table = plane(endpoint("balanced-0"))
    load = endpoint_table.by_endpoint_id["balanced-0"]
    load.ttft_s, load.sampled_s, endpoint_table.pools[1].ttft_s = 9.0, NOW_S - 31, 1.0
    assert scorers.latency(load, NOW_S, endpoint_table.settings) == scorers.NEUTRAL
    load.sampled_s = NOW_S
    assert scorers.latency(load, NOW_S, endpoint_table.settings) == pytest.approx(0.1)


def test_a_session_stays_with_its_endpoint_and_moves_only_if_that_goes() -> None:
    endpoints = [endpoint(f"balanced-{i}", concurrency_limit=10) for i in range(5)]
    endpoint_table = plane(*endpoints)
    homes = {key: chosen(RouteRequest(session_key=key), endpoint_table, pick=key) for key in range(200)}
    assert len(set(homes.values())) == 5
    endpoint_table.apply(endpoints[1:])
    for key, name in homes.items():
        now = chosen(RouteRequest(session_key=key), endpoint_table, pick=key + 1)
        assert (now == name) or name == "balanced-0"


def test_the_prefix_counts_if_there_is_no_session() -> None:
    endpoint_table = plane(*(endpoint(f"balanced-{i}") for i in range(5)))
    by_prefix = [chosen(RouteRequest(prefix_key=key), endpoint_table, 3) for key in range(20)]
    assert by_prefix == [chosen(RouteRequest(session_key=key), endpoint_table, 3) for key in range(20)]
    mixed = [chosen(RouteRequest(session_key=7, prefix_key=key), endpoint_table, 3) for key in range(20)]
    assert len(set(mixed)) == 1


@pytest.mark.parametrize(
    "overload",
    [
        pytest.param(lambda load: [load.begin(NOW_S) for _ in range(5)], id="many in flight"),
        pytest.param(lambda load: load.observe(NOW_S, kv_usage_ratio=0.95, waiting=0), id="KV cache"),
        pytest.param(lambda load: load.observe(NOW_S, kv_usage_ratio=0.1, waiting=1), id="queue"),
        pytest.param(lambda load: load.observe(NOW_S - 60, kv_usage_ratio=0.1, waiting=0), id="stale"),
    ],
)
def test_affinity_never_overrules_overload(overload: Any) -> None:
    endpoint_table = plane(*(endpoint(f"balanced-{i}", concurrency_limit=10) for i in range(2)))
    for load in endpoint_table.by_endpoint_id.values():
        load.observe(NOW_S, kv_usage_ratio=0.1, waiting=0)
    request = RouteRequest(session_key=12)
    before = chosen(request, endpoint_table)
    overload(endpoint_table.by_endpoint_id[before])
    assert chosen(request, endpoint_table) != before


def test_affinity_accepts_a_little_more_load() -> None:
    endpoint_table = plane(*(endpoint(f"balanced-{i}", concurrency_limit=10) for i in range(2)))
    request = RouteRequest(session_key=12)
    before = chosen(request, endpoint_table)
    endpoint_table.by_endpoint_id[before].begin(NOW_S)
    assert chosen(request, endpoint_table) == before


def test_a_full_tier_spills_to_the_least_loaded_that_the_policy_allows() -> None:
    endpoint_table = plane(
        endpoint("lightweight-0"), endpoint("balanced-0"), endpoint("capable-0", concurrency_limit=10)
    )
    fill(endpoint_table.by_endpoint_id["lightweight-0"])
    fill(endpoint_table.by_endpoint_id["balanced-0"], 1)
    fill(endpoint_table.by_endpoint_id["capable-0"], 2)
    decision = decide(RouteRequest(model="lightweight"), endpoint_table, NOW_S, 0)
    assert (decision.tier, decision.overflow) == ("capable", Overflow.SPILL)
    assert decision.wanted_tier == "lightweight"
    assert decision.reason == "model=lightweight; spill: lightweight -> capable"


@pytest.mark.parametrize(
    ("spill", "tier"),
    [
        (OverflowDirection.UP, "capable"),
        (OverflowDirection.DOWN, "lightweight"),
        (OverflowDirection.NONE, None),
    ],
)
def test_spilling_goes_where_the_policy_says(spill: OverflowDirection, tier: str | None) -> None:
    endpoint_table = plane(
        endpoint("lightweight-0"), endpoint("balanced-0"), endpoint("capable-0"), spill=spill
    )
    fill(endpoint_table.by_endpoint_id["balanced-0"])
    decision = decide(BALANCED, endpoint_table, NOW_S, 0)
    if tier is None:
        assert (decision.outcome, decision.reason) == (RouteOutcome.QUEUE, "model=balanced; balanced full")
    else:
        assert decision.tier == tier


def test_a_floor_forbids_going_down() -> None:
    endpoint_table = plane(endpoint("lightweight-0"), endpoint("balanced-0"), spill=OverflowDirection.BOTH)
    fill(endpoint_table.by_endpoint_id["balanced-0"])
    assert decide(BALANCED, endpoint_table, NOW_S, 0).tier == "lightweight"
    floored = decide(BALANCED._replace(min_tier="balanced"), endpoint_table, NOW_S, 0)
    assert (floored.outcome, floored.tiers) == (RouteOutcome.QUEUE, (1, 2))


@pytest.mark.parametrize("state", [EndpointState.RESTARTING, EndpointState.STARTING, EndpointState.DRAINING])
def test_a_tier_that_is_down_is_bridged_and_gets_its_traffic_back(state: EndpointState) -> None:
    endpoint_table = plane(endpoint("lightweight-0", state=state), endpoint("balanced-0"))
    decision = decide(RouteRequest(model="lightweight"), endpoint_table, NOW_S, 0)
    assert (decision.tier, decision.overflow) == ("balanced", Overflow.BRIDGE)
    assert decision.wanted_tier == "lightweight"
    assert decision.reason == f"model=lightweight; bridge: lightweight {state}"
    endpoint_table.apply([endpoint("lightweight-0", generation=2), endpoint("balanced-0")])
    decision = decide(RouteRequest(model="lightweight"), endpoint_table, NOW_S, 0)
    assert (decision.tier, decision.reason) == ("lightweight", "model=lightweight")


def test_bridging_takes_the_nearest_neighbour_and_the_better_of_two_as_near() -> None:
    endpoint_table = plane(
        endpoint("lightweight-0"),
        endpoint("balanced-0", state=EndpointState.RESTARTING),
        endpoint("capable-0"),
    )
    assert decide(BALANCED, endpoint_table, NOW_S, 0).tier == "capable"
    fill(endpoint_table.by_endpoint_id["capable-0"])
    assert decide(BALANCED, endpoint_table, NOW_S, 0).tier == "lightweight"


def test_no_bridge_without_the_policy() -> None:
    endpoint_table = plane(
        endpoint("lightweight-0", state=EndpointState.RESTARTING),
        endpoint("balanced-0"),
        spill=OverflowDirection.NONE,
    )
    decision = decide(RouteRequest(model="lightweight"), endpoint_table, NOW_S, 0)
    assert (decision.outcome, decision.reason) == (
        RouteOutcome.QUEUE,
        "model=lightweight; lightweight restarting",
    )


def test_open_breakers_bridge_and_one_probe_goes_through_later() -> None:
    endpoint_table = plane(endpoint("lightweight-0"), endpoint("balanced-0"))
    load = endpoint_table.by_endpoint_id["lightweight-0"]
    load.begin(NOW_S).fail(NOW_S, weight=3)
    decision = decide(RouteRequest(model="lightweight"), endpoint_table, NOW_S, 0)
    assert decision.reason == "model=lightweight; bridge: lightweight fails"
    later_s = load.breaker.blocked_until_s
    assert later_s == NOW_S + 1.0
    decision = decide(RouteRequest(model="lightweight"), endpoint_table, later_s, 0)
    assert decision.load is load
    load.begin(later_s)
    assert decide(RouteRequest(model="lightweight"), endpoint_table, later_s, 0).tier == "balanced"


def test_a_list_takes_the_first_with_room_and_else_waits_for_any() -> None:
    endpoint_table = plane(endpoint("capable-0"), endpoint("lightweight-0"), endpoint("balanced-0"))
    request = RouteRequest(models=("capable", "lightweight"))
    assert decide(request, endpoint_table, NOW_S, 0).reason == "models[0]=capable"
    fill(endpoint_table.by_endpoint_id["capable-0"])
    assert decide(request, endpoint_table, NOW_S, 0).reason == "models[1]=lightweight"
    fill(endpoint_table.by_endpoint_id["lightweight-0"])
    decision = decide(request, endpoint_table, NOW_S, 0)
    assert (decision.outcome, decision.tiers) == (RouteOutcome.QUEUE, (2, 0)), "balanced was not asked for"


def test_an_endpoint_that_was_tried_is_excluded_until_it_is_a_new_process() -> None:
    endpoint_table = plane(endpoint("balanced-0"), endpoint("balanced-1"), spill=OverflowDirection.NONE)
    first = endpoint_table.by_endpoint_id["balanced-0"]
    request = BALANCED._replace(exclude=frozenset({first.key}))
    assert {chosen(request, endpoint_table, pick) for pick in range(4)} == {"balanced-1"}
    both = BALANCED._replace(exclude=frozenset({first.key, endpoint_table.by_endpoint_id["balanced-1"].key}))
    decision = decide(both, endpoint_table, NOW_S, 0)
    assert (decision.outcome, decision.refusal) == (RouteOutcome.REJECT, RouteRefusal.EXHAUSTED)
    endpoint_table.apply([endpoint("balanced-0", state=EndpointState.RESTARTING), endpoint("balanced-1")])
    assert decide(both, endpoint_table, NOW_S, 0).outcome is RouteOutcome.QUEUE
    endpoint_table.apply([endpoint("balanced-0", generation=2), endpoint("balanced-1")])
    assert chosen(both, endpoint_table) == "balanced-0"


def test_a_request_that_tried_every_endpoint_of_its_tier_is_bridged() -> None:
    endpoint_table = plane(endpoint("balanced-0"), endpoint("capable-0"))
    request = BALANCED._replace(exclude=frozenset({endpoint_table.by_endpoint_id["balanced-0"].key}))
    assert decide(request, endpoint_table, NOW_S, 0).reason == "model=balanced; bridge: balanced tried"


def test_a_tier_whose_engines_all_gave_up_is_bridged_or_refused_with_the_diagnosis() -> None:
    failed = endpoint("balanced-0", state=EndpointState.FAILED, diagnosis="out of memory")
    endpoint_table = plane(failed, endpoint("capable-0"))
    assert decide(BALANCED, endpoint_table, NOW_S, 0).reason == "model=balanced; bridge: balanced failed"
    endpoint_table = plane(failed, spill=OverflowDirection.NONE)
    decision = decide(BALANCED, endpoint_table, NOW_S, 0)
    assert (decision.refusal, decision.message) == (
        RouteRefusal.FAILED,
        "all endpoints of balanced failed: out of memory",
    )


def test_a_tier_without_endpoints_may_be_starting_so_the_request_waits() -> None:
    endpoint_table = plane(spill=OverflowDirection.NONE)
    decision = decide(BALANCED, endpoint_table, NOW_S, 0)
    assert (decision.outcome, decision.reason) == (
        RouteOutcome.QUEUE,
        "model=balanced; balanced has no endpoint",
    )


def test_the_api_is_a_filter() -> None:
    endpoint_table = plane(endpoint("balanced-0"), endpoint("capable-0", capabilities=ALL))
    decision = decide(RouteRequest(api=Api.MESSAGES), endpoint_table, NOW_S, 0)
    assert decision.reason == "default; bridge: balanced does not serve messages"
    pinned = decide(RouteRequest(model="balanced-model", api=Api.MESSAGES), endpoint_table, NOW_S, 0)
    assert (pinned.refusal, pinned.message) == (
        RouteRefusal.NO_CAPABILITY,
        "no engine of balanced serves messages",
    )


def test_embeddings_never_change_the_model_by_load() -> None:
    endpoint_table = plane(
        endpoint("lightweight-0", capabilities=ALL),
        endpoint("balanced-0"),
        endpoint("capable-0", capabilities=ALL),
    )
    request = RouteRequest(api=Api.EMBEDDINGS)
    decision = decide(request, endpoint_table, NOW_S, 0)
    assert (decision.tier, decision.reason) == ("lightweight", "serves embeddings")
    fill(endpoint_table.by_endpoint_id["lightweight-0"])
    assert decide(request, endpoint_table, NOW_S, 0).outcome is RouteOutcome.QUEUE
    named = decide(request._replace(model="balanced"), endpoint_table, NOW_S, 0)
    assert named.refusal is RouteRefusal.NO_CAPABILITY
    floored = decide(request._replace(min_tier="balanced"), endpoint_table, NOW_S, 0)
    assert floored.tier == "capable"


def test_the_last_slots_are_for_high_priority_while_there_is_any() -> None:
    endpoint_table = plane(endpoint("balanced-0", concurrency_limit=10), spill=OverflowDirection.NONE)
    fill(endpoint_table.by_endpoint_id["balanced-0"], 9)
    assert decide(BALANCED, endpoint_table, NOW_S, 0).outcome is RouteOutcome.SEND
    endpoint_table.high_seen_s = NOW_S - 1.0
    assert decide(BALANCED, endpoint_table, NOW_S, 0).outcome is RouteOutcome.QUEUE
    high = BALANCED._replace(priority=Priority.HIGH)
    assert decide(high, endpoint_table, NOW_S, 0).outcome is RouteOutcome.SEND
    explained = explain(BALANCED, endpoint_table, NOW_S, 0)
    assert explained.candidates[0].left_out == ("its last 1 slots are reserved for high priority",)


def test_an_unknown_model_is_rejected() -> None:
    endpoint_table = plane(endpoint("balanced-0"))
    decision = decide(RouteRequest(model="nope"), endpoint_table, NOW_S, 0)
    assert (decision.outcome, decision.refusal) == (RouteOutcome.REJECT, RouteRefusal.UNKNOWN_MODEL)
    assert (
        explain(RouteRequest(model="nope"), endpoint_table, NOW_S, 0)
        .candidates[0]
        .left_out[0]
        .startswith("no model")
    )


def test_an_explanation_says_why_each_endpoint_was_left_out() -> None:
    endpoint_table = plane(
        endpoint("lightweight-0"),
        endpoint("balanced-0", state=EndpointState.STARTING, phase="loading weights"),
        endpoint("balanced-1"),
        endpoint("balanced-2"),
        endpoint("balanced-3"),
        endpoint("balanced-4"),
        endpoint("capable-0"),
    )
    fill(endpoint_table.by_endpoint_id["balanced-1"])
    endpoint_table.by_endpoint_id["balanced-2"].begin(NOW_S).fail(NOW_S, weight=3)
    request = BALANCED._replace(exclude=frozenset({"balanced-3#1"}), session_key=5)
    explanation = explain(request, endpoint_table, NOW_S, 0)
    left_out = {candidate.endpoint_id: candidate.left_out for candidate in explanation.candidates}
    assert left_out == {
        "lightweight-0": ("not needed: balanced has room",),
        "balanced-0": ("starting (loading weights)",),
        "balanced-1": ("at its limit: 2 of 2 in flight",),
        "balanced-2": ("breaker open for 1.0 s",),
        "balanced-3": ("already tried for this request",),
        "balanced-4": (),
        "capable-0": ("not needed: balanced has room",),
    }
    taken = next(c for c in explanation.candidates if c.endpoint_id == "balanced-4")
    assert explanation.decision.load is endpoint_table.by_endpoint_id["balanced-4"]
    assert taken.home
    assert taken.scores.keys() == scorers.WEIGHTS.keys()
    weighted = sum(scorers.WEIGHTS[name] * value for name, value in taken.scores.items())
    assert taken.score == pytest.approx(weighted / sum(scorers.WEIGHTS.values()))


def test_an_explanation_of_a_bridge_leaves_out_the_tiers_that_only_take_overflow() -> None:
    endpoint_table = plane(
        endpoint("lightweight-0"), spill=OverflowDirection.DOWN, bridge=OverflowDirection.UP
    )
    decision, _, (candidate,) = explain(BALANCED, endpoint_table, NOW_S, 0)
    assert decision.outcome is RouteOutcome.QUEUE
    assert candidate.left_out == (
        "tier 'lightweight' only takes what balanced has no room for, and balanced is down",
    )


def test_an_explanation_of_a_spill_leaves_out_the_tiers_that_only_bridge() -> None:
    endpoint_table = plane(endpoint("lightweight-0"), endpoint("balanced-0"), endpoint("capable-0"))
    fill(endpoint_table.by_endpoint_id["balanced-0"])
    left_out = [candidate.left_out for candidate in explain(BALANCED, endpoint_table, NOW_S, 0).candidates]
    assert left_out == [
        ("tier 'lightweight' only bridges balanced, which is not down",),
        ("at its limit: 2 of 2 in flight",),
        (),
    ]


@pytest.mark.parametrize(
    ("request_fields", "says"),
    [
        ({"model": "balanced", "min_tier": "balanced"}, "tier 'lightweight' is below the quality floor"),
        (
            {"model": "balanced-model"},
            "tier 'lightweight' is not asked for and 'balanced' does not spill to it",
        ),
    ],
)
def test_an_explanation_says_why_a_tier_is_not_open_to_a_request(
    request_fields: dict[str, Any], says: str
) -> None:
    endpoint_table = plane(endpoint("lightweight-0"), endpoint("balanced-0"))
    explanation = explain(RouteRequest(**request_fields), endpoint_table, NOW_S, 0)
    assert explanation.candidates[0].left_out == (says,)
