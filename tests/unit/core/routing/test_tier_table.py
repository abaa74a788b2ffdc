"""Which tiers a request may go to."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.core.domain.endpoint import Capabilities
from controlplane.core.domain.request import Complexity
from controlplane.core.routing.tier_table import (
    ALL_INPUTS,
    API_BITS,
    INPUT_BITS,
    Api,
    Input,
    OverflowDirection,
    RouteRefusal,
    RouteRequest,
    TierPolicy,
    TierTable,
    api_bits,
    resolve,
    resume_route,
)

THREE = TierTable.build(
    [
        TierPolicy("lightweight", "small", agent_types=("faq",)),
        TierPolicy("balanced", "medium"),
        TierPolicy("capable", "large"),
    ]
)


def names(table: TierTable, ranks: tuple[int, ...]) -> list[str]:
    return [table.policies[rank].name for rank in ranks]


@pytest.mark.parametrize(
    ("request_fields", "tier", "reason"),
    [
        ({}, "balanced", "default"),
        ({"model": "capable"}, "capable", "model=capable"),
        ({"model": "small"}, "lightweight", "model=small"),
        ({"complexity": Complexity.SIMPLE}, "lightweight", "complexity=simple"),
        ({"complexity": Complexity.MODERATE}, "balanced", "complexity=moderate"),
        ({"complexity": Complexity.COMPLEX}, "capable", "complexity=complex"),
        ({"agent_type": "faq"}, "lightweight", "agent_type=faq"),
        ({"agent_type": "unheard_of"}, "balanced", "default"),
        ({"complexity": Complexity.COMPLEX, "agent_type": "faq"}, "capable", "complexity=complex"),
        ({"model": "balanced", "complexity": Complexity.COMPLEX}, "balanced", "model=balanced"),
        (
            {"complexity": Complexity.SIMPLE, "min_tier": "capable"},
            "capable",
            "complexity=simple, min_tier=capable",
        ),
        ({"model": "capable", "min_tier": "balanced"}, "capable", "model=capable"),
        ({"models": ("large", "lightweight"), "model": "nonsense"}, "capable", "models[0]=large"),
        ({"models": ("gone", "lightweight")}, "lightweight", "models[1]=lightweight"),
        ({"models": ("auto",)}, "balanced", "models[0]=auto"),
    ],
)
def test_the_first_tier(request_fields: dict[str, Any], tier: str, reason: str) -> None:
    route = resolve(RouteRequest(**request_fields), THREE)
    assert route.refusal is None
    assert (THREE.policies[route.order[0]].name, route.reasons[0]) == (tier, reason)


def test_a_list_keeps_its_order_and_goes_nowhere_else() -> None:
    route = resolve(RouteRequest(models=("large", "lightweight", "capable")), THREE)
    assert names(THREE, route.order) == ["capable", "lightweight"]
    assert route.spill == route.bridge == ()


def test_a_request_for_a_model_id_never_spills_but_one_for_a_tier_may() -> None:
    assert resolve(RouteRequest(model="small"), THREE).spill == ()
    assert names(THREE, resolve(RouteRequest(model="lightweight"), THREE).spill) == ["balanced", "capable"]


@pytest.mark.parametrize(
    ("request_fields", "refusal", "says"),
    [
        ({"model": "gpt-5"}, RouteRefusal.UNKNOWN_MODEL, "no model 'gpt-5': there is auto, lightweight"),
        ({"models": ("a", "b")}, RouteRefusal.UNKNOWN_MODEL, "no model 'a', 'b'"),
        ({"min_tier": "huge"}, RouteRefusal.UNKNOWN_TIER, "no tier 'huge' for x-min-tier"),
        ({"model": "small", "min_tier": "balanced"}, RouteRefusal.BELOW_FLOOR, "model 'small' is below"),
        ({"models": ("small",), "min_tier": "balanced"}, RouteRefusal.BELOW_FLOOR, "every model asked for"),
    ],
)
def test_refusals(request_fields: dict[str, Any], refusal: RouteRefusal, says: str) -> None:
    route = resolve(RouteRequest(**request_fields), THREE)
    assert route.refusal is refusal
    assert says in route.message


def test_a_list_leaves_out_what_is_below_the_floor() -> None:
    route = resolve(RouteRequest(models=("small", "large"), min_tier="balanced"), THREE)
    assert names(THREE, route.order) == ["capable"]


@pytest.mark.parametrize(
    ("spill", "bridge", "floor", "spills", "bridges"),
    [
        (OverflowDirection.UP, None, None, ["c", "d"], ["c", "a", "d"]),
        (OverflowDirection.DOWN, None, None, ["a"], ["c", "a", "d"]),
        (OverflowDirection.BOTH, OverflowDirection.UP, None, ["c", "a", "d"], ["c", "d"]),
        (OverflowDirection.NONE, None, None, [], []),
        (OverflowDirection.NONE, OverflowDirection.DOWN, None, [], ["a"]),
        (OverflowDirection.BOTH, OverflowDirection.BOTH, "b", ["c", "d"], ["c", "d"]),
    ],
)
def test_neighbours(
    spill: OverflowDirection,
    bridge: OverflowDirection | None,
    floor: str | None,
    spills: list[str],
    bridges: list[str],
) -> None:
    table = TierTable.build(
        [
            TierPolicy("a", "m0"),
            TierPolicy("b", "m1", spill=spill, bridge=bridge, floor=floor),
            TierPolicy("c", "m2"),
            TierPolicy("d", "m3"),
        ]
    )
    route = resolve(RouteRequest(model="b"), table)
    assert (names(table, route.spill), names(table, route.bridge)) == (spills, bridges)


def test_complexities_that_no_tier_claims_go_higher_rather_than_lower() -> None:
    table = TierTable.build(
        [
            TierPolicy("a", "m0", complexities=(Complexity.SIMPLE,)),
            TierPolicy("b", "m1", complexities=(Complexity.COMPLEX,)),
        ]
    )
    assert table.tier_of_complexity[Complexity.MODERATE] == 1
    table = TierTable.build([TierPolicy("a", "m0", complexities=(Complexity.SIMPLE,)), TierPolicy("b", "m1")])
    assert set(table.tier_of_complexity.values()) == {0}


def test_complexities_by_rank_if_no_tier_claims_any_and_never_to_special_tiers() -> None:
    table = TierTable.build(
        [TierPolicy("sql", "m0", agent_types=("sql",)), TierPolicy("a", "m1"), TierPolicy("b", "m2")]
    )
    assert [table.tier_of_complexity[level] for level in Complexity] == [1, 2, 2]
    special = TierTable.build([TierPolicy("customer_service", "m0"), TierPolicy("technical_support", "m1")])
    assert special.tier_of_complexity == {}
    assert resolve(RouteRequest(complexity=Complexity.COMPLEX), special).reasons == ("default",)


def test_agent_types_have_default_tiers_where_such_tiers_exist() -> None:
    table = TierTable.build(
        [
            TierPolicy("customer_service", "m0"),
            TierPolicy("technical_support", "m1", agent_types=("general",)),
            TierPolicy("general_purpose", "m2"),
        ]
    )
    chosen = {
        agent: table.policies[resolve(RouteRequest(agent_type=agent), table).order[0]].name
        for agent in ("customer_service", "technical", "general")
    }
    assert chosen == {
        "customer_service": "customer_service",
        "technical": "technical_support",
        "general": "technical_support",
    }


def test_a_model_in_two_tiers_and_resuming_with_the_same_model() -> None:
    table = TierTable.build([TierPolicy("a", "m"), TierPolicy("b", "n"), TierPolicy("c", "m")])
    assert resolve(RouteRequest(model="m"), table).order == (0, 2)
    assert resume_route(table, 2).order == (2, 0)
    assert resume_route(table, 1).order == (1,)


@pytest.mark.parametrize(
    ("policies", "default", "says"),
    [
        ([], None, "at least one"),
        ([TierPolicy("a", "m"), TierPolicy("a", "n")], None, "same name"),
        ([TierPolicy("auto", "m")], None, "can't be a tier's name"),
        ([TierPolicy("a", "m", floor="z")], None, "floor 'z' is not a tier"),
        ([TierPolicy("a", "m")], "z", "default tier 'z' is not a tier"),
    ],
)
def test_invalid_tables(policies: list[TierPolicy], default: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TierTable.build(policies, default)


def test_the_first_tier_is_the_default_without_a_balanced_one() -> None:
    assert TierTable.build([TierPolicy("a", "m"), TierPolicy("b", "n")]).default == 0
    assert TierTable.build([TierPolicy("a", "m"), TierPolicy("b", "n")], "b").default == 1


def test_capabilities_are_bits() -> None:
    assert api_bits(Capabilities()) == API_BITS[Api.CHAT] | API_BITS[Api.COMPLETIONS] | ALL_INPUTS
    everything = api_bits(Capabilities(embeddings=True, responses=True, messages=True))
    assert everything == sum(API_BITS.values()) + sum(INPUT_BITS.values())
    no_images = api_bits(Capabilities(images=False))
    assert api_bits(Capabilities()) - no_images == INPUT_BITS[Input.IMAGES]
