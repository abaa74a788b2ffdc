"""Grants leases of exact GPUs to replicas that Ray has placed on a node.

The placement planner chooses the GPUs, the lease table records them. While information is lacking (a node's
agent has not reported yet, or a restarted controller does not know all holders again), a request is not
refused: its outcome is WAIT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from controlplane.core.gpus.allocation import choose_gpus, parts_of
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import (
    GpuCapacity,
    GpuLease,
    GpuPart,
    LeaseOutcome,
    LeaseResponse,
    LeaseTable,
)
from controlplane.core.placement.gangs import GangShape, Infeasible
from controlplane.core.placement.topology import Node
from controlplane.core.telemetry.samples import Missing

WAIT_RETRY_S = 1.0
"""When to repeat a request after WAIT."""
REFUSED_RETRY_S = 5.0
"""When to repeat a request after a refusal: a GPU may have become free or returned to use."""


class LeaseAllocator:
    """Chooses GPUs for leases, given the GPU inventory, and records the leases in :attr:`table`."""

    def __init__(self, inventory: GpuInventory) -> None:
        self._inventory = inventory
        self.table = LeaseTable()

    def acquire(
        self, holder: str, generation: int, node_id: str, shape: GangShape, *, now_s: float, wait: str = ""
    ) -> LeaseResponse:
        """Leases GPUs of the node for ``shape``. ``wait`` is why nothing can be granted yet, or empty."""
        held = self.table.leases.get(holder)
        if held is not None and held.generation == generation and held.node_id == node_id:
            return self.table.acquire(holder, held.parts, {}, generation=generation, now_s=now_s)
        if not shape.total_gpus:
            return LeaseResponse(LeaseOutcome.REFUSED, "no GPU was requested")
        if wait:
            return LeaseResponse(LeaseOutcome.WAIT, wait, retry_after_s=WAIT_RETRY_S)
        node = self._inventory.node(node_id)
        if node is None:
            reason = "the node's agent has not reported yet"
            return LeaseResponse(LeaseOutcome.WAIT, reason, retry_after_s=WAIT_RETRY_S)
        if not node.gpus:
            return LeaseResponse(LeaseOutcome.UNMANAGED, self._why_no_gpus(node_id))
        others = [lease for lease in self.table.on_node(node_id) if lease.holder != holder]
        found = choose_gpus(node, shape, others)
        if isinstance(found, Infeasible):
            node = self._inventory.node(node_id, last_resort=True) or node
            found = choose_gpus(node, shape, others)
        if isinstance(found, Infeasible):
            why = "; ".join(str(refusal) for refusal in found.refusals) or found.why
            return LeaseResponse(LeaseOutcome.REFUSED, why, retry_after_s=REFUSED_RETRY_S)
        parts, capacities = parts_of(found), _capacities(node)
        response = self.table.acquire(holder, parts, capacities, generation=generation, now_s=now_s)
        return replace(response, reason=found.why) if response.outcome is LeaseOutcome.GRANTED else response

    def restore(
        self, holder: str, generation: int, node_id: str, parts: Iterable[GpuPart], now_s: float
    ) -> LeaseResponse:
        """Records the lease that a running holder reports."""
        [response] = self.table.restore([GpuLease(holder, generation, node_id, tuple(parts), now_s)])
        return response

    def renew(self, holder: str, now_s: float) -> bool:
        """The holder has reported; False if it has no lease."""
        return self.table.renew(holder, now_s)

    def _why_no_gpus(self, node_id: str) -> str:
        latest = self._inventory.nodes[node_id].latest
        driver = latest.driver_version if latest else None
        return driver.reason if isinstance(driver, Missing) else "the node has no readable GPU"


def _capacities(node: Node) -> dict[str, GpuCapacity]:
    return {
        gpu.uuid: GpuCapacity(gpu.uuid, node.node_id, gpu.memory_bytes, node.unavailable or gpu.unavailable)
        for gpu in node.gpus
    }
