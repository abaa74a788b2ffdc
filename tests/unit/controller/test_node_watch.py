"""Polling of node agents, including those that do not respond."""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from controlplane.controller import node_watch
from controlplane.controller.node_watch import RECENT_S, NodeWatch, recent
from controlplane.core.telemetry.node_updates import NOTHING_CACHED, GpuInfoCache, NodeUpdate, node_update
from controlplane.core.telemetry.samples import (
    GpuEvent,
    GpuEventKind,
    GpuInfo,
    GpuSample,
    Missing,
    NodeSample,
    Reading,
)
from controlplane.node_agent.agent import EventHandler, NodeAgent
from tests.support.samples import gpu_sample, node_sample
from tests.support.waiting import forever, until_async


def xid(seq: int, unix_s: float = 5000.0, epoch: str = "a") -> GpuEvent:
    return GpuEvent("n1", epoch, seq, unix_s, GpuEventKind.XID, "g", 79)


class Cluster:
    """Ray's nodes and their agents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: dict[str, int] = {"n1": 8}
        self.made: list[str] = []
        self.requests: list[tuple[str, int]] = []
        self.answer: Callable[[], Awaitable[NodeUpdate]] = self.all_well
        self.respond: Callable[..., Awaitable[NodeUpdate]] = self.update
        self.events: list[GpuEvent] = []
        self.received: list[tuple[str, NodeSample | None, Sequence[GpuEvent]]] = []
        monkeypatch.setattr(node_watch, "alive_nodes", lambda: dict(self.alive))
        monkeypatch.setattr(node_watch, "ensure_node_agents", self.ensure)
        monkeypatch.setattr(node_watch, "LIST_INTERVAL_S", 0.0)

    def ensure(self, namespace: str, *, interval_s: float, known: Any, nodes: Any) -> dict[str, Any]:
        found = dict(known)
        for node_id in nodes:
            if node_id not in found:
                self.made.append(node_id)
                found[node_id] = SimpleNamespace(update=SimpleNamespace(remote=self.request))
        return found

    def request(self, *arguments: Any) -> Awaitable[NodeUpdate]:
        return self.respond(*arguments)

    def update(self, epoch: str, seq: int, infos: tuple[str, int]) -> Awaitable[NodeUpdate]:
        self.requests.append((epoch, seq))
        return self.answer()

    async def all_well(self) -> NodeUpdate:
        return node_update(
            node_sample("n1", 1, 5000.0), GpuInfoCache("a", 1, ()), self.events, NOTHING_CACHED
        )

    def watch(self, last_events: dict[str, tuple[str, int]] | None = None) -> NodeWatch:
        def on_update(node_id: str, sample: NodeSample | None, events: Sequence[GpuEvent]) -> None:
            self.received.append((node_id, sample, events))

        return NodeWatch("tierplane", 1.0, on_update, last_events or {})


async def poll(watch: NodeWatch) -> dict[str, int] | None:
    alive = await watch.poll()
    await until_async(lambda: not watch._open)
    return alive


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


async def test_every_node_gets_one_agent_and_each_event_arrives_once(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.events = [xid(1), xid(2)]
    assert await poll(watch) == {"n1": 8}
    cluster.events = []
    cluster.alive["n2"] = 0
    await poll(watch)
    assert cluster.made == ["n1", "n2"]
    assert cluster.requests[:2] == [("", 0), ("a", 2)]
    assert [event.seq for event in cluster.received[0][2]] == [1, 2]
    assert watch.last_events["n1"] == ("a", 2)
    await watch.close()


async def test_a_restarted_controller_gets_no_event_twice(cluster: Cluster) -> None:
    watch = cluster.watch({"n1": ("a", 7)})
    await poll(watch)
    assert cluster.requests == [("a", 7)]
    await watch.close()


async def test_a_lost_agent_is_started_again(cluster: Cluster) -> None:
    watch = cluster.watch()
    await poll(watch)

    async def gone() -> NodeUpdate:
        raise RayActorError

    cluster.answer = gone
    await poll(watch)
    cluster.answer = cluster.all_well
    await poll(watch)
    assert cluster.made == ["n1", "n1"]
    await watch.close()


async def test_a_silent_agent_has_one_open_request_and_delays_no_other(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.answer = forever
    requests = set()
    for _ in range(3):
        assert await watch.poll() == {"n1": 8}
        requests |= set(watch._open.values())
    await until_async(lambda: cluster.requests)
    assert len(requests) == len(cluster.requests) == 1
    assert cluster.received == []
    await watch.close()


async def test_while_ray_does_not_answer_no_node_counts_as_gone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = cluster.watch()
    cluster.alive = {}
    assert await poll(watch) is None

    def fail() -> dict[str, int]:
        raise OSError("Ray's head is away")

    monkeypatch.setattr(node_watch, "alive_nodes", fail)
    assert await poll(watch) is None
    await watch.close()


def test_at_first_contact_only_recent_events_count() -> None:
    events = [xid(1, 0.0), xid(2, 5000.0 - RECENT_S), xid(3, 4999.0)]
    assert [event.seq for event in recent(events, node_sample("n1", 1, 5000.0))] == [2, 3]
    assert recent(events, None) == events


class Gpus:
    """A driver whose GPUs a test changes."""

    connected = True
    driver_version: Reading[str] = "580"

    def __init__(self, *uuids: str) -> None:
        self.samples = [gpu_sample(uuid, i) for i, uuid in enumerate(uuids)]

    def change(self, number: int, **info: Any) -> None:
        """Change the info of one GPU."""
        sample = self.samples[number]
        self.samples[number] = replace(sample, info=replace(sample.info, **info))

    def read(self) -> tuple[GpuSample, ...]:
        return tuple(self.samples)

    def close(self) -> None:
        """Nothing is open."""


class NoEvents:
    """A driver without events."""

    watched: Reading[int] = 0

    def __init__(self, handler: EventHandler) -> None:
        """There is no listener."""

    def start(self) -> None:
        """Nothing to wait for."""

    stop = refresh = start


class Wire:
    """An agent behind Ray: its updates are packed, unpacked and recorded."""

    def __init__(self, cluster: Cluster, *uuids: str) -> None:
        self.cluster = cluster
        self.gpus = Gpus(*uuids)
        self.sent: list[NodeUpdate] = []
        self.restart()
        cluster.respond = self.update

    def restart(self) -> None:
        """Replace the agent's process."""
        self.agent = NodeAgent("n1", self.gpus, NoEvents)

    async def update(self, *arguments: Any) -> NodeUpdate:
        taken = self.agent.sample()
        packed = pickle.dumps(self.agent.update(*arguments))
        update: NodeUpdate = pickle.loads(packed)
        self.sent.append(update)
        self.taken = taken
        return update

    async def receive(self, watch: NodeWatch) -> NodeSample:
        """The controller's sample from the next response: exactly the one that the agent took."""
        await poll(watch)
        node_id, sample, _ = self.cluster.received[-1]
        assert sample is not None
        assert (node_id, sample) == ("n1", self.taken)
        return sample

    def infos(self) -> tuple[GpuInfo, ...] | None:
        """The GPU infos in the last response."""
        infos = self.sent[-1].infos
        return None if infos is None else infos.gpus


