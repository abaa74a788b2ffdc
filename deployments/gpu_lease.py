"""How a replica gets its GPUs: permission to start, and a lease of exact GPUs from the controller.

Ray decides how many GPUs of a node a replica has, the controller decides which: healthy ones that no other
replica holds, and linked ones for tensor parallelism. If the controller does not respond, the replica uses
the GPUs that Ray assigned.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from controlplane.controller.api import ControllerApi, Method, P, R
from controlplane.controller.client import ControllerLink
from controlplane.core.gpus.leases import GpuLease, LeaseOutcome
from controlplane.core.placement.gangs import GangShape
from controlplane.errors import ControllerUnavailable, EngineError

AWAY_LIMIT_S: Final = 5.0
"""How long to wait for a controller that does not respond."""
UNKNOWN_LIMIT_S: Final = 30.0
"""How long to wait for a controller that does not know the node's GPUs yet."""
REFUSED_LIMIT_S: Final = 20.0
"""How long to wait for a free GPU on this node; then the replica stops, and Serve starts another one, perhaps
on another node."""
GENERATION: Final = 1
"""The lease's generation. A replica leases only once; a new replica is another holder."""


@dataclass(frozen=True, slots=True)
class EngineGpus:
    """The GPUs that a replica's engine may use."""

    ids: tuple[str, ...] = ()
    """Values for ``CUDA_VISIBLE_DEVICES``; if empty, the environment is left unchanged."""
    lease: GpuLease | None = None


class GpuLeaseClient:
    """Requests permission and a lease for one replica. ``show_wait`` is called with what the replica waits
    for."""

    def __init__(
        self,
        link: ControllerLink,
        *,
        holder: str,
        tier: str,
        node_id: str,
        show_wait: Callable[[str], None],
        log: Any,
    ) -> None:
        self._link = link
        self._holder = holder
        self._tier = tier
        self._node_id = node_id
        self._show_wait = show_wait
        self._log = log

    async def may_start(self) -> None:
        """Wait until an engine of the tier may be started; returns at once unless the tier is held."""
        while True:
            try:
                permission = await self._call(ControllerApi.may_start, self._tier)
            except ControllerUnavailable as error:
                self._log.warning("starting without the controller's permission", reason=str(error))
                return
            if permission.allowed:
                return
            self._show_wait(permission.reason)
            await asyncio.sleep(permission.retry_after_s)

    async def lease(self, shape: GangShape, assigned: tuple[str, ...]) -> EngineGpus:
        """Leases GPUs for ``shape``. ``assigned`` are the GPUs that Ray assigned; they are used if there is
        no lease.

        Raises EngineError if this node has no free GPUs for it.
        """
        began_s = time.monotonic()
        while True:
            try:
                response = await self._call(
                    ControllerApi.lease_gpus, self._holder, GENERATION, self._node_id, shape, self._tier
                )
            except ControllerUnavailable as error:
                return self._without_lease(assigned, str(error))
            waited_s = time.monotonic() - began_s
            match response.outcome:
                case LeaseOutcome.GRANTED | LeaseOutcome.UNCHANGED if response.lease is not None:
                    self._log.info("GPUs leased", gpus=response.lease.gpu_uuids, reason=response.reason)
                    return EngineGpus(response.lease.gpu_uuids, response.lease)
                case LeaseOutcome.WAIT if waited_s < UNKNOWN_LIMIT_S:
                    self._show_wait(f"waiting for a GPU: {response.reason}")
                case LeaseOutcome.REFUSED if waited_s < REFUSED_LIMIT_S:
                    self._show_wait(f"waiting for a GPU: {response.reason}")
                case LeaseOutcome.REFUSED:
                    raise EngineError(f"no GPU for tier '{self._tier}' on this node: {response.reason}")
                case _:
                    return self._without_lease(assigned, response.reason)
            await asyncio.sleep(max(response.retry_after_s, 0.2))

    async def release(self) -> None:
        """End the lease."""
        await self._link.notify(ControllerApi.release_lease, self._holder, GENERATION)

    def _without_lease(self, assigned: tuple[str, ...], reason: str) -> EngineGpus:
        self._log.warning("no lease, using the GPUs that Ray assigned", gpus=assigned, reason=reason)
        return EngineGpus(assigned)

    async def _call(self, method: Method[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the controller; retries for a short time if it is unavailable."""
        deadline_s = time.monotonic() + AWAY_LIMIT_S
        while True:
            try:
                limit_s = max(0.5, deadline_s - time.monotonic())
                return await self._link.call_within(limit_s, method, *args, **kwargs)
            except ControllerUnavailable:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.2)
