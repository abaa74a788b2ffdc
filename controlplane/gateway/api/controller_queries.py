"""Queries to the controller for the pages whose data only the controller has: ``/report``, ``/gpus``,
``/nodes`` and ``/recommendations``.

The gateway waits at most :data:`QUERY_TIMEOUT_S` for the result. Requests to models never wait for the
controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

from controlplane.core.gpus.node_views import NodeView
from controlplane.core.gpus.views import GpuView
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reports.report import PlaneReport
from controlplane.errors import ControllerUnreachable, RequestError, TierplaneError

QUERY_TIMEOUT_S: Final = 4.0
RETRY_AFTER_S: Final = 5.0

R = TypeVar("R")


class ControllerQueries(Protocol):
    """What these pages need from the controller. Each method raises a TierplaneError if the controller can't
    be reached."""

    async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """The result of the controller's query ``name``, one of
        :data:`controlplane.gateway.api.operator_queries.ARGUMENTS`."""
        ...

    async def plane_report(self, window_minutes: float) -> PlaneReport:
        """The report on all tiers and endpoints over the last ``window_minutes``."""
        ...

    async def gpus(self) -> tuple[GpuView, ...]:
        """Every GPU with its health, lease holders and last readings."""
        ...

    async def nodes(self) -> tuple[NodeView, ...]:
        """Every node with its CPUs, memory and disks."""
        ...

    async def scaling(self) -> ScalingReport:
        """Targets with their reasons, and recommendations."""
        ...


async def query_controller(
    controller: ControllerQueries | None,
    query: Callable[[ControllerQueries], Awaitable[R]],
    *,
    timeout_s: float = QUERY_TIMEOUT_S,
) -> R:
    """The controller's response to ``query``. Raises ControllerUnreachable (503) if none arrives within
    ``timeout_s``."""
    if controller is None:
        raise ControllerUnreachable("this gateway has no controller", retry_after_s=RETRY_AFTER_S)
    try:
        return await asyncio.wait_for(query(controller), timeout_s)
    except RequestError:
        raise
    except TimeoutError as error:
        message = f"the controller did not respond within {timeout_s:g} s"
        raise ControllerUnreachable(message, retry_after_s=RETRY_AFTER_S) from error
    except TierplaneError as error:
        raise ControllerUnreachable(str(error), retry_after_s=RETRY_AFTER_S) from error
