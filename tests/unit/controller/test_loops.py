"""The controller's periodic loops, without Ray: what is documented, and how they are repeated."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from controlplane.config import ControllerConfig
from controlplane.controller import loops as module
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.alerting import Alerting
from controlplane.controller.keys import KeyRegistry
from controlplane.controller.loops import LOOPS, SCALING, TICK, ControlLoops, PeriodicLoop
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.recorder import Recorder
from controlplane.controller.reports import Reports
from controlplane.controller.saved_state import SavedState
from controlplane.controller.scaling import PlaneScaler
from tests.support.controller import World
from tests.support.repository import ROOT
from tests.support.waiting import until_async

TABLE = "| loop | period | reads | may change |\n|---|---|---|---|\n"


def test_the_documentation_lists_the_loops_and_what_each_may_change() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split(TABLE)[1].split("\n\n")[0].splitlines()
    ]
    assert [(row[0], row[3]) for row in rows] == [(loop.name, loop.changes) for loop in LOOPS]
    settings = {name for row in rows for name in re.findall(r"controller\.(\w+_interval_s)", row[1])}
    assert settings == {"tick_interval_s", "engine_interval_s"}


class Nodes(NodeWatch):
    """Two nodes; no agent is started."""

    def __init__(self) -> None:
        super().__init__("tierplane", 1.0, lambda *_: None, {})

    async def poll(self) -> dict[str, int] | None:
        return {"n1": 2, "n2": 0}


class Rig:
    """Loops that run every few milliseconds, on a controller whose clock does not advance."""

    def __init__(self, config: ControllerConfig) -> None:
        self.world = World({"n1": ["g0", "g1"]}, {"small": 1})
        self.recorder = Recorder(None)
        controller, nodes = self.world.controller, Nodes()
        scaler = PlaneScaler(controller, config.scaling)
        alerting = Alerting(controller, config.alerts, AlertDelivery((), {}, "plane"))
        self.saved = SavedState(
            self.recorder,
            registry=self.world.registry,
            controller=controller,
            scaler=scaler,
            alerting=alerting,
            nodes=nodes,
            keys=KeyRegistry(time.time, lambda *_: None),
        )
        self.changes = 0
        self.held: list[tuple[dict[str, str], dict[str, int]]] = []
        """GPUs to hold in Ray's accounting, and those that Ray has, by node; each time they were set."""
        self.idle = asyncio.Event()
        self.loops = ControlLoops(
            config,
            registry=self.world.registry,
            controller=controller,
            scaler=scaler,
            alerting=alerting,
            reports=Reports(controller, self.recorder, config.reports, 0.0),
            nodes=nodes,
            saved=self.saved,
            on_change=self.changed,
            on_idle=self.ended,
        )

    def changed(self) -> None:
        self.changes += 1
        self.saved.record_events()

    async def ended(self) -> None:
        self.idle.set()

    def hold(self, namespace: str, wanted: dict[str, str], gpus: dict[str, int]) -> None:
        self.held.append((wanted, gpus))


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    made = Rig(ControllerConfig(tick_interval_s=0.002, engine_interval_s=0.002))
    monkeypatch.setattr(module, "hold_gpus", made.hold)
    yield made
    await made.loops.stop()
    made.recorder.close()


def counted(loop: PeriodicLoop, rounds: list[str], *, fails: int = 0) -> PeriodicLoop:
    """The loop with a round that only counts; the first ``fails`` of them raise."""

    async def run(_: ControlLoops) -> None:
        rounds.append(loop.name)
        if len(rounds) <= fails:
            raise RuntimeError(f"round {len(rounds)}")

    return replace(loop, run=run)


async def test_the_loops_observe_decide_and_save(rig: Rig) -> None:
    await rig.loops.start()
    await until_async(lambda: rig.saved.restored and rig.changes > 20)
    await until_async(lambda: rig.recorder.state)
    assert rig.recorder.state["cluster"] == ["n1", "n2"]
    assert rig.loops.tick_s > 0.0
    rig.world.clock.s += 1.0
    rig.world.observe()
    rig.world.controller.cordon("g0", "a fan rattles")
    await until_async(lambda: "gpu/g0" in rig.recorder.state)


async def test_a_failed_round_is_logged_and_the_next_one_comes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[str] = []
    monkeypatch.setattr(module, "LOOPS", (counted(TICK, rounds, fails=3),))
    with capture_logs() as logs:
        await rig.loops.start()
        await until_async(lambda: len(rounds) > 5)
    failed = [line for line in logs if line["event"].startswith("a control loop failed")]
    assert [(line["loop"], line["error"]) for line in failed] == [
        ("tick", f"RuntimeError('round {number}')") for number in (1, 2, 3)
    ]


async def test_a_round_can_begin_before_its_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[str] = []
    rare = replace(counted(SCALING, rounds), period_s=lambda _: 3600.0)
    monkeypatch.setattr(module, "LOOPS", (rare,))
    await rig.loops.start()
    await until_async(lambda: len(rounds) == 1)
    rig.loops.run_soon(SCALING)
    await until_async(lambda: len(rounds) == 2)


async def test_stopped_loops_run_no_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[str] = []
    monkeypatch.setattr(module, "LOOPS", (counted(TICK, rounds),))
    await rig.loops.start()
    await until_async(lambda: len(rounds) > 3)
    await rig.loops.stop()
    assert all(task.done() for task in rig.loops._tasks)


async def test_the_controller_ends_once_the_plane_is_gone(rig: Rig) -> None:
    await rig.loops.start()
    await until_async(lambda: rig.changes > 5)
    assert not rig.idle.is_set()
    rig.world.clock.s += module.IDLE_EXIT_S + 1.0
    await asyncio.wait_for(rig.idle.wait(), 10.0)
    assert all(task.done() for task in rig.loops._tasks)


async def test_cordons_reach_rays_accounting_when_they_change(rig: Rig) -> None:
    rig.world.settle()
    await rig.loops.watch_nodes()
    await rig.loops.apply_cordons()
    assert rig.held == [({}, {"n1": 2, "n2": 0})], "an earlier process may have held something"
    rig.world.controller.cordon("g1", "a fan rattles")
    for _ in range(3):
        await rig.loops.apply_cordons()
    assert rig.held[1:] == [({"g1": "n1"}, {"n1": 2, "n2": 0})]
