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
    """Asks for places, and keeps what was answered."""

    def __init__(self, *nodes: Node, opened: bool = True) -> None:
        self.clock = VirtualClock()
        self.cluster = Cluster(self.clock, nodes, [WHOLE])
        self.begun: list[tuple[str, float]] = []
        self.places: dict[str, Placement | None] = {}
        self.ready: list[str] = []
        if opened:
            self.cluster.open()

    def ask(self, name: str, shape: GangShape | None = WHOLE) -> None:
        def start(placement: Placement | None, ready: bool) -> None:
            self.begun.append((name, self.clock.now_s))
            self.places[name] = placement
            if ready:
                self.ready.append(name)

        self.cluster.ask(name, None if shape is None else Gang(name, shape, "tier"), start)

    def leave(self, *names: str, at_s: float = 0.0) -> None:
        self.clock.run_until(at_s)
        for name in names:
            self.cluster.leave(name)
        self.clock.run_until(at_s)

    @property
    def there(self) -> list[str]:
        return [name for name, _ in self.begun]


def test_what_the_run_begins_with_is_placed_together_as_a_plan_would() -> None:
    machines = (plain_node("a", 2), plain_node("b", 2))
    bench = Bench(*machines, opened=False)
    shapes = {"one": WHOLE, "two": WHOLE, "pair": PAIR}
    for name, shape in shapes.items():
        bench.ask(name, shape)
    assert bench.begun == []
    bench.cluster.open()
    # One after the other, the two single ones would have kept apart, and the pair would find no node.
    assert sorted(bench.ready) == ["one", "pair", "two"]
    expected = plan(PlacedCluster(machines), [Gang(name, shape, "tier") for name, shape in shapes.items()])
    assert {name: place.gpu_uuids for name, place in bench.places.items() if place} == {
        place.gang.gang_id: place.gpu_uuids for place in expected.placements
    }


def test_who_finds_no_room_waits_until_another_goes() -> None:
    bench = Bench(plain_node("a", 1))
    for name in ("first", "second", "third"):
        bench.ask(name)
    assert bench.begun == [("first", 0.0)]
    bench.leave("first", at_s=7.0)
    assert bench.begun[1:] == [("second", 7.0)]
    bench.leave("second", at_s=9.0)
    assert bench.begun[2:] == [("third", 9.0)]
    assert bench.ready == []


def test_a_large_one_that_waits_keeps_no_room_from_a_small_one() -> None:
    bench = Bench(plain_node("a", 2))
    bench.ask("old")
    bench.ask("pair", PAIR)
    bench.ask("small")
    assert bench.there == ["old", "small"]
    bench.leave("old", "small", at_s=1.0)
    assert bench.there == ["old", "small", "pair"]


def test_who_waits_longer_comes_before_who_asks_at_the_same_moment() -> None:
    bench = Bench(plain_node("a", 1))
    bench.ask("old")
    bench.ask("waits")
    bench.cluster.leave("old")
    bench.ask("new")
    bench.clock.run_until(0.0)
    assert bench.there == ["old", "waits"]


def test_the_gpus_of_a_stage_are_on_one_node() -> None:
    bench = Bench(plain_node("a", 2), plain_node("b", 2))
    bench.ask("one")
    bench.ask("two")
    # Two are free, one on each node.
    assert {place.node_ids for place in bench.places.values() if place} == {("a",), ("b",)}
    bench.ask("pair", PAIR)
    assert "pair" not in bench.there
    bench.leave("one", at_s=1.0)
    place = bench.places["pair"]
    assert place is not None
    assert len(place.node_ids) == 1


def test_shares_of_a_gpu_are_counted_as_such() -> None:
    bench = Bench(plain_node("a", 1))
    for name in ("one", "two", "three"):
        bench.ask(name, HALF)
    assert bench.there == ["one", "two"]
    assert (bench.cluster.most_gpus, bench.cluster.gpus) == (1.0, 1.0)


def test_who_no_longer_waits_gets_nothing() -> None:
    bench = Bench(plain_node("a", 1))
    bench.ask("old")
    bench.ask("waits")
    bench.leave("waits", "old", at_s=1.0)
    assert bench.there == ["old"]
    with pytest.raises(KeyError):
        bench.cluster.leave("waits")


def test_a_lost_node_has_no_gpus_until_it_is_back() -> None:
    bench = Bench(plain_node("a", 1), replace(plain_node("b", 1), unavailable="cordoned"), plain_node("c", 1))
    bench.ask("one")
    bench.ask("two")
    assert bench.cluster.gpus == 2.0
    (lost,) = bench.cluster.lose("a")
    assert bench.cluster.gpus == 1.0
    bench.leave(lost, at_s=1.0)
    bench.ask("three")
    assert "three" not in bench.there
    bench.cluster.restore("a")
    bench.clock.run_until(1.0)
    place = bench.places["three"]
    assert place is not None
    assert place.node_ids == ("a",)
    assert bench.cluster.gpus == 2.0


def test_when_no_node_with_gpus_is_left_there_is_no_gpu_to_share() -> None:
    bench = Bench(plain_node("a", 1))
    bench.cluster.lose("a")
    assert bench.cluster.gpus == 0.0
    assert Bench(replace(plain_node("a", 1), unavailable="cordoned")).cluster.gpus == 0.0


def test_what_runs_elsewhere_always_has_room() -> None:
    bench = Bench()
    bench.ask("elsewhere", None)
    bench.ask("here")
    assert bench.there == ["elsewhere"]


def test_without_nodes_there_is_always_room() -> None:
    clock = VirtualClock()
    cluster = Cluster(clock, None)
    ready: list[bool] = []
    for i in range(3):
        if i == 2:
            cluster.open()
        cluster.ask(f"r{i}", Gang(f"r{i}", PAIR), lambda _, there: ready.append(there))
    cluster.leave("r0")
    assert ready == [True, True, False]
    assert (cluster.gpus, cluster.nodes) == (None, None)


def test_the_gpu_model_of_a_place_is_known() -> None:
    bench = Bench(plain_node("a", 1, "H100-80G"))
    bench.ask("one", GangShape(models=frozenset({"H100-80G"})))
    assert bench.cluster.model_of(bench.places["one"]) == "H100-80G"
    assert bench.cluster.model_of(None) == ""
