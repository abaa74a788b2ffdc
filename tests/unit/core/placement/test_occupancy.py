"""What runs on a cluster, from the replicas of the controller and the reservations of Ray."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.placement.gangs import Gang, GangShape
from controlplane.core.placement.occupancy import Occupancy, ReservedResources, RunningReplica, occupancy
from controlplane.core.placement.topology import Node
from controlplane.core.placement.what_if import change
from tests.support.nodes import make_node

BIG = GangShape(gpus=2)


def gangs(tier: str, shape: GangShape, count: int) -> list[Gang]:
    return [Gang(f"{tier}-{i}", shape, tier) for i in range(count)]


def occupied(
    nodes: list[Node], wanted: list[Gang], replicas: list[RunningReplica], **reserved: ReservedResources
) -> Occupancy:
    return occupancy(nodes, wanted, replicas, reserved, replica_cpu_milli={"cpu": 2000})


def test_replicas_stay_on_their_known_gpus() -> None:
    wanted = gangs("big", BIG, 2)
    found = occupied(
        [make_node("n", island=4)],
        wanted,
        [RunningReplica("big-x", "big", "n", ("n/5", "n/6"))],
        n=ReservedResources(gpu_milli=2000),
    )
    assert found.notes == ()
    assert found.replica_of == {"big-0": "big-x"}
    now = change(found.state, found.running, wanted)
    assert (now.unchanged, now.added) == (("big-0",), ("big-1",))
    stays, comes = now.plan.placements
    assert (stays.gpu_uuids, stays.why) == (("n/5", "n/6"), "runs there")
    assert set(comes.gpu_uuids).isdisjoint(stays.gpu_uuids)


def test_resources_of_other_programs_are_not_given_away() -> None:
    wanted = gangs("one", GangShape(), 4)
    found = occupied(
        [make_node("n", gpus=4)], wanted, [], n=ReservedResources(gpu_milli=2500, cpu_milli=3000)
    )
    assert found.notes == (
        "other programs use 2.5 GPUs of n; which ones is an assumption",
        "other programs use 3 CPUs of n",
    )
    assert found.state.nodes[0].cpu_milli == 61_000
    now = change(found.state, found.running, wanted)
    assert len(now.plan.placements) == 1
    assert now.plan.infeasible[0].why == "GPU busy on 1 node"


def test_unknown_gpus_are_assumed() -> None:
    wanted = gangs("big", BIG, 1)
    found = occupied(
        [make_node("n", gpus=4, island=2)],
        wanted,
        [RunningReplica("big-x", "big", "n")],
        n=ReservedResources(gpu_milli=2000),
    )
    assert found.running.placements[0].gpu_uuids in {("n/0", "n/1"), ("n/2", "n/3")}
    assert found.notes == ("the GPUs of big-x on n are an assumption",)
    assert found.state.placements == ()


def test_draining_and_surplus_replicas_are_removed() -> None:
    wanted = gangs("one", GangShape(), 1)
    replicas = [
        RunningReplica("one-a", "one", "n", ("n/0",), leaving=True),
        RunningReplica("one-b", "one", "n", ("n/1",)),
        RunningReplica("one-c", "one", "n", ("n/2",)),
        RunningReplica("old-d", "old", "n", ("n/3",)),
        RunningReplica("one-e", "one", "gone", ("gone/0",)),
    ]
    found = occupied([make_node("n", gpus=4)], wanted, replicas, n=ReservedResources(gpu_milli=4000))
    now = change(found.state, found.running, wanted)
    assert now.unchanged == ("one-0",)
    assert now.plan.placements[0].gpu_uuids == ("n/1",)
    assert sorted(now.removed) == ["old-d", "one-a", "one-c"]
    assert found.notes == ()


def test_a_replica_of_another_size_or_on_a_bad_gpu_moves() -> None:
    node = make_node("n", gpus=6)
    bad = replace(node, gpus=(replace(node.gpus[0], unavailable="cordoned"), *node.gpus[1:]))
    wanted = [*gangs("big", BIG, 1), *gangs("one", GangShape(), 1)]
    replicas = [RunningReplica("big-x", "big", "n", ("n/1",)), RunningReplica("one-y", "one", "n", ("n/0",))]
    found = occupied([bad], wanted, replicas, n=ReservedResources(gpu_milli=2000))
    now = change(found.state, found.running, wanted)
    assert sorted(now.moved) == ["big-0", "one-0"]
    assert "n/0" not in {uuid for p in now.plan.placements for uuid in p.gpu_uuids}


def test_cpu_tiers_stay_and_their_cpus_count_once() -> None:
    wanted = gangs("cpu", GangShape(gpus=0, cpu_milli=2000, memory_bytes=5 * 2**30), 1)
    found = occupied(
        [make_node("n", gpus=0), make_node("m", gpus=0)],
        wanted,
        [RunningReplica("cpu-x", "cpu", "n")],
        n=ReservedResources(cpu_milli=2000, memory_bytes=8 * 2**30),
    )
    assert found.notes == ()
    assert [node.memory_bytes >> 30 for node in found.state.nodes] == [509, 512]
    assert [node.cpu_milli for node in found.state.nodes] == [64_000, 64_000]
    now = change(found.state, found.running, wanted)
    assert now.plan.placements[0].node_ids == ("n",)


def test_an_engine_on_several_nodes_has_the_gpus_that_it_reserved() -> None:
    wanted = gangs("wide", GangShape(gpus=2, stages=2, across_nodes=True), 1)
    nodes = [make_node(name, gpus=2) for name in ("a", "b", "head")]
    replica = RunningReplica("wide-x", "wide", "head", gpus_by_node=(("a", 2), ("b", 2)))
    found = occupied(
        nodes, wanted, [replica], a=ReservedResources(gpu_milli=2000), b=ReservedResources(gpu_milli=2000)
    )
    assert [stage.node_id for stage in found.running.placements[0].stages] == ["a", "b"]
    assert found.state.placements == ()
    assert change(found.state, found.running, wanted).unchanged == ("wide-0",)
