"""The controller as a Ray actor, and how replicas and gateways talk to it.

There is one named, detached actor per namespace. It needs no CPU, Ray restarts it when its process dies, and
whoever finds none creates it. Calls to it never lie on a request's path: replicas and gateways run the loops
below as background tasks, which wait, try again and go on with what they know while it is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, cast

import ray
import structlog
from ray.exceptions import ActorDiedError, RayActorError, RayError

from controlplane.adapters import observability
from controlplane.config import ControllerConfig, PlaneConfig
from controlplane.controller import Controller
from controlplane.core.domain import ClusterSnapshot, Endpoint, Event, GatewayInfo, TierSpec
from controlplane.errors import TierplaneError
from controlplane.paths import run_dir

CONTROLLER_NAME = "tierplane-controller"
LONG_POLL_S = 20.0
CALL_TIMEOUT_S = 5.0
RETRY_S = 0.25
IDLE_EXIT_S = 300.0
"""A controller that knows nobody for this long ends: nothing of a plane that is gone stays behind."""

log = structlog.stdlib.get_logger(__name__)


class ControllerUnavailable(TierplaneError):
    """The controller can't be reached now; it will be back."""


def tier_specs(config: PlaneConfig) -> tuple[TierSpec, ...]:
    """What the controller needs to know of the configuration's tiers."""
    return tuple(
        TierSpec(tier.name, tier.model_id, tier.engine, tier.replicas, tier.concurrency_limit)
        for tier in config.tiers
    )


class ControllerActor:
    """The actor's body: the registry in an event loop, with a long poll for its snapshots."""

    async def __init__(self, config: ControllerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        observability.setup(
            config.log_format,
            config.log_level,
            file=run_dir() / "logs" / "controller.log",
            component="controller",
        )
        self._heartbeat_s = config.heartbeat_s
        self._controller = Controller(
            epoch=f"{int(time.time()):x}-{secrets.token_hex(4)}",
            heartbeat_s=config.heartbeat_s,
            now_s=time.monotonic,
            unix_s=time.time,
        )
        self._change = asyncio.Event()
        self._version = self._controller.version
        self._logged = 0
        self._tick = asyncio.create_task(self._run())
        self._wake()

    async def declare(self, tiers: tuple[TierSpec, ...], heartbeat_s: float) -> None:
        """See :meth:`Controller.declare`."""
        self._heartbeat_s = heartbeat_s
        self._controller.declare(tiers, heartbeat_s)

    async def register(self, endpoint: Endpoint) -> None:
        """See :meth:`Controller.register`."""
        self._controller.register(endpoint)
        self._wake()

    async def report(self, endpoint: Endpoint) -> bool:
        """See :meth:`Controller.report`."""
        known = self._controller.report(endpoint)
        self._wake()
        return known

    async def deregister(self, endpoint_id: str, reason: str) -> None:
        """See :meth:`Controller.deregister`."""
        self._controller.deregister(endpoint_id, reason)
        self._wake()

    async def gateway_report(self, info: GatewayInfo) -> bool:
        """See :meth:`Controller.gateway_report`."""
        known = self._controller.gateway_report(info)
        self._wake()
        return known

    async def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """See :meth:`Controller.gateway_gone`."""
        self._controller.gateway_gone(gateway_id, reason)
        self._wake()

    async def still_running(self, endpoint_id: str) -> int | None:
        """See :meth:`Controller.still_running`."""
        return self._controller.still_running(endpoint_id)

    async def snapshot(self, epoch: str, version: int, wait_s: float) -> ClusterSnapshot | None:
        """For gateways, with secrets: what is newer than ``(epoch, version)``; None if nothing is for
        ``wait_s``."""
        if epoch == self._controller.epoch and version >= self._controller.version:
            try:
                await asyncio.wait_for(self._change.wait(), wait_s)
            except TimeoutError:
                return None
        return self._controller.snapshot(secrets=True)

    async def status(self) -> tuple[ClusterSnapshot, tuple[TierSpec, ...], tuple[Event, ...]]:
        """For people, without secrets: endpoints and gateways, what the configuration asks for, events."""
        return self._controller.snapshot(secrets=False), self._controller.tiers, self._controller.events

    def _wake(self) -> None:
        if self._controller.events[-1].number > self._logged:
            for event in self._controller.events:
                if event.number > self._logged:
                    log.info(event.kind, subject=event.subject, tier=event.tier, reason=event.reason)
            self._logged = self._controller.events[-1].number
        if self._controller.version != self._version:
            self._version = self._controller.version
            self._change.set()
            self._change = asyncio.Event()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self._controller.expire()
            self._wake()
            if self._controller.empty_for_s() > IDLE_EXIT_S:
                log.info("nobody is left, ending")
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]


