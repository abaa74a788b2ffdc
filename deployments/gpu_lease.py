"""A replica's way to its GPUs: leave to start, and a lease of exact ones from the controller.

Ray says how many GPUs of a node a replica has, the controller says which: healthy ones that nobody else has,
linked ones for tensor parallelism. Without a controller that answers, the replica uses those that Ray named.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from controlplane.controller.api import ControllerApi, Method, P, R
from controlplane.controller.client import ControllerLink, ControllerUnavailable
from controlplane.core.gpus.leases import GpuLease, LeaseOutcome
from controlplane.core.placement.gangs import GangShape
from controlplane.errors import EngineError

AWAY_LIMIT_S: Final = 5.0
"""A controller that does not answer for so long is not waited for."""
UNKNOWN_LIMIT_S: Final = 30.0
"""Nor is one that can't say for so long which GPUs there are."""
REFUSED_LIMIT_S: Final = 20.0
"""A node without GPUs for this replica is left after so long: Serve starts another one, perhaps elsewhere."""
LIFE: Final = 1
"""The lease's generation. A replica leases once; a new one has another name."""


@dataclass(frozen=True, slots=True)
class EngineGpus:
    """What a replica's engine may use."""

    ids: tuple[str, ...] = ()
    """Values for ``CUDA_VISIBLE_DEVICES``; empty: the environment as it is."""
    lease: GpuLease | None = None
    reason: str = ""

    @property
    def uuids(self) -> tuple[str, ...]:
        """Those that are leased."""
        return self.lease.gpu_uuids if self.lease else ()


class GpuLeaseClient:
    """Asks the controller for one replica. ``tell`` is called with what is being waited for, for people."""

    def __init__(
        self,
        link: ControllerLink,
        *,
        holder: str,
        tier: str,
        node_id: str,
        tell: Callable[[str], None],
        log: Any,
    ) -> None:
        self._link = link
        self._holder = holder
        self._tier = tier
        self._node_id = node_id
        self._tell = tell
        self._log = log

    async def may_start(self) -> None:
        """Wait until an engine of the tier may be started: at once, unless the tier is held."""
        while True:
            try:
                permission = await self._call(ControllerApi.may_start, self._holder, self._tier)
            except ControllerUnavailable as error:
                self._log.warning("starting without the controller's leave", reason=str(error))
                return
            if permission.allowed:
                return
            self._tell(permission.reason)
            await asyncio.sleep(permission.retry_after_s)

    async def lease(self, shape: GangShape, given: tuple[str, ...]) -> EngineGpus:
        """GPUs for ``shape``; ``given`` are those that Ray named.

        Raises EngineError if this node has none for it.
        """
        began_s = time.monotonic()
        while True:
            try:
                answer = await self._call(
                    ControllerApi.lease_gpus, self._holder, LIFE, self._node_id, shape, self._tier
                )
            except ControllerUnavailable as error:
                return self._as_given(given, str(error))
            waited_s = time.monotonic() - began_s
            match answer.outcome:
                case LeaseOutcome.GRANTED | LeaseOutcome.UNCHANGED if answer.lease is not None:
                    self._log.info("GPUs leased", gpus=answer.lease.gpu_uuids, reason=answer.reason)
                    return EngineGpus(answer.lease.gpu_uuids, answer.lease, answer.reason)
                case LeaseOutcome.WAIT if waited_s < UNKNOWN_LIMIT_S:
                    self._tell(f"waiting for a GPU: {answer.reason}")
                case LeaseOutcome.REFUSED if waited_s < REFUSED_LIMIT_S:
                    self._tell(f"waiting for a GPU: {answer.reason}")
                case LeaseOutcome.REFUSED:
                    raise EngineError(f"no GPU for tier '{self._tier}' on this node: {answer.reason}")
                case _:
                    return self._as_given(given, answer.reason)
            await asyncio.sleep(max(answer.retry_after_s, 0.2))

    async def release(self) -> None:
        """Give back what is leased."""
        await self._link.notify(ControllerApi.release_lease, self._holder, LIFE)

    def _as_given(self, given: tuple[str, ...], reason: str) -> EngineGpus:
        self._log.warning("no lease, using the GPUs that Ray named", gpus=given, reason=reason)
        return EngineGpus(given, None, reason)

    async def _call(self, method: Method[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the controller, for a short time also one that is just not there."""
        deadline_s = time.monotonic() + AWAY_LIMIT_S
        while True:
            try:
                limit_s = max(0.5, deadline_s - time.monotonic())
                return await self._link.call_within(limit_s, method, *args, **kwargs)
            except ControllerUnavailable:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.2)
