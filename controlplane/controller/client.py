"""The replicas' and gateways' side of the controller (:mod:`controlplane.controller.actor`).

No request waits for a call to the controller: replicas and gateways run the loops below as background tasks.
While the controller is away, they retry, and their process goes on with the last state it received.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import structlog
from ray.exceptions import ActorDiedError, RayActorError, RayError

from controlplane.config import ControllerConfig
from controlplane.controller.actor import get_or_create_controller
from controlplane.controller.api import ControllerApi, Method, P, R
from controlplane.controller.handle import ControllerHandle
from controlplane.core.access.keys import KeyTable
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.gpus.leases import GpuLease, LeaseOutcome
from controlplane.core.gpus.node_views import NodeView
from controlplane.core.gpus.views import GpuView
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reconcile.commands import ReplicaCommand
from controlplane.core.reports.report import PlaneReport
from controlplane.errors import ControllerUnavailable

LONG_POLL_S = 20.0
"""How long the controller may hold a call for the next snapshot."""
CALL_TIMEOUT_S = 5.0
LEAVING_TIMEOUT_S = 2.0
"""For the last call of a process that ends."""
RETRY_S = 0.25

log = structlog.stdlib.get_logger(__name__)


class ControllerLink:
    """Calls to the controller from one event loop. Finds or creates the controller at the first call, and
    again after it was lost."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self._handle: ControllerHandle | None = None

    async def call(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of :class:`ControllerApi` within :data:`CALL_TIMEOUT_S`.

        Raises ControllerUnavailable; the call may or may not have had its effect then.
        """
        return await self.call_within(CALL_TIMEOUT_S, method, *args, **kwargs)

    async def call_within(
        self, timeout_s: float, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """:meth:`call` with another timeout."""
        try:
            if self._handle is None:
                # Looking up an actor queries Ray's head, and blocks while the head is down.
                self._handle = await asyncio.to_thread(get_or_create_controller, self._config)
            return await asyncio.wait_for(self._handle.call(method, *args, **kwargs), timeout_s)
        except ActorDiedError as error:
            self._handle = None
            raise ControllerUnavailable(f"the controller is gone: {_brief(error)}") from error
        except TimeoutError as error:
            raise ControllerUnavailable(f"the controller did not answer in {timeout_s:g} s") from error
        except (RayActorError, RayError, OSError, RuntimeError) as error:
            raise ControllerUnavailable(f"the controller can't be reached: {_brief(error)}") from error

    async def notify(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Call a method within :data:`LEAVING_TIMEOUT_S`; False if the controller can't be reached. For a
        process that is about to end."""
        try:
            await self.call_within(LEAVING_TIMEOUT_S, method, *args, **kwargs)
        except ControllerUnavailable as error:
            log.info("the controller could not be reached", call=method.__name__, reason=str(error))
            return False
        return True


class EndpointReporter:
    """Reports one endpoint to the controller: at once on a change, and every ``heartbeat_s``.

    ``on_commands`` gets the replica's commands. The controller repeats a command in every response until the
    command was carried out, so repeating it must have no further effect. It is called in the event loop and
    must return quickly.
    """

    def __init__(
        self,
        link: ControllerLink,
        endpoint: Endpoint,
        heartbeat_s: float,
        *,
        on_commands: Callable[[tuple[ReplicaCommand, ...]], None] | None = None,
    ) -> None:
        self._link = link
        self._endpoint = endpoint
        self._heartbeat_s = heartbeat_s
        self._on_commands = on_commands
        self._lease: GpuLease | None = None
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def hold(self, lease: GpuLease) -> None:
        """The endpoint holds this lease from now on. It is reported to any controller that does not know it,
        such as a restarted one."""
        self._lease = lease

    def update(self, endpoint: Endpoint) -> None:
        """Report this state from now on. May be called from any thread; returns at once."""
        self._endpoint = endpoint
        self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> NoReturn:
        """Report until cancelled."""
        while True:
            self._changed.clear()
            await _until_reached("report", self._report)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._heartbeat_s)

    async def flush(self) -> None:
        """Report once, if the controller can be reached."""
        try:
            await self._report()
        except ControllerUnavailable as error:
            log.info("the controller could not be reached", call="report", reason=str(error))

    async def _report(self) -> None:
        response = await self._link.call(ControllerApi.report, self._endpoint)
        if not response.known:
            await self._link.call(ControllerApi.register, self._endpoint)
        lease = self._lease
        if lease is not None and not (response.known and response.lease_known):
            restored = await self._link.call(
                ControllerApi.restore_lease, lease.holder, lease.generation, lease.node_id, lease.parts
            )
            if restored.outcome is LeaseOutcome.REFUSED:
                log.warning("the lease was refused", gpus=lease.gpu_uuids, reason=restored.reason)
        if response.commands and self._on_commands is not None:
            self._on_commands(response.commands)


