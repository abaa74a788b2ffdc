"""GPUs and nodes out of use: which replicas have to leave them, and how many GPUs can be used."""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import LeaseTable
from controlplane.core.placement.gangs import WHOLE_MILLI
from controlplane.core.reconcile.reconcile import GpuOutOfUse


def out_of_use_now(
    inventory: GpuInventory, leases: LeaseTable, endpoints: Mapping[str, Endpoint]
) -> tuple[dict[str, GpuOutOfUse], dict[str, str]]:
    """GPUs out of use by their own health, by UUID; and endpoint id → why the endpoint has to leave its GPU
    or its node."""
    gpus, must_leave = {}, {}
    for uuid in inventory.out_of_use():
        record = inventory.records[uuid]
        reason = inventory.leave_reason(uuid)
        holders = leases.holders(uuid)
        if record.out_of_use:
            gpus[uuid] = GpuOutOfUse(record.health.state, holders, bool(reason), record.health.reason)
        if reason:
            must_leave.update(dict.fromkeys(holders, reason))
    for node_id, hold in inventory.holds.items():
        if hold.must_leave:
            for endpoint in endpoints.values():
                if endpoint.node_id == node_id:
                    must_leave.setdefault(endpoint.endpoint_id, f"node {node_id} is drained: {hold.reason}")
    return gpus, must_leave


def usable_gpus(inventory: GpuInventory, leases: LeaseTable) -> float | None:
    """The GPUs in use, plus what is leased on others and may stay there; None if none was ever reported."""
    if not inventory.has_reported_gpus:
        return None
    out_of_use = inventory.out_of_use()
    staying_milli = sum(leases.used(uuid)[0] for uuid in out_of_use if not inventory.leave_reason(uuid))
    return len(inventory.records.keys() - out_of_use.keys()) + staying_milli / WHOLE_MILLI
