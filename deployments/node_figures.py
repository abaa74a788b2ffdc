"""The gateway's metrics of nodes: it asks the controller for them, apart from any request."""

from __future__ import annotations

import asyncio
import time
from typing import Final, NoReturn

from controlplane.errors import TierplaneError
from controlplane.gateway.api.controller_queries import query_controller
from controlplane.gateway.gateway import Gateway

INTERVAL_S: Final = 10.0
FORGET_AFTER_S: Final = 60.0
"""Without an answer from the controller for this long, the figures are no longer exported."""


async def watch_nodes(gateway: Gateway) -> NoReturn:
    """Export the nodes' figures until cancelled."""
    known_s = time.monotonic()
    while True:
        try:
            gateway.metrics.observe_nodes(
                await query_controller(gateway.controller, lambda controller: controller.nodes())
            )
            known_s = time.monotonic()
        except TierplaneError:
            if time.monotonic() - known_s > FORGET_AFTER_S:
                gateway.metrics.observe_nodes(())
        await asyncio.sleep(INTERVAL_S)
