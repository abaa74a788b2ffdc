"""Which GPUs a lease gets, and whether there is room for one more replica."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.gpus.allocation import choose_gpus, parts_of, room_on, running_placements
from controlplane.core.gpus.leases import (
    GpuCapacity,
    GpuLease,
    GpuPart,
    LeaseOutcome,
    LeaseTable,
)
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape, Infeasible, Placement, RefusalCause
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.revalidation import revalidate
from controlplane.core.placement.topology import Distance
from tests.support.nodes import make_node

GIB = 1024**3


def lease(holder: str, node_id: str, *gpus: int, milli: int = 1000, memory_bytes: int = 0) -> GpuLease:
    parts = tuple(GpuPart(f"{node_id}/{i}", milli, memory_bytes) for i in gpus)
    return GpuLease(holder, 1, node_id, parts, 0.0)


def chosen(found: Placement | Infeasible) -> tuple[str, ...]:
    assert isinstance(found, Placement), found.why
    return found.gpu_uuids


def test_gpus_of_one_island_are_taken_though_others_come_first() -> None:
    node = make_node("n", island=4)
    found = choose_gpus(node, GangShape(gpus=4), [lease("a", "n", 0)])
    assert chosen(found) == ("n/4", "n/5", "n/6", "n/7")
    assert isinstance(found, Placement)
    assert found.distance is Distance.ISLAND
    assert found.why.startswith("in one NVLink island")


def test_without_links_they_are_on_one_numa_node() -> None:
    found = choose_gpus(make_node("n"), GangShape(gpus=3), [lease("a", "n", 0, 1)])
    assert chosen(found) == ("n/4", "n/5", "n/6")


def test_a_single_gpu_leaves_the_whole_island_alone() -> None:
    node = make_node("n", island=4)
    others = [lease("a", "n", 0), lease("b", "elsewhere", 0, 1, 2, 3)]
    assert chosen(choose_gpus(node, GangShape(), others))[0] in {"n/1", "n/2", "n/3"}


def test_shares_fill_a_gpu_that_is_begun_and_never_one_that_is_held_whole() -> None:
    node = make_node("n", gpus=3)
    leases = [lease("a", "n", 0), lease("b", "n", 1, milli=500)]
    assert chosen(choose_gpus(node, GangShape(milli_gpu=500), leases)) == ("n/1",)
    assert chosen(choose_gpus(node, GangShape(milli_gpu=600), leases)) == ("n/2",)


def test_each_stage_has_an_island_of_its_own() -> None:
    node = make_node("n", island=2)
    assert chosen(choose_gpus(node, GangShape(gpus=2, stages=2), [lease("a", "n", 0)])) == (
        "n/2",
        "n/3",
        "n/4",
        "n/5",
    )


def test_what_ray_counts_is_not_counted_again() -> None:
    node = replace(make_node("n"), cpu_milli=0, memory_bytes=0)
    assert chosen(choose_gpus(node, GangShape(cpu_milli=8000, memory_bytes=GIB))) == ("n/0",)


def test_leases_of_other_nodes_and_of_gpus_that_are_gone_do_not_matter() -> None:
    node = make_node("n", gpus=1)
    leases = [lease("a", "elsewhere", 0), lease("b", "n", 7)]
    assert chosen(choose_gpus(node, GangShape(), leases)) == ("n/0",)


def test_a_refusal_says_what_the_node_lacks() -> None:
    node = make_node("n", gpus=2)
    cordoned = replace(node, gpus=(replace(node.gpus[0], unavailable="cordoned: XID 79"), *node.gpus[1:]))
    found = choose_gpus(cordoned, GangShape(gpus=2))
    assert isinstance(found, Infeasible)
    assert [refusal.cause for refusal in found.refusals] == [RefusalCause.GPU_UNAVAILABLE]
    assert "XID 79" in str(found.refusals[0])


def test_room_for_one_more_is_away_from_its_tier() -> None:
    nodes = [make_node(name, gpus=2) for name in ("n0", "n1", "n2")]
    leases = [lease("small-a", "n0", 0), lease("small-b", "n1", 0)]
    tiers = {"small-a": "small", "small-b": "small"}
    first = room_on(nodes, GangShape(), leases, tier="small", tiers=tiers)
    assert chosen(first)[0].startswith("n2/")
    second = room_on(nodes[1:2], GangShape(), leases, tier="small", tiers=tiers)
    assert chosen(second) == ("n1/1",)
    none = room_on(nodes[:2], GangShape(gpus=2), leases, tier="small", tiers=tiers)
    assert isinstance(none, Infeasible)
    assert {str(refusal) for refusal in none.refusals} == {
        "n0: needs 2 free GPUs, has 1",
        "n1: needs 2 free GPUs, has 1",
    }


def test_a_replica_with_several_gpus_counts_once_for_its_tier() -> None:
    placements = running_placements([lease("a", "n", 0, 1, 2)], {"a": "big"})
    assert [placement.gang.tier for placement in placements] == ["big", "", ""]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([250, 500, 1000])), max_size=12),
    st.sampled_from([0, 2, 4]),
)
def test_the_lease_table_grants_whatever_is_chosen(requests: list[tuple[int, int]], island: int) -> None:
    node = make_node("n", island=island, memory_gib=80)
    table = LeaseTable()
    capacities = {gpu.uuid: GpuCapacity(gpu.uuid, "n", gpu.memory_bytes) for gpu in node.gpus}
    for number, (gpus, milli) in enumerate(requests):
        shape = (
            GangShape(gpus=gpus) if milli == 1000 else GangShape(milli_gpu=milli, gpu_memory_bytes=10 * GIB)
        )
        found = choose_gpus(node, shape, table.leases.values())
        if isinstance(found, Placement):
            now = PlacedCluster((node,), running_placements(table.leases.values()))
            assert revalidate([found], now) == ()
            granted = table.acquire(f"r{number}", parts_of(found), capacities, generation=1, now_s=0.0)
            assert granted.outcome is LeaseOutcome.GRANTED, granted.reason
        else:
            free = [WHOLE_MILLI - table.used(uuid)[0] for uuid in capacities]
            assert sum(milli >= shape.milli_gpu for milli in free) < shape.gpus
