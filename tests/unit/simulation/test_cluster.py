"""Replicas that find room on nodes, or wait for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import Gang, GangShape, Placement
from controlplane.core.placement.planner import PlacedCluster
from controlplane.core.placement.topology import Node
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.cluster import Cluster
from tests.support.nodes import plain_node

WHOLE = GangShape()
PAIR = GangShape(gpus=2)
HALF = GangShape(milli_gpu=500)


class Bench:
    """Adds replicas to a cluster and records which of them start."""

    def __init__(self, *nodes: Node, opened: bool = True) -> None:
        self.clock = VirtualClock()
        self.cluster = Cluster(self.clock, nodes, [WHOLE])
        self.started: list[tuple[str, float]] = []
        self.placements: dict[str, Placement | None] = {}
        self.ready: list[str] = []
        if opened:
            self.cluster.open()

    def add(self, name: str, shape: GangShape | None = WHOLE) -> None:
        def start(placement: Placement | None, ready: bool) -> None:
            self.started.append((name, self.clock.now_s))
            self.placements[name] = placement
            if ready:
                self.ready.append(name)

        self.cluster.add(name, None if shape is None else Gang(name, shape, "tier"), start)

    def remove(self, *names: str, at_s: float = 0.0) -> None:
        self.clock.run_until(at_s)
        for name in names:
            self.cluster.remove(name)
        self.clock.run_until(at_s)

    @property
    def started_names(self) -> list[str]:
        return [name for name, _ in self.started]


def test_replicas_at_the_beginning_are_placed_together_as_by_a_plan() -> None:
    machines = (plain_node("a", 2), plain_node("b", 2))
    bench = Bench(*machines, opened=False)
    shapes = {"one": WHOLE, "two": WHOLE, "pair": PAIR}
    for name, shape in shapes.items():
        bench.add(name, shape)
    assert bench.started == []
    bench.cluster.open()
    # Placed one by one, the two single replicas would be on different nodes, and the pair would not fit.
    assert sorted(bench.ready) == ["one", "pair", "two"]
    expected = plan(PlacedCluster(machines), [Gang(name, shape, "tier") for name, shape in shapes.items()])
    assert {name: place.gpu_uuids for name, place in bench.placements.items() if place} == {
        place.gang.gang_id: place.gpu_uuids for place in expected.placements
    }


def test_a_replica_without_room_waits_until_another_is_removed() -> None:
    bench = Bench(plain_node("a", 1))
    for name in ("first", "second", "third"):
        bench.add(name)
    assert bench.started == [("first", 0.0)]
    bench.remove("first", at_s=7.0)
    assert bench.started[1:] == [("second", 7.0)]
    bench.remove("second", at_s=9.0)
    assert bench.started[2:] == [("third", 9.0)]
    assert bench.ready == []


def test_a_large_waiting_replica_does_not_block_a_small_one() -> None:
    bench = Bench(plain_node("a", 2))
    bench.add("old")
    bench.add("pair", PAIR)
    bench.add("small")
    assert bench.started_names == ["old", "small"]
    bench.remove("old", "small", at_s=1.0)
    assert bench.started_names == ["old", "small", "pair"]


def test_a_waiting_replica_comes_before_one_that_is_added_at_the_same_time() -> None:
    bench = Bench(plain_node("a", 1))
    bench.add("old")
    bench.add("waits")
    bench.cluster.remove("old")
    bench.add("new")
    bench.clock.run_until(0.0)
    assert bench.started_names == ["old", "waits"]


def test_the_gpus_of_a_stage_are_on_one_node() -> None:
    bench = Bench(plain_node("a", 2), plain_node("b", 2))
    bench.add("one")
    bench.add("two")
    # One GPU is free on each node.
    assert {place.node_ids for place in bench.placements.values() if place} == {("a",), ("b",)}
    bench.add("pair", PAIR)
    assert "pair" not in bench.started_names
    bench.remove("one", at_s=1.0)
    place = bench.placements["pair"]
    assert place is not None
    assert len(place.node_ids) == 1


def test_shares_count_as_fractions_of_a_gpu() -> None:
    bench = Bench(plain_node("a", 1))
    for name in ("one", "two", "three"):
        bench.add(name, HALF)
    assert bench.started_names == ["one", "two"]
    assert (bench.cluster.most_gpus, bench.cluster.gpus) == (1.0, 1.0)


def test_a_removed_waiting_replica_is_not_placed() -> None:
    bench = Bench(plain_node("a", 1))
    bench.add("old")
    bench.add("waits")
    bench.remove("waits", "old", at_s=1.0)
    assert bench.started_names == ["old"]
    with pytest.raises(KeyError):
        bench.cluster.remove("waits")


def test_a_lost_node_has_no_gpus_until_it_is_back() -> None:
    bench = Bench(plain_node("a", 1), replace(plain_node("b", 1), unavailable="cordoned"), plain_node("c", 1))
    bench.add("one")
    bench.add("two")
    assert bench.cluster.gpus == 2.0
    (lost,) = bench.cluster.lose("a")
    assert bench.cluster.gpus == 1.0
    bench.remove(lost, at_s=1.0)
    bench.add("three")
    assert "three" not in bench.started_names
    bench.cluster.restore("a")
    bench.clock.run_until(1.0)
    place = bench.placements["three"]
    assert place is not None
    assert place.node_ids == ("a",)
    assert bench.cluster.gpus == 2.0


def test_without_nodes_with_gpus_there_are_zero_gpus() -> None:
    bench = Bench(plain_node("a", 1))
    bench.cluster.lose("a")
    assert bench.cluster.gpus == 0.0
    assert Bench(replace(plain_node("a", 1), unavailable="cordoned")).cluster.gpus == 0.0


def test_a_replica_outside_the_cluster_always_has_room() -> None:
    bench = Bench()
    bench.add("elsewhere", None)
    bench.add("here")
    assert bench.started_names == ["elsewhere"]


def test_without_nodes_there_is_always_room() -> None:
    clock = VirtualClock()
    cluster = Cluster(clock, None)
    ready: list[bool] = []
    for i in range(3):
        if i == 2:
            cluster.open()
        cluster.add(f"r{i}", Gang(f"r{i}", PAIR), lambda _, there: ready.append(there))
    cluster.remove("r0")
    assert ready == [True, True, False]
    assert (cluster.gpus, cluster.nodes) == (None, None)


def test_the_gpu_model_of_a_placement() -> None:
    bench = Bench(plain_node("a", 1, "H100-80G"))
    bench.add("one", GangShape(models=frozenset({"H100-80G"})))
    assert bench.cluster.model_of(bench.placements["one"]) == "H100-80G"
    assert bench.cluster.model_of(None) == ""
