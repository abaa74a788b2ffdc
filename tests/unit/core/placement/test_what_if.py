"""Changed copies of a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang, GangShape
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.revalidation import revalidate
from controlplane.core.placement.topology import Gpu, Node, islands
from controlplane.core.placement.what_if import add_node, change, lose_node

NODE = Node(
    "a",
    tuple(Gpu(f"a/{i}", i, "M", nvlink_peers=frozenset({"a/0", "a/1"})) for i in range(2)),
    8000,
    100,
    node_type="kind",
)
STATE = PlacedCluster((NODE, replace(NODE, node_id="b", gpus=(Gpu("b/0", 0, "M"), Gpu("b/1", 1, "M")))))


def gangs(count: int) -> list[Gang]:
    return [Gang(f"t-{i}", GangShape(), "t") for i in range(count)]


def test_a_lost_node_moves_only_its_gangs() -> None:
    before = plan(STATE, gangs(3))
    after = lose_node(STATE, "a")
    assert [node.node_id for node in after.nodes] == ["b"]
    found = change(after, before, gangs(3))
    ran_on_b = {p.gang.gang_id for p in before.placements if p.node_ids == ("b",)}
    assert set(found.unchanged) == ran_on_b
    assert len(found.moved) + len(found.lost) == 3 - len(ran_on_b)
    assert len(found.plan.placements) == 2
    assert len(found.lost) == 1
    assert (found.added, found.removed) == ((), ())
    assert revalidate(found.plan.placements, after) == ()
    with pytest.raises(KeyError):
        lose_node(STATE, "c")


def test_an_added_node_is_usable_and_takes_gangs_that_did_not_fit() -> None:
    broken = replace(NODE, unavailable="gone", gpus=tuple(replace(g, unavailable="x") for g in NODE.gpus))
    state = add_node(add_node(PlacedCluster((broken,)), broken), broken)
    assert [node.node_id for node in state.nodes] == ["a", "kind-new0", "kind-new1"]
    new = state.nodes[1]
    assert not new.unavailable
    assert not any(gpu.unavailable for gpu in new.gpus)
    assert islands(new.gpus) == ((0, 1),)
    before = plan(STATE, gangs(5))
    assert not before.complete
    found = change(add_node(STATE, NODE), before, gangs(5))
    assert found.plan.complete
    assert len(found.unchanged) == 4
    assert len(found.added) == 1


def test_scaling_adds_and_removes_gangs() -> None:
    before = plan(STATE, gangs(2))
    assert change(STATE, before, gangs(3)).added == ("t-2",)
    fewer = change(STATE, before, gangs(1))
    assert (fewer.removed, fewer.unchanged, fewer.moved) == (("t-1",), ("t-0",), ())


def test_gangs_leave_a_draining_node() -> None:
    before = plan(STATE, gangs(1))
    drained = before.placements[0].node_ids[0]
    state = PlacedCluster(
        tuple(replace(n, unavailable="draining") if n.node_id == drained else n for n in STATE.nodes)
    )
    assert change(state, before, gangs(1)).moved == ("t-0",)
