"""Where gangs go, on fleets small enough to know the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import (
    Gang,
    GangShape,
    GangStage,
    Infeasible,
    NodeRefusal,
    Placement,
    RefusalCause,
)
from controlplane.core.placement.planner import PlacedCluster, Planner, demand_of
from controlplane.core.placement.revalidation import revalidate
from controlplane.core.placement.topology import Distance, Gpu, Node
from tests.support.nodes import GIB, make_node


def place(state: PlacedCluster, *gangs: Gang) -> list[Placement | Infeasible]:
    planner = Planner(state, demand_of(gang.shape for gang in gangs))
    return [planner.place(gang) for gang in gangs]


def placed(result: Placement | Infeasible) -> Placement:
    assert isinstance(result, Placement), result.why
    return result


def refused(result: Placement | Infeasible) -> Infeasible:
    assert isinstance(result, Infeasible)
    return result


def cluster(*nodes: Node) -> PlacedCluster:
    return PlacedCluster(nodes)


def test_tensor_parallel_goes_into_an_island_before_a_numa_node_before_a_node() -> None:
    # n0 has pairs only, n1 has islands of four.
    state = cluster(make_node("n0", island=2), make_node("n1", island=4))
    shape = GangShape(gpus=4, gpu_memory_bytes=40 * GIB)
    results = [placed(a) for a in place(state, *(Gang(f"g{i}", shape) for i in range(4)))]
    assert [a.distance for a in results] == [
        Distance.ISLAND,
        Distance.ISLAND,
        Distance.NUMA,
        Distance.NUMA,
    ]
    assert [a.node_ids for a in results] == [("n1",), ("n1",), ("n0",), ("n0",)]
    assert placed(place(cluster(make_node("n0")), Gang("g", GangShape(gpus=8)))[0]).distance is Distance.NODE


def test_pairs_share_an_island_so_that_another_stays_whole() -> None:
    state = cluster(make_node("n0", island=4))
    small, large = GangShape(gpus=2), GangShape(gpus=4)
    planner = Planner(state, demand_of([small, large]))
    for i in range(2):
        assert placed(planner.place(Gang(f"small{i}", small))).distance is Distance.ISLAND
    assert placed(planner.place(Gang("large", large))).distance is Distance.ISLAND


def test_shares_fill_up_one_gpu_and_memory_counts() -> None:
    state = cluster(make_node("n0", gpus=2), make_node("n1", gpus=2))
    half = GangShape(milli_gpu=500, gpu_memory_bytes=20 * GIB)
    results = [placed(a) for a in place(state, *(Gang(f"g{i}", half) for i in range(4)))]
    assert len({a.gpu_uuids for a in results}) == 2
    heavy = replace(half, milli_gpu=100, gpu_memory_bytes=50 * GIB)
    first, second = (placed(a) for a in place(state, Gang("a", heavy), Gang("b", heavy)))
    assert first.gpu_uuids != second.gpu_uuids


def test_pipeline_stages_stay_on_one_node_unless_they_may_be_apart() -> None:
    nodes = cluster(make_node("n0", gpus=4, island=4), make_node("n1", gpus=4, island=4))
    together = GangShape(gpus=2, stages=2)
    assert placed(place(nodes, Gang("g", together))[0]).node_ids == ("n0",)
    too_large = GangShape(gpus=4, stages=2)
    result = refused(place(nodes, Gang("g", too_large))[0])
    assert {refusal.cause for refusal in result.refusals} == {RefusalCause.NO_SUCH_GPU}
    apart = placed(place(nodes, Gang("g", replace(too_large, across_nodes=True)))[0])
    assert apart.node_ids == ("n0", "n1")
    assert apart.distance is Distance.ISLAND
    assert "stages on 2 nodes" in apart.why


def test_a_gang_across_nodes_takes_nothing_if_one_stage_does_not_fit() -> None:
    planner = Planner(cluster(make_node("n0", gpus=4), make_node("n1", gpus=4)))
    shape = GangShape(gpus=4, stages=3, across_nodes=True)
    result = refused(planner.place(Gang("g", shape)))
    assert [(r.node_id, r.cause, r.needed, r.available) for r in result.refusals] == [
        ("n0", RefusalCause.STAGES, 3, 1),
        ("n1", RefusalCause.STAGES, 3, 1),
    ]
    assert placed(planner.place(Gang("h", replace(shape, stages=2)))).node_ids == ("n0", "n1")


def test_replicas_of_a_tier_are_spread_but_not_at_any_price() -> None:
    state = cluster(*(make_node(f"n{i}", gpus=4) for i in range(3)))
    shape = GangShape()
    results = [placed(a) for a in place(state, *(Gang(f"g{i}", shape, "tier") for i in range(6)))]
    assert sorted(node for a in results for node in a.node_ids) == ["n0", "n0", "n1", "n1", "n2", "n2"]
    assert [a.replicas_beside for a in results] == [0, 0, 0, 1, 1, 1]
    alone = [placed(a) for a in place(state, *(Gang(f"g{i}", shape) for i in range(4)))]
    assert len({a.node_ids for a in alone}) == 1


def test_gpu_models_by_requirement() -> None:
    state = cluster(make_node("n0", model="A"), make_node("n1", model="B"))
    assert placed(place(state, Gang("g", GangShape(models=frozenset({"B"}))))[0]).node_ids == ("n1",)
    result = refused(place(state, Gang("g", GangShape(models=frozenset({"C"}))))[0])
    assert [str(r) for r in result.refusals] == [
        "n0: needs 1 GPUs of an accepted model, has 0",
        "n1: needs 1 GPUs of an accepted model, has 0",
    ]


def test_a_gpu_model_that_other_gangs_need_is_left_to_them() -> None:
    state = cluster(make_node("n0", gpus=1, model="rare"), make_node("n1", gpus=1, model="common"))
    any_model, only_rare = GangShape(), GangShape(models=frozenset({"rare"}))
    planner = Planner(state, demand_of([any_model, only_rare]))
    assert placed(planner.place(Gang("a", any_model))).node_ids == ("n1",)
    assert placed(planner.place(Gang("b", only_rare))).node_ids == ("n0",)


@pytest.mark.parametrize(
    ("node", "shape", "expected"),
    [
        (
            replace(make_node("n"), unavailable="cordoned: maintenance"),
            GangShape(),
            NodeRefusal("n", RefusalCause.NODE_UNAVAILABLE, 0, 0, "cordoned: maintenance"),
        ),
        (make_node("n", gpus=1), GangShape(gpus=2), NodeRefusal("n", RefusalCause.NO_SUCH_GPU, 2, 1)),
        (
            replace(make_node("n", gpus=1), gpus=(Gpu("g", 3, "A", GIB, unavailable="XID 79"),)),
            GangShape(),
            NodeRefusal("n", RefusalCause.GPU_UNAVAILABLE, 1, 0, "GPU 3: XID 79"),
        ),
        (
            make_node("n", memory_gib=24),
            GangShape(gpu_memory_bytes=40 * GIB),
            NodeRefusal("n", RefusalCause.GPU_TOO_SMALL, 1, 0),
        ),
        (make_node("n", cpus=4), GangShape(cpu_milli=4500), NodeRefusal("n", RefusalCause.CPU, 4500, 4000)),
        (
            make_node("n", host_gib=4),
            GangShape(memory_bytes=5 * GIB),
            NodeRefusal("n", RefusalCause.MEMORY, 5 * GIB, 4 * GIB),
        ),
    ],
    ids=["node", "number", "unhealthy", "size", "cpu", "memory"],
)
def test_each_refusal_has_its_reason(node: Node, shape: GangShape, expected: NodeRefusal) -> None:
    result = refused(place(cluster(node), Gang("g", shape))[0])
    assert list(result.refusals) == [expected]
    assert str(expected.cause) in result.why


def test_busy_gpus_and_used_memory_are_different_causes() -> None:
    planner = Planner(cluster(make_node("n", gpus=1)))
    planner.place(Gang("a", GangShape(milli_gpu=500, gpu_memory_bytes=60 * GIB)))
    busy = refused(planner.place(Gang("b", GangShape())))
    assert busy.refusals[0] == NodeRefusal("n", RefusalCause.GPU_BUSY, 1, 0)
    full = refused(planner.place(Gang("b", GangShape(milli_gpu=500, gpu_memory_bytes=30 * GIB))))
    assert full.refusals[0] == NodeRefusal("n", RefusalCause.GPU_MEMORY, 1, 0)
    assert full.refusals[-1:] == [full.refusals[0]]


def test_running_gangs_count_and_can_be_removed() -> None:
    running = Placement(
        Gang("old", GangShape(gpus=8)), (GangStage("n0", tuple(f"n0/{i}" for i in range(8))),)
    )
    gone = Placement(Gang("lost", GangShape()), (GangStage("n9", ("n9/0",)),))
    planner = Planner(PlacedCluster((make_node("n0"),), (running, gone)))
    assert isinstance(planner.place(Gang("new", GangShape())), Infeasible)
    assert planner.remove("old") == running
    assert placed(planner.place(Gang("new", GangShape()))).node_ids == ("n0",)
    assert [p.gang.gang_id for p in planner.placements] == ["lost", "new"]
    with pytest.raises(ValueError, match="already"):
        planner.place(Gang("new", GangShape()))
    with pytest.raises(KeyError):
        planner.remove("old")


def test_results_are_in_the_order_of_the_gangs_and_large_gangs_are_placed_first() -> None:
    state = cluster(make_node("n0", gpus=4, island=4))
    gangs = [
        Gang("small", GangShape()),
        Gang("large", GangShape(gpus=4)),
        Gang("half", GangShape(milli_gpu=500)),
    ]
    result = plan(state, gangs)
    assert [p.gang.gang_id for p in result.placements] == ["large"]
    assert [i.gang.gang_id for i in result.infeasible] == ["small", "half"]
    assert not result.complete
    assert plan(state, gangs[:1]).complete
    assert plan(cluster(), gangs[:1]).infeasible[0].why == "there is no node"


def test_gangs_without_gpus_avoid_nodes_with_gpus() -> None:
    state = cluster(make_node("n0", gpus=8, cpus=32), make_node("n1", gpus=0, cpus=32))
    on_cpu, on_gpu = GangShape(gpus=0, cpu_milli=8000), GangShape(cpu_milli=4000)
    planner = Planner(state, demand_of([on_cpu, on_gpu]))
    results = [placed(planner.place(Gang(f"c{i}", on_cpu))) for i in range(5)]
    assert [a.node_ids[0] for a in results] == ["n1"] * 4 + ["n0"]
    assert results[0].stages == (GangStage("n1"),)


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": -1},
        {"stages": 0},
        {"milli_gpu": 0},
        {"milli_gpu": 1001},
        {"gpus": 2, "milli_gpu": 500},
        {"stages": 2, "milli_gpu": 500},
        {"cpu_milli": -1},
    ],
)
def test_contradictory_shapes_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        GangShape(**fields)


def test_duplicate_nodes_and_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="nodes"):
        Planner(cluster(make_node("n"), make_node("n")))
    twin = replace(make_node("m", gpus=1), gpus=(Gpu("n/0", 0),))
    with pytest.raises(ValueError, match="GPUs"):
        Planner(cluster(make_node("n", gpus=1), twin))


def test_revalidation_finds_changes_since_the_plan() -> None:
    nodes = (make_node("n0", gpus=2), make_node("n1", gpus=2))
    gangs = [
        Gang("a", GangShape(gpus=2, cpu_milli=60_000, memory_bytes=300 * GIB)),
        Gang("b", GangShape(gpus=2)),
    ]
    result = plan(PlacedCluster(nodes), gangs)
    assert revalidate(result.placements, PlacedCluster(nodes)) == ()
    a = next(p for p in result.placements if p.gang.gang_id == "a")
    where = a.node_ids[0]

    def problems(state: PlacedCluster, placement: Placement = a) -> str:
        return "; ".join(str(conflict) for conflict in revalidate([placement], state))

    def changed(**fields: Any) -> PlacedCluster:
        return PlacedCluster(
            tuple(replace(node, **fields) if node.node_id == where else node for node in nodes)
        )

    assert (
        problems(PlacedCluster(tuple(n for n in nodes if n.node_id != where))) == f"a: node {where} is gone"
    )
    assert "out of use: drained" in problems(changed(unavailable="drained"))
    assert "lacks CPUs" in problems(changed(cpu_milli=1000))
    assert "lacks memory" in problems(changed(memory_bytes=GIB))
    assert "is not on node" in problems(changed(gpus=()))
    broken = tuple(Gpu(f"{where}/{i}", i, "B", GIB, unavailable="hot") for i in range(2))
    assert "out of use: hot" in problems(changed(gpus=broken))
    picky = replace(a, gang=replace(a.gang, shape=replace(a.gang.shape, models=frozenset({"A"}))))
    assert "is a B" in problems(changed(gpus=broken), picky)
    hungry = replace(a, gang=replace(a.gang, shape=replace(a.gang.shape, gpu_memory_bytes=2 * GIB)))
    assert "lacks memory" in problems(changed(gpus=broken), hungry)
    assert problems(PlacedCluster(nodes, (a,))) == "a: it runs already"
    other = replace(a, gang=replace(a.gang, gang_id="c"))
    assert "is taken" in problems(PlacedCluster(nodes, (other,)))
    half = replace(a, stages=(GangStage(where, a.gpu_uuids[:1]),))
    assert "a stage doesn't have its 2 GPUs" in problems(PlacedCluster(nodes), half)
    twice = replace(a, stages=(GangStage(where, (a.gpu_uuids[0],) * 2),))
    assert "a GPU is used twice" in problems(PlacedCluster(nodes), twice)
    assert "0 of 1 stages" in problems(PlacedCluster(nodes), replace(a, stages=()))


def test_the_reason_names_the_next_best_node() -> None:
    state = cluster(make_node("n0", gpus=2), make_node("n1", gpus=2))
    result = placed(place(state, Gang("g", GangShape()))[0])
    assert result.runner_up == "n1"
    assert "next best n1" in result.why
    only = placed(place(cluster(make_node("n0")), Gang("g", GangShape(gpus=0)))[0])
    assert (only.runner_up, only.why) == ("", "fits")


def test_a_refusal_reports_the_free_capacity_of_its_time() -> None:
    planner = Planner(cluster(make_node("n", gpus=2)))
    placed(planner.place(Gang("a", GangShape())))
    result = refused(planner.place(Gang("b", GangShape(gpus=2))))
    planner.remove("a")
    assert [str(refusal) for refusal in result.refusals] == ["n: needs 2 free GPUs, has 1"]