async def test_gpu_infos_are_sent_once(cluster: Cluster) -> None:
    wire, watch = Wire(cluster, "g0", "g1"), cluster.watch()
    first = await wire.receive(watch)
    assert [info.uuid for info in wire.infos() or ()] == ["g0", "g1"]
    wire.gpus.samples[1] = replace(wire.gpus.samples[1], temperature_c=77)
    second = await wire.receive(watch)
    assert wire.infos() is None
    assert (first.gpus[1].temperature_c, second.gpus[1].temperature_c) == (50, 77)
    assert second.gpus[0].info is first.gpus[0].info, "one instance, as the agent has it"
    assert [b"NVIDIA A" in pickle.dumps(sent) for sent in wire.sent] == [True, False]
    await watch.close()


async def test_gpu_infos_are_sent_again_when_they_change(cluster: Cluster) -> None:
    wire, watch = Wire(cluster, "g0"), cluster.watch()
    await wire.receive(watch)
    wire.gpus.change(0, slowdown_c=80)
    assert (await wire.receive(watch)).gpus[0].info.slowdown_c == 80
    await wire.receive(watch)
    assert wire.infos() is None
    wire.gpus.samples.append(gpu_sample("g1", 1))  # hot-plugged
    assert [gpu.info.uuid for gpu in (await wire.receive(watch)).gpus] == ["g0", "g1"]
    wire.gpus.samples.reverse()
    assert [gpu.info.uuid for gpu in (await wire.receive(watch)).gpus] == ["g1", "g0"]
    del wire.gpus.samples[0]
    assert [gpu.info.uuid for gpu in (await wire.receive(watch)).gpus] == ["g0"]
    await wire.receive(watch)
    assert wire.infos() is None
    await watch.close()