class RemoteController:
    """The controller's data for a gateway's pages. Each method raises ControllerUnavailable."""

    def __init__(self, link: ControllerLink) -> None:
        self._link = link

    async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """The result of a query of :class:`ControllerApi` by its name."""
        return await self._link.call(getattr(ControllerApi, name), **arguments)

    async def plane_report(self, window_minutes: float) -> PlaneReport:
        """See :meth:`ControllerApi.plane_report`."""
        return await self._link.call(ControllerApi.plane_report, window_minutes)

    async def gpus(self) -> tuple[GpuView, ...]:
        """See :meth:`ControllerApi.gpus`."""
        return await self._link.call(ControllerApi.gpus)

    async def nodes(self) -> tuple[NodeView, ...]:
        """See :meth:`ControllerApi.nodes`."""
        return await self._link.call(ControllerApi.nodes)

    async def scaling(self) -> ScalingReport:
        """See :meth:`ControllerApi.scaling`."""
        return await self._link.call(ControllerApi.scaling)


async def report_gateway(
    link: ControllerLink,
    config: ControllerConfig,
    specs: Callable[[], tuple[TierSpec, ...]],
    info: Callable[[], GatewayInfo],
    *,
    interval_s: Callable[[], float],
    report_now: asyncio.Event,
    delivered: Callable[[GatewayInfo], None] | None = None,
) -> NoReturn:
    """Report a gateway's load until cancelled, every ``interval_s`` and whenever ``report_now`` is set.

    To a controller that does not know the gateway, the configuration is declared too. ``specs`` returns its
    tiers; it is called once, in a thread, and may block. ``delivered`` is called with each report that has
    arrived.
    """

    tiers = await asyncio.to_thread(specs)
    declared = False

    async def report() -> None:
        nonlocal declared
        report_now.clear()
        sent = info()
        known = await link.call(ControllerApi.gateway_report, sent)
        if delivered is not None:
            delivered(sent)
        declared = declared and known
        if not declared:  # Also when an earlier report arrived but the declaration after it did not.
            await link.call(ControllerApi.declare, tiers, config.heartbeat_s, config.scaling, config.alerts)
            declared = True

    while True:
        await _until_reached("gateway_report", report)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(report_now.wait(), interval_s())


async def pull_snapshots(link: ControllerLink, apply: Callable[[ClusterSnapshot], None]) -> NoReturn:
    """Pass each new snapshot to ``apply`` until cancelled.

    The first snapshots of a restarted controller are incomplete; ``apply`` has to merge them
    (:func:`controlplane.core.cluster.snapshot.merge`).
    """
    epoch, version = "", 0

    async def pull() -> None:
        nonlocal epoch, version
        limit_s = LONG_POLL_S + CALL_TIMEOUT_S
        new = await link.call_within(limit_s, ControllerApi.snapshot, epoch, version, LONG_POLL_S)
        if new is not None:
            epoch, version = new.epoch, new.version
            apply(new)

    while True:
        await _until_reached("snapshot", pull)


async def pull_keys(
    link: ControllerLink, changed: asyncio.Event, apply: Callable[[KeyTable], None]
) -> NoReturn:
    """Pass the API keys to ``apply`` whenever ``changed`` is set, until cancelled."""

    async def pull() -> None:
        changed.clear()
        apply(await link.call(ControllerApi.key_table))

    while True:
        await changed.wait()
        await _until_reached("key_table", pull)


async def _until_reached(what: str, attempt: Callable[[], Awaitable[None]]) -> None:
    """Run ``attempt`` until the controller can be reached; logs when the controller is away and back
    again."""
    away_since_s: float | None = None
    while True:
        try:
            await attempt()
        except ControllerUnavailable as error:
            if away_since_s is None:
                away_since_s = time.monotonic()
                log.warning("the controller is away, going on without it", call=what, reason=str(error))
            await asyncio.sleep(RETRY_S)
        else:
            if away_since_s is not None:
                away_s = round(time.monotonic() - away_since_s, 2)
                log.info("the controller is back", call=what, away_s=away_s)
            return


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