def get_or_create_controller(config: ControllerConfig) -> Any:
    """The controller's actor handle, made if there is none. Blocks; not for an event loop."""
    actor = ray.remote(ControllerActor)
    return actor.options(
        name=CONTROLLER_NAME,
        namespace=config.namespace,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        # A call that was lost with the process is made again by whoever made it, knowing that it was.
        max_task_retries=0,
        # Each gateway holds one call open.
        max_concurrency=10_000,
    ).remote(config)


def find_controller(namespace: str) -> Any | None:
    """The controller's actor handle; None if there is none. Blocks."""
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace=namespace)
    except ValueError:
        return None


class ControllerLink:
    """Calls to the controller from one event loop: finds or creates it, and finds it again."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self._handle: Any | None = None

    async def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call a method of the actor. Raises ControllerUnavailable; it may or may not have happened then."""
        try:
            if self._handle is None:
                # Looking an actor up asks Ray's head and blocks while that is away.
                self._handle = await asyncio.to_thread(get_or_create_controller, self._config)
            return await asyncio.wait_for(_result(getattr(self._handle, method).remote(*args)), timeout_s)
        except ActorDiedError as error:
            self._handle = None
            raise ControllerUnavailable(f"the controller is gone: {_brief(error)}") from error
        except TimeoutError as error:
            raise ControllerUnavailable(f"the controller did not answer in {timeout_s:g} s") from error
        except (RayActorError, RayError, OSError, RuntimeError) as error:
            raise ControllerUnavailable(f"the controller can't be reached: {_brief(error)}") from error

    async def tell(self, method: str, *args: Any, timeout_s: float = 2.0) -> bool:
        """Call a method if the controller is there; False if it is not. For what a leaving replica says."""
        try:
            await self.call(method, *args, timeout_s=timeout_s)
        except ControllerUnavailable as error:
            log.info("could not tell the controller", call=method, reason=str(error))
            return False
        return True


class EndpointReporter:
    """Keeps the controller informed of one endpoint: at once on a change, and every ``heartbeat_s``."""

    def __init__(self, link: ControllerLink, endpoint: Endpoint, heartbeat_s: float) -> None:
        self._link = link
        self._endpoint = endpoint
        self._heartbeat_s = heartbeat_s
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def endpoint(self) -> Endpoint:
        """What is reported now."""
        return self._endpoint

    def update(self, endpoint: Endpoint) -> None:
        """Report this from now on. May be called from any thread; returns at once."""
        self._endpoint = endpoint
        self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> NoReturn:
        """Report until cancelled."""
        while True:
            self._changed.clear()
            await _patiently("report", self._report)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._heartbeat_s)

    async def flush(self) -> None:
        """Report now, unless the controller is away."""
        try:
            await self._report()
        except ControllerUnavailable as error:
            log.info("could not tell the controller", call="report", reason=str(error))

    async def _report(self) -> None:
        if not await self._link.call("report", self._endpoint):
            await self._link.call("register", self._endpoint)


async def report_gateway(
    link: ControllerLink,
    config: PlaneConfig,
    info: Callable[[], GatewayInfo],
    *,
    interval_s: Callable[[], float],
    hurry: asyncio.Event,
) -> NoReturn:
    """Report a gateway's load until cancelled, every ``interval_s`` and whenever ``hurry`` is set.

    To a controller that does not know the gateway it also says what the configuration asks for.
    """

    async def report() -> None:
        hurry.clear()
        if not await link.call("gateway_report", info()):
            await link.call("declare", tier_specs(config), config.controller.heartbeat_s)

    while True:
        await _patiently("gateway_report", report)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurry.wait(), interval_s())


async def pull_snapshots(link: ControllerLink, apply: Callable[[ClusterSnapshot], None]) -> NoReturn:
    """Hand each new snapshot to ``apply`` until cancelled; while the controller is away, nothing changes.

    A restarted controller's first snapshots are incomplete: the receiver merges
    (:mod:`controlplane.core.snapshot`).
    """
    epoch, version = "", 0

    async def pull() -> None:
        nonlocal epoch, version
        limit_s = LONG_POLL_S + CALL_TIMEOUT_S
        answer = await link.call("snapshot", epoch, version, LONG_POLL_S, timeout_s=limit_s)
        new = cast(ClusterSnapshot | None, answer)
        if new is not None:
            epoch, version = new.epoch, new.version
            apply(new)

    while True:
        await _patiently("snapshot", pull)


async def _patiently(what: str, attempt: Callable[[], Awaitable[None]]) -> None:
    """Do it once, trying again while the controller is away; logs when that begins and ends."""
    away_since_s: float | None = None
    while True:
        try:
            await attempt()
        except ControllerUnavailable as error:
            if away_since_s is None:
                away_since_s = time.monotonic()
                log.warning("controller away, going on without it", call=what, reason=str(error))
            await asyncio.sleep(RETRY_S)
        else:
            if away_since_s is not None:
                away_s = round(time.monotonic() - away_since_s, 2)
                log.info("controller is back", call=what, away_s=away_s)
            return


async def _result(ref: Any) -> Any:
    return await ref


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