async def test_a_restarted_agent_sends_gpu_infos_again(cluster: Cluster) -> None:
    wire, watch = Wire(cluster, "g0"), cluster.watch()
    for _ in range(2):
        await wire.receive(watch)
    assert wire.infos() is None
    wire.gpus.change(0, name="NVIDIA B")
    wire.restart()
    assert wire.agent.update("", 0, NOTHING_CACHED).infos_key[1] == 1, (
        "it counts anew, so its numbers come again"
    )
    assert (await wire.receive(watch)).gpus[0].info.name == "NVIDIA B"
    assert wire.infos() is not None
    await wire.receive(watch)
    assert wire.infos() is None
    await watch.close()


async def test_a_restarted_controller_gets_gpu_infos_again(cluster: Cluster) -> None:
    wire, watch = Wire(cluster, "g0"), cluster.watch()
    for _ in range(2):
        await wire.receive(watch)
    assert wire.infos() is None
    again = cluster.watch(dict(watch.last_events))
    assert (await wire.receive(again)).gpus[0].info.uuid == "g0"
    assert wire.infos() is not None
    for each in (watch, again):
        await each.close()


async def test_two_controllers_both_get_gpu_infos(cluster: Cluster) -> None:
    wire, one, other = Wire(cluster, "g0"), cluster.watch(), cluster.watch()
    await wire.receive(one)
    await wire.receive(other)
    assert wire.infos() is not None
    wire.gpus.change(0, index=3)
    await wire.receive(one)
    await wire.receive(other)
    assert wire.infos() is not None
    await wire.receive(one)
    assert wire.infos() is None
    for each in (one, other):
        await each.close()


async def test_readings_that_belong_to_other_gpu_infos_are_ignored(cluster: Cluster) -> None:
    wire, watch = Wire(cluster, "g0"), cluster.watch()
    await wire.receive(watch)
    wire.gpus.change(0, index=5)

    async def cut(*arguments: Any) -> NodeUpdate:
        return replace(await wire.update(*arguments), infos=None)

    cluster.respond = cut
    await poll(watch)
    assert cluster.received[-1] == ("n1", None, ())
    cluster.respond = wire.update
    assert (await wire.receive(watch)).gpus[0].info.index == 5
    await watch.close()


async def test_a_node_without_gpus_and_an_agent_without_a_sample(cluster: Cluster) -> None:
    wire, watch = Wire(cluster), cluster.watch()
    early = wire.agent.update("", 0, NOTHING_CACHED)
    assert (early.sample, early.readings) == (None, ())
    assert (await wire.receive(watch)).gpus == ()
    assert isinstance((await wire.receive(watch)).cpu_ratio, float | Missing)
    assert wire.infos() is None
    await watch.close()
