"""How a replica gets its GPUs, with a fake controller."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from controlplane.config import ControllerConfig
from controlplane.controller.api import Method, P, R
from controlplane.controller.client import ControllerLink
from controlplane.core.gpus.leases import GpuLease, GpuPart, LeaseOutcome, LeaseResponse
from controlplane.core.placement.gangs import GangShape
from controlplane.core.reconcile.commands import StartPermission
from controlplane.errors import ControllerUnavailable, EngineError
from deployments.gpu_lease import EngineGpus, GpuLeaseClient

LEASE = GpuLease("small-a", 1, "node-1", (GpuPart("GPU-7"), GpuPart("GPU-3")), 0.0)
AWAY = ControllerUnavailable("it is away")


class Link(ControllerLink):
    """Returns the given responses in order, and the last one forever."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(ControllerConfig())
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []

    async def call_within(
        self, timeout_s: float, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        self.calls.append((method.__name__, *args))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def notify(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> bool:
        self.calls.append((method.__name__, *args))
        return True


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a sleep advances at once."""
    now_s = [0.0]

    async def sleep(wait_s: float) -> None:
        now_s[0] += wait_s

    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)


def client(link: Link, waits: list[str] | None = None) -> GpuLeaseClient:
    shown = (waits if waits is not None else []).append
    log = structlog.get_logger()
    return GpuLeaseClient(link, holder="small-a", tier="small", node_id="node-1", show_wait=shown, log=log)


def lease(link: Link, waits: list[str] | None = None) -> EngineGpus:
    return asyncio.run(client(link, waits).lease(GangShape(gpus=2), ("0", "1")))


def test_the_engine_gets_the_leased_uuids_in_the_order_of_the_ranks() -> None:
    link = Link(LeaseResponse(LeaseOutcome.GRANTED, "in one NVLink island", LEASE))
    found = lease(link)
    assert found.lease is not None
    assert found.ids == found.lease.gpu_uuids == ("GPU-7", "GPU-3")
    assert found.lease is LEASE
    assert link.calls == [("lease_gpus", "small-a", 1, "node-1", GangShape(gpus=2), "small")]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([AWAY], "away"),
        ([LeaseResponse(LeaseOutcome.UNMANAGED, "no driver")], "no driver"),
        ([LeaseResponse(LeaseOutcome.WAIT, "the agent is silent", retry_after_s=1.0)], "silent"),
    ],
    ids=["no controller", "no driver", "never known"],
)
def test_without_a_lease_the_engine_gets_the_gpus_that_ray_assigned(answers: list[Any], reason: str) -> None:
    with capture_logs() as logs:
        found = lease(Link(*answers))
    assert found.ids == ("0", "1")
    assert found.lease is None
    [line] = [line for line in logs if line["event"].startswith("no lease")]
    assert reason in line["reason"]


def test_a_replica_waits_for_gpus_that_are_not_known_yet_and_shows_it() -> None:
    waits: list[str] = []
    wait = LeaseResponse(LeaseOutcome.WAIT, "the node's agent has not reported yet", retry_after_s=1.0)
    assert (
        lease(Link(AWAY, wait, wait, LeaseResponse(LeaseOutcome.UNCHANGED, "", LEASE)), waits).lease is LEASE
    )
    assert waits == ["waiting for a GPU: the node's agent has not reported yet"] * 2


def test_a_replica_gives_up_on_a_node_without_free_gpus() -> None:
    refused = LeaseResponse(LeaseOutcome.REFUSED, "needs 2 free GPUs, has 1", retry_after_s=5.0)
    link = Link(refused)
    with pytest.raises(EngineError, match="needs 2 free GPUs, has 1"):
        lease(link)
    assert len(link.calls) == 5
    assert lease(Link(refused, refused, LeaseResponse(LeaseOutcome.GRANTED, "", LEASE))).lease is LEASE


def test_a_held_tier_is_waited_for_as_long_as_it_takes() -> None:
    waits: list[str] = []
    held = StartPermission(False, "tier small is held: it crashes", 5.0)
    link = Link(*[held] * 100, StartPermission(True, ""))
    asyncio.run(client(link, waits).may_start())
    assert waits == ["tier small is held: it crashes"] * 100
    asyncio.run(client(Link(AWAY)).may_start())
