"""Properties of every placement, for any fleet and gangs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.placement import batch_planner
from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang, GangShape, Placement
from controlplane.core.placement.occupancy import ReservedResources, RunningReplica, occupancy
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.revalidation import revalidate
from controlplane.core.placement.topology import Distance, Gpu, Node, spread_of
from controlplane.core.placement.what_if import change

GIB = 1024**3


@pytest.fixture(autouse=True, scope="module")
def _few_orders() -> Iterator[None]:
    """Fewer attempts per plan, so that many plans can be made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_planner, "EFFORT", 40)
        yield


@st.composite
def nodes(draw: st.DrawFn) -> tuple[Node, ...]:
    found = []
    for n in range(draw(st.integers(0, 4))):
        size = draw(st.integers(0, 8))
        island = draw(st.sampled_from([0, 2, 4, 8]))
        gpus = tuple(
            Gpu(
                f"n{n}/{i}",
                i,
                draw(st.sampled_from("AB")),
                draw(st.sampled_from([0, 24, 80])) * GIB,
                frozenset(f"n{n}/{j}" for j in range(size) if island and j // island == i // island),
                i * 2 // size,
                unavailable=draw(st.sampled_from(["", "", "", "XID 79", "cordoned"])),
            )
            for i in range(size)
        )
        found.append(
            Node(
                f"n{n}",
                gpus,
                draw(st.integers(0, 64)) * 1000,
                draw(st.integers(0, 64)) * GIB,
                draw(st.sampled_from(["", "", "", "draining"])),
            )
        )
    return tuple(found)


@st.composite
def shapes(draw: st.DrawFn) -> GangShape:
    gpus = draw(st.sampled_from([0, 1, 1, 2, 3, 4, 8]))
    stages = draw(st.sampled_from([1, 1, 2, 3]))
    single = gpus == 1 and stages == 1
    return GangShape(
        gpus,
        stages,
        draw(st.sampled_from([1, 105, 333, 500, 810, 1000])) if single else 1000,
        draw(st.sampled_from([0, 10, 24, 60])) * GIB,
        draw(st.sampled_from([0, 500, 4000, 30000])),
        draw(st.sampled_from([0, 1, 16])) * GIB,
        frozenset(draw(st.sampled_from(["", "A", "B", "AB", "C"]))),
        draw(st.booleans()),
    )


@st.composite
def gangs(draw: st.DrawFn) -> tuple[Gang, ...]:
    kinds = draw(st.lists(shapes(), min_size=1, max_size=4))
    count = draw(st.integers(0, 14))
    return tuple(
        Gang(f"g{i}", draw(st.sampled_from(kinds)), draw(st.sampled_from(["", "t", "u"])))
        for i in range(count)
    )


def check_nothing_over_committed(fleet: tuple[Node, ...], placements: tuple[Placement, ...]) -> None:
    milli: Counter[str] = Counter()
    held: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    for placement in placements:
        for stage in placement.stages:
            cpu[stage.node_id] += placement.gang.shape.cpu_milli
            memory[stage.node_id] += placement.gang.shape.memory_bytes
            for uuid in stage.gpu_uuids:
                milli[uuid] += placement.gang.shape.milli_gpu
                held[uuid] += placement.gang.shape.gpu_memory_bytes
    for node in fleet:
        assert cpu[node.node_id] <= node.cpu_milli
        assert memory[node.node_id] <= node.memory_bytes
        for gpu in node.gpus:
            assert milli[gpu.uuid] <= 1000
            assert held[gpu.uuid] <= gpu.memory_bytes or not gpu.memory_bytes
            assert not (milli[gpu.uuid] and (gpu.unavailable or node.unavailable))


@given(nodes(), gangs())
@settings(max_examples=150, deadline=None)
def test_a_plan_is_complete_valid_and_explained(fleet: tuple[Node, ...], requested: tuple[Gang, ...]) -> None:
    state = PlacedCluster(fleet)
    result = plan(state, requested)
    check_nothing_over_committed(fleet, result.placements)
    by_id = {node.node_id: node for node in fleet}
    for placement in result.placements:
        shape = placement.gang.shape
        assert len(placement.stages) == shape.stages
        assert all(len(stage.gpu_uuids) == shape.gpus for stage in placement.stages)
        assert len(placement.node_ids) == 1 or shape.across_nodes
        assert not any(by_id[node_id].unavailable for node_id in placement.node_ids)
        gpus = {gpu.uuid: gpu for node in fleet for gpu in node.gpus}
        assert all(shape.accepts(gpus[uuid].model) for uuid in placement.gpu_uuids)
        spreads = [spread_of(by_id[stage.node_id], stage.gpu_uuids) for stage in placement.stages]
        assert placement.distance == max(spreads, default=Distance.SAME)
        assert placement.why
    assert revalidate(result.placements, state) == ()
    for refused in result.infeasible:
        assert [refusal.node_id for refusal in refused.refusals] == [node.node_id for node in fleet]
        assert all(str(refusal) for refusal in refused.refusals)
        assert refused.why
    names = [each.gang.gang_id for each in result.placements]
    names += [each.gang.gang_id for each in result.infeasible]
    assert sorted(names) == sorted(gang.gang_id for gang in requested)


@given(nodes(), gangs(), st.booleans(), st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_running_gangs_stay_and_other_programs_keep_their_gpus(
    fleet: tuple[Node, ...], requested: tuple[Gang, ...], known: bool, foreign_milli: int
) -> None:
    requested = tuple(
        replace(gang, tier=repr(gang.shape)) for gang in requested
    )  # a tier's replicas are alike
    first = plan(PlacedCluster(fleet), requested)
    running = [placement for placement in first.placements if len(placement.node_ids) == 1]
    replicas = [
        RunningReplica(f"r-{p.gang.gang_id}", p.gang.tier, p.node_ids[0], p.gpu_uuids if known else ())
        for p in running
    ]
    reserved = {
        node.node_id: ReservedResources(
            sum(p.gang.shape.total_milli for p in running if node.node_id in p.node_ids)
            + (foreign_milli if node is fleet[0] else 0)
        )
        for node in fleet
    }
    now = occupancy(fleet, requested, replicas, reserved, replica_cpu_milli={})
    wanted = [gang for gang in requested if gang.gang_id in now.replica_of]
    found = change(now.state, now.running, wanted)
    held = (*now.state.placements, *found.plan.placements)
    if known:
        assert len(found.unchanged) == len(running)
        assert (found.moved, found.lost, found.removed) == ((), (), ())
        assert {u for p in found.plan.placements for u in p.gpu_uuids} == {
            uuid for placement in running for uuid in placement.gpu_uuids
        }
    milli: Counter[str] = Counter()
    for placement in held:
        for uuid in placement.gpu_uuids:
            milli[uuid] += placement.gang.shape.milli_gpu
    assert max(milli.values(), default=0) <= 1000


@given(nodes(), gangs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_equal_calls_give_equal_results(
    fleet: tuple[Node, ...], requested: tuple[Gang, ...], rng: Random
) -> None:
    mixed = list(fleet)
    rng.shuffle(mixed)
    first = plan(PlacedCluster(fleet), requested)
    assert plan(PlacedCluster(tuple(mixed)), requested).placements == first.placements


@given(nodes(), gangs())
@settings(max_examples=100, deadline=None)
def test_a_refused_gang_does_not_fit(fleet: tuple[Node, ...], requested: tuple[Gang, ...]) -> None:
    """No gang is refused to leave room: a simple check shows for each refused gang that no node holds it."""
    planner = Planner(PlacedCluster(fleet))
    for gang in requested:
        before = planner.placements
        if isinstance(planner.place(gang), Placement):
            continue
        assert planner.placements == before
        shape = gang.shape
        for node in fleet:
            running = [(p.gang.shape, s) for p in before for s in p.stages if s.node_id == node.node_id]
            cpu = node.cpu_milli - sum(other.cpu_milli for other, _ in running)
            memory = node.memory_bytes - sum(other.memory_bytes for other, _ in running)
            able = 0
            for gpu in node.gpus:
                here = [other for other, stage in running if gpu.uuid in stage.gpu_uuids]
                free = 1000 - sum(other.milli_gpu for other in here)
                held = gpu.memory_bytes - sum(other.gpu_memory_bytes for other in here)
                able += (
                    not gpu.unavailable
                    and shape.accepts(gpu.model)
                    and free >= shape.milli_gpu
                    and (held >= shape.gpu_memory_bytes or not gpu.memory_bytes)
                )
            assert (
                node.unavailable
                or cpu < shape.cpu_milli * shape.stages
                or memory < shape.memory_bytes * shape.stages
                or able < shape.total_gpus
            )


@given(nodes(), gangs(), st.lists(st.integers(0, 13), max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_removed_gang_leaves_its_resources_free(
    fleet: tuple[Node, ...], requested: tuple[Gang, ...], leaving: list[int]
) -> None:
    planner = Planner(PlacedCluster(fleet))
    for gang in requested:
        planner.place(gang)
    for i in leaving:
        if f"g{i}" in {placement.gang.gang_id for placement in planner.placements}:
            planner.remove(f"g{i}")
            check_nothing_over_committed(fleet, planner.placements)
    left = planner.placements
    for placement in left:
        planner.remove(placement.gang.gang_id)
    assert planner.placements == ()
    for placement in left:
        assert isinstance(planner.place(placement.gang), Placement), "the empty fleet took it before"
        planner.remove(placement.gang.gang_id)
    assert revalidate(left, PlacedCluster(fleet)) == ()
