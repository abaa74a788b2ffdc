"""Whether a replica that has to leave could start elsewhere first.

A search costs up to 50 ms on 10,000 GPUs. So at most one is made per tick, and its result is reused for
:data:`SEARCH_AGAIN_S`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Final

from controlplane.core.domain.endpoint import SERVING, Endpoint
from controlplane.core.gpus.allocation import find_room, shape_of, still_room
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import LeaseTable
from controlplane.core.placement.gangs import GangShape, Placement

SEARCH_AGAIN_S: Final = 15.0
"""How long the result of a search is reused."""


class MigrationRoom:
    """Searches for GPUs elsewhere, and caches the results."""

    def __init__(self, inventory: GpuInventory, leases: LeaseTable) -> None:
        self._inventory = inventory
        self._leases = leases
        self._found: dict[str, tuple[float, Placement | None]] = {}
        """Endpoint id → the time of the search, and where a replica like it would go."""

    def find(
        self,
        leaving: Iterable[str],
        endpoints: Mapping[str, Endpoint],
        shapes: Mapping[str, GangShape],
        now_s: float,
    ) -> dict[str, str]:
        """Endpoint id → where another replica like it would go, in words; empty means nowhere. A replica
        has no entry before the first search for it. ``shapes`` are those that holders requested."""
        searched = False
        found = {}
        for endpoint_id in sorted(leaving):
            endpoint = endpoints[endpoint_id]
            if endpoint.state not in SERVING:
                continue
            lease = self._leases.leases.get(endpoint_id)
            if lease is None:
                found[endpoint_id] = "wherever Ray schedules it"
                continue
            result = self._found.get(endpoint_id)
            if result is None or now_s - result[0] >= SEARCH_AGAIN_S:
                if searched:
                    continue
                searched = True
                shape = shapes.get(endpoint_id) or shape_of(lease)
                result = (now_s, find_room(self._inventory, self._leases, shape, endpoint.tier, endpoints))
                self._found[endpoint_id] = result
            placement = result[1]
            found[endpoint_id] = f"on {', '.join(placement.node_ids)}" if placement else ""
        return found

    def still_there(self, endpoint_id: str) -> bool:
        """Whether the GPUs that were found for a replica are still free. If not, the next :meth:`find`
        searches again."""
        result = self._found.get(endpoint_id)
        if result is None or result[1] is None:
            return True
        if still_room(self._inventory, self._leases, result[1]):
            return True
        del self._found[endpoint_id]
        return False

    def keep_only(self, endpoint_ids: Container[str]) -> None:
        """Drop the results for all other endpoints."""
        for gone in [name for name in self._found if name not in endpoint_ids]:
            del self._found[gone]
