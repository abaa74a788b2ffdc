"""The loops in which replicas and gateways call the controller, without Ray."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from controlplane.config import ControllerConfig, parse_plane
from controlplane.controller.api import ControllerApi, Method, P, R
from controlplane.controller.client import (
    ControllerLink,
    EndpointReporter,
    pull_snapshots,
    report_gateway,
)
from controlplane.controller.controller import Controller
from controlplane.controller.registry import Registry
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.errors import ControllerUnavailable
from controlplane.planning.tier_specs import tier_specs
from tests.support.endpoints import make_endpoint
from tests.support.waiting import until_async

PLANE = parse_plane({"tiers": [{"name": "balanced", "engine": "simulated", "replicas": 2}]})
ENDPOINT = make_endpoint(generation=1)


def specs() -> tuple[TierSpec, ...]:
    return tier_specs(PLANE)


class DirectLink(ControllerLink):
    """Calls a real registry instead of an actor; ``away`` makes it unreachable."""

    def __init__(self) -> None:
        super().__init__(ControllerConfig())
        self.calls: list[str] = []
        self.away = False
        self.loses: list[str] = []
        """Methods whose next call does not arrive."""
        self.start("e1")

    def start(self, epoch: str) -> None:
        self.registry = Registry(epoch=epoch, heartbeat_s=1.0, now_s=lambda: 0.0, unix_s=lambda: 0.0)
        self.controller = Controller(
            self.registry, heartbeat_s=1.0, now_s=lambda: 0.0, unix_s=lambda: 0.0, settle_s=0.0
        )

    async def call_within(
        self, timeout_s: float, call: Method[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Any:
        method = call.__name__
        arguments: tuple[Any, ...] = args
        await asyncio.sleep(0)
        self.calls.append(method)
        if self.away:
            raise ControllerUnavailable("away")
        if method in self.loses:
            self.loses.remove(method)
            raise ControllerUnavailable("lost")
        if method == "snapshot":
            epoch, version, _ = arguments
            await until_async(
                lambda: self.away or epoch != self.registry.epoch or version < self.registry.version
            )
            if self.away:
                raise ControllerUnavailable("away")
            return self.registry.snapshot(secrets=True)
        if method == "declare":
            arguments = arguments[:2]  # what scaling and alerts are to do is the actor's
        owner = self.controller if hasattr(self.controller, method) else self.registry
        return getattr(owner, method)(*arguments)


@contextlib.asynccontextmanager
async def running(loop: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(loop)
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def known(link: DirectLink) -> tuple[Endpoint, ...]:
    return link.registry.snapshot(secrets=True).endpoints


async def test_a_reporter_registers_reports_and_leaves() -> None:
    link = DirectLink()
    reporter = EndpointReporter(link, ENDPOINT, heartbeat_s=60)
    async with running(reporter.run()):
        await until_async(lambda: known(link) == (ENDPOINT,))
        draining = replace(ENDPOINT, state=EndpointState.DRAINING)
        reporter.update(draining)
        await until_async(lambda: known(link) == (draining,))


async def test_a_reporter_takes_changes_from_other_threads() -> None:
    link = DirectLink()
    reporter = EndpointReporter(link, ENDPOINT, heartbeat_s=60)
    async with running(reporter.run()):
        await until_async(lambda: known(link))
        restarting = replace(ENDPOINT, state=EndpointState.RESTARTING)
        await asyncio.to_thread(reporter.update, restarting)
        await until_async(lambda: known(link) == (restarting,))


async def test_a_reporter_registers_with_a_controller_that_has_restarted() -> None:
    link = DirectLink()
    async with running(EndpointReporter(link, ENDPOINT, heartbeat_s=0.01).run()):
        await until_async(lambda: known(link))
        link.start("e2")
        await until_async(lambda: known(link) == (ENDPOINT,))


async def test_a_reporter_goes_on_while_the_controller_is_away() -> None:
    link = DirectLink()
    link.away = True
    reporter = EndpointReporter(link, ENDPOINT, heartbeat_s=0.01)
    async with running(reporter.run()):
        await until_async(lambda: len(link.calls) > 1)
        link.away = False
        await until_async(lambda: known(link) == (ENDPOINT,))


async def test_the_last_call_of_a_process_does_not_wait_for_the_controller() -> None:
    link = DirectLink()
    link.away = True
    assert not await link.notify(ControllerApi.deregister, "balanced-1", "stopped")
    await EndpointReporter(link, ENDPOINT, heartbeat_s=1).flush()
    link.away = False
    assert await link.notify(ControllerApi.deregister, "balanced-1", "stopped")


async def test_snapshots_are_pulled_once_each_and_across_a_restart() -> None:
    link = DirectLink()
    got: list[ClusterSnapshot] = []
    async with running(pull_snapshots(link, got.append)):
        await until_async(lambda: len(got) == 1)
        link.registry.register(ENDPOINT)
        await until_async(lambda: len(got) == 2)
        assert got[1].endpoints == (ENDPOINT,)
        link.away = True
        await until_async(lambda: link.calls.count("snapshot") > 3)
        link.start("e2")
        link.away = False
        await until_async(lambda: len(got) == 3)
    assert [(each.epoch, each.warming) for each in got] == [("e1", True), ("e1", True), ("e2", True)]


async def test_an_error_in_the_receiver_ends_the_pull() -> None:
    def broken(_: ClusterSnapshot) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await pull_snapshots(DirectLink(), broken)


async def test_a_gateway_declares_to_a_controller_that_does_not_know_it() -> None:
    link = DirectLink()
    report_now = asyncio.Event()
    info = GatewayInfo("g1", "n1", "")
    async with running(
        report_gateway(
            link, PLANE.controller, specs, lambda: info, interval_s=lambda: 0.01, report_now=report_now
        )
    ):
        await until_async(lambda: link.registry.tiers == tier_specs(PLANE))
        await until_async(lambda: link.calls.count("gateway_report") > 2)
        assert link.calls.count("declare") == 1
        link.start("e2")
        await until_async(lambda: link.registry.tiers == tier_specs(PLANE))


async def test_a_gateway_declares_again_if_only_the_declaration_was_lost() -> None:
    link = DirectLink()
    link.loses = ["declare"]
    info = GatewayInfo("g1", "n1", "")
    reporting = report_gateway(
        link, PLANE.controller, specs, lambda: info, interval_s=lambda: 0.01, report_now=asyncio.Event()
    )
    async with running(reporting):
        await until_async(lambda: link.registry.declared)
    assert link.calls.count("declare") == 2


async def test_only_a_report_that_arrived_is_called_delivered() -> None:
    link = DirectLink()
    link.loses = ["gateway_report"]
    made: list[GatewayInfo] = []
    delivered: list[GatewayInfo] = []

    def info() -> GatewayInfo:
        made.append(GatewayInfo("g1", "n1", "", in_flight=len(made)))
        return made[-1]

    reporting = report_gateway(
        link,
        PLANE.controller,
        specs,
        info,
        interval_s=lambda: 60.0,
        report_now=asyncio.Event(),
        delivered=delivered.append,
    )
    async with running(reporting):
        await until_async(lambda: bool(delivered))
    assert len(made) > 1
    assert delivered == made[1:2]


async def test_a_gateway_reports_at_once_when_asked_to() -> None:
    link = DirectLink()
    report_now = asyncio.Event()
    info = GatewayInfo("g1", "n1", "")
    async with running(
        report_gateway(
            link, PLANE.controller, specs, lambda: info, interval_s=lambda: 60.0, report_now=report_now
        )
    ):
        await until_async(lambda: link.calls.count("gateway_report") == 1)
        report_now.set()
        await until_async(lambda: link.calls.count("gateway_report") == 2)


def test_the_tiers_of_a_declaration_are_the_configured_ones() -> None:
    (spec,) = tier_specs(PLANE)
    assert (spec.name, spec.model, spec.replicas) == ("balanced", "simulated-balanced", 2)
