"""Leases of exact GPUs: what a replica that Ray has put on a node may use there.

The placement chooses, the book keeps. Nothing is refused for what is only not known yet: a node whose agent
has not reported, or a controller that does not know all holders again after a restart, answers «wait».
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
    LeaseBook,
    LeaseOutcome,
    LeaseResponse,
)
from controlplane.core.placement.gangs import GangShape, Infeasible
from controlplane.core.placement.topology import Node
from controlplane.core.telemetry.samples import Missing

ASK_AGAIN_S = 1.0
REFUSED_AGAIN_S = 5.0
"""A GPU may become free or return: a refused holder may ask again after so long."""


class LeaseAllocator:
    """The book of leases beside the fleet it is about."""

    def __init__(self, fleet: GpuInventory) -> None:
        self._fleet = fleet
        self.book = LeaseBook()

    def acquire(
        self,
        holder: str,
        generation: int,
        node_id: str,
        shape: GangShape,
        *,
        now_s: float,
        wait: str = "",
    ) -> LeaseResponse:
        """GPUs of the node for ``shape``; ``wait`` is why nothing can be given away yet."""
        held = self.book.leases.get(holder)
        if held is not None and held.generation == generation and held.node_id == node_id:
            return self.book.acquire(holder, held.parts, {}, generation=generation, now_s=now_s)
        if not shape.total_gpus:
            return LeaseResponse(LeaseOutcome.REFUSED, "no GPU was asked for")
        if wait:
            return LeaseResponse(LeaseOutcome.WAIT, wait, retry_after_s=ASK_AGAIN_S)
        usual = self._fleet.node(node_id)
        if usual is None:
            reason = "the node's agent has not reported yet"
            return LeaseResponse(LeaseOutcome.WAIT, reason, retry_after_s=ASK_AGAIN_S)
        if not usual.gpus:
            return LeaseResponse(LeaseOutcome.UNMANAGED, self._why_none(node_id))
        others = [lease for lease in self.book.on_node(node_id) if lease.holder != holder]
        node, found = usual, choose_gpus(usual, shape, others)
        if isinstance(found, Infeasible):
            node = self._fleet.node(node_id, last_resort=True) or usual
            found = choose_gpus(node, shape, others)
        if isinstance(found, Infeasible):
            why = "; ".join(str(refusal) for refusal in found.refusals) or found.why
            return LeaseResponse(LeaseOutcome.REFUSED, why, retry_after_s=REFUSED_AGAIN_S)
        parts, capacities = parts_of(found), _capacities(node)
        answer = self.book.acquire(holder, parts, capacities, generation=generation, now_s=now_s)
        return replace(answer, reason=found.why) if answer.outcome is LeaseOutcome.GRANTED else answer

    def restore(
        self, holder: str, generation: int, node_id: str, parts: Iterable[GpuPart], now_s: float
    ) -> LeaseResponse:
        """What a running holder says it has."""
        [answer] = self.book.restore([GpuLease(holder, generation, node_id, tuple(parts), now_s)])
        return answer

    def renew(self, holder: str, now_s: float) -> bool:
        """The holder was heard of; False if it has no lease."""
        return self.book.heard(holder, now_s)

    def _why_none(self, node_id: str) -> str:
        latest = self._fleet.nodes[node_id].latest
        driver = latest.driver_version if latest else None
        return driver.reason if isinstance(driver, Missing) else "the node has no GPU that can be read"


def _capacities(node: Node) -> dict[str, GpuCapacity]:
    return {
        gpu.uuid: GpuCapacity(gpu.uuid, node.node_id, gpu.memory_bytes, node.unavailable or gpu.unavailable)
        for gpu in node.gpus
    }
