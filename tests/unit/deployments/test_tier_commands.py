"""A replica carries out each command of the controller once, however often it is repeated."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.reconcile.commands import ReplicaCommand, ReplicaCommandKind
from controlplane.engines.supervision.status import EngineStatus
from deployments.background import BackgroundTasks
from deployments.tier import TierReplica
from tests.support.endpoints import make_endpoint


class Supervisor:
    """An engine that carries out every command."""

    def __init__(self, state: EndpointState = EndpointState.READY, generation: int = 3) -> None:
        self.status = EngineStatus(state=state, generation=generation)
        self.calls: list[str] = []

    def restart(self, reason: str) -> None:
        self.calls.append(f"restart: {reason}")

    def drain(self, timeout_s: float, still_running: Any) -> bool:
        self.calls.append("drain")
        return True

    def stop(self) -> None:
        self.calls.append("stop")


class Bare(TierReplica):
    """Without Serve, no caller would await ``__del__``."""

    __del__: Any = lambda self: None


class Link:
    def __init__(self) -> None:
        self.notified: list[tuple[Any, ...]] = []

    async def notify(self, method: Callable[..., Any], *args: Any) -> bool:
        self.notified.append((method.__name__, *args))
        return True


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: calls.append((pid, number)))
    return calls


def replica(supervisor: Supervisor) -> tuple[Any, Link]:
    """A replica whose engine is started, without Serve."""
    made: Any = object.__new__(Bare)
    link = Link()
    made._tier = TierConfig(name="small", engine="simulated")
    made._supervisor, made._link, made._tasks = supervisor, link, BackgroundTasks()
    made._base = make_endpoint("small-a", tier="small")
    return made, link


def command(kind: ReplicaCommandKind, generation: int = 0) -> ReplicaCommand:
    return ReplicaCommand(kind, "small-a", "why", generation)


def test_a_replica_that_is_retired_drains_and_ends_once(ended: list[tuple[int, int]]) -> None:
    supervisor = Supervisor()

    async def work() -> None:
        made, link = replica(supervisor)
        for _ in range(3):
            made._carry_out((command(ReplicaCommandKind.RETIRE),))
        await asyncio.gather(made._retiring, TierReplica.__del__(made))
        made._carry_out((command(ReplicaCommandKind.RETIRE),))
        await made.check_health()
        assert link.notified == [("deregister", "small-a", "drained")]

    asyncio.run(work())
    assert supervisor.calls == ["drain"]
    assert ended == [(os.getpid(), signal.SIGTERM)]


def test_a_replica_that_does_not_serve_yet_stops_its_engine(ended: list[tuple[int, int]]) -> None:
    supervisor = Supervisor(EndpointState.STARTING)

    async def work() -> None:
        made, _ = replica(supervisor)
        made._carry_out((command(ReplicaCommandKind.RETIRE),))
        await made._retiring

    asyncio.run(work())
    assert supervisor.calls == ["stop"]
    assert len(ended) == 1


def test_an_engine_is_restarted_once_for_each_commanded_generation() -> None:
    supervisor = Supervisor(generation=3)
    made, _ = replica_without_loop(supervisor)
    for _ in range(3):
        made._carry_out((command(ReplicaCommandKind.RESTART, 3),))
    made._carry_out((command(ReplicaCommandKind.RESTART, 2),))
    assert supervisor.calls == ["restart: why"]
    supervisor.status = EngineStatus(state=EndpointState.READY, generation=4)
    made._carry_out((command(ReplicaCommandKind.RESTART, 3),))
    assert supervisor.calls == ["restart: why"]
    made._carry_out((command(ReplicaCommandKind.RESTART, 4),))
    assert supervisor.calls == ["restart: why"] * 2


def replica_without_loop(supervisor: Supervisor) -> tuple[Any, Link]:
    made: Any = object.__new__(Bare)
    made._supervisor = supervisor
    return made, Link()
