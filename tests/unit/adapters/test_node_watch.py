"""How nodes are watched: who is asked, what counts, and what happens when somebody is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from controlplane.adapters import node_watch
from controlplane.adapters.node_watch import RECENT_S, NodeWatch, recent
from controlplane.core.samples import GpuEvent, GpuEventKind, NodeSample
from tests.support_control import node_sample

Answer = tuple[NodeSample | None, list[GpuEvent]]


def xid(seq: int, unix_s: float = 5000.0, epoch: str = "a") -> GpuEvent:
    return GpuEvent("n1", epoch, seq, unix_s, GpuEventKind.XID, "g", 79)


class Cluster:
    """Ray's nodes and their agents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: dict[str, int] = {"n1": 8}
        self.made: list[str] = []
        self.asked: list[tuple[str, int]] = []
        self.answer: Callable[[], Awaitable[Answer]] = self.all_well
        self.events: list[GpuEvent] = []
        self.heard: list[tuple[str, Sequence[NodeSample], Sequence[GpuEvent]]] = []
        monkeypatch.setattr(node_watch, "alive_nodes", lambda: dict(self.alive))
        monkeypatch.setattr(node_watch, "ensure_node_agents", self.ensure)
        monkeypatch.setattr(node_watch, "LIST_INTERVAL_S", 0.0)

    def ensure(self, namespace: str, *, interval_s: float, known: Any, nodes: Any) -> dict[str, Any]:
        found = dict(known)
        for node_id in nodes:
            if node_id not in found:
                self.made.append(node_id)
                found[node_id] = SimpleNamespace(news=SimpleNamespace(remote=self.news))
        return found

    def news(self, epoch: str, seq: int) -> Awaitable[Answer]:
        self.asked.append((epoch, seq))
        return self.answer()

    async def all_well(self) -> Answer:
        return node_sample("n1", 1, 5000.0), self.events

    def watch(self, heard: dict[str, tuple[str, int]] | None = None) -> NodeWatch:
        def on_news(node_id: str, samples: Sequence[NodeSample], events: Sequence[GpuEvent]) -> None:
            self.heard.append((node_id, samples, events))

        return NodeWatch("tierplane", 1.0, on_news, heard)


async def look(watch: NodeWatch) -> dict[str, int] | None:
    alive = await watch.look()
    for _ in range(5):
        await asyncio.sleep(0)
    return alive


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


async def test_every_node_gets_an_agent_once_and_says_each_event_once(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.events = [xid(1), xid(2)]
    assert await look(watch) == {"n1": 8}
    cluster.events = []
    cluster.alive["n2"] = 0
    await look(watch)
    assert cluster.made == ["n1", "n2"]
    assert cluster.asked[:2] == [("", 0), ("a", 2)]
    assert [event.seq for event in cluster.heard[0][2]] == [1, 2]
    assert watch.heard["n1"] == ("a", 2)
    await watch.close()


async def test_a_controller_that_starts_again_hears_no_event_twice(cluster: Cluster) -> None:
    watch = cluster.watch({"n1": ("a", 7)})
    await look(watch)
    assert cluster.asked == [("a", 7)]
    await watch.close()


async def test_an_agent_that_is_gone_is_made_anew(cluster: Cluster) -> None:
    watch = cluster.watch()
    await look(watch)

    async def gone() -> Answer:
        raise RayActorError

    cluster.answer = gone
    await look(watch)
    cluster.answer = cluster.all_well
    await look(watch)
    assert cluster.made == ["n1", "n1"]
    await watch.close()


async def test_a_silent_agent_is_asked_once_and_holds_nobody_up(cluster: Cluster) -> None:
    watch = cluster.watch()

    async def silent() -> Answer:
        await asyncio.sleep(3600)
        raise AssertionError

    cluster.answer = silent
    for _ in range(3):
        assert await look(watch) == {"n1": 8}
    assert len(cluster.asked) == 1
    assert cluster.heard == []
    await watch.close()


async def test_without_an_answer_of_ray_no_node_counts_as_gone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = cluster.watch()
    cluster.alive = {}
    assert await look(watch) is None

    def fail() -> dict[str, int]:
        raise OSError("Ray's head is away")

    monkeypatch.setattr(node_watch, "alive_nodes", fail)
    assert await look(watch) is None
    await watch.close()


def test_at_first_contact_only_recent_events_count() -> None:
    events = [xid(1, 0.0), xid(2, 5000.0 - RECENT_S), xid(3, 4999.0)]
    assert [event.seq for event in recent(events, node_sample("n1", 1, 5000.0))] == [2, 3]
    assert recent(events, None) == events
