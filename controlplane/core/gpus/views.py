"""The GPU inventory for display: every GPU with its health, its holders and its last readings."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.gpus.inventory import GpuInventory, GpuRecord
from controlplane.core.gpus.leases import LeaseTable
from controlplane.core.telemetry.samples import value_or
from controlplane.core.telemetry.series import Freshness


@dataclass(frozen=True, slots=True)
class GpuHolder:
    """A replica that holds a part of a GPU."""

    endpoint_id: str
    milli: int
    """Thousandths of the GPU's compute."""
    memory_bytes: int
    """Reserved memory; 0 if memory is not accounted for."""


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU now. Unknown values are None."""

    uuid: str
    node_id: str
    index: int
    name: str | None
    state: str
    """See :class:`~controlplane.core.gpus.health.GpuState`."""
    since_unix_s: float
    rule: str
    """The rule that led to that state; ``operator`` if an operator cordoned or uncordoned it."""
    reason: str
    cordoned: bool
    """Whether it takes no new replicas, because of its own state or its node's."""
    node_cordoned: bool
    condition: str
    """What the driver reports: ok, lost, reset_required, unreadable."""
    holders: tuple[GpuHolder, ...]
    freshness: Freshness
    """Freshness of the readings; if MISSING, they are None."""
    age_s: float | None
    gpu_ratio: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_c: float | None
    power_w: float | None
    sm_clock_mhz: int | None
    throttle: tuple[str, ...] | None
    ecc_corrected: int | None
    ecc_uncorrected: int | None
    mig_enabled: bool | None
    peers: tuple[str, ...]
    """UUIDs of the GPUs that its active NVLinks lead to."""


def gpu_views(
    inventory: GpuInventory, table: LeaseTable, *, now_s: float, unix_s: float
) -> tuple[GpuView, ...]:
    """All GPUs, ordered by node and by the driver's index."""
    records = inventory.records
    return tuple(
        _view(inventory, table, records[uuid], uuid, now_s, unix_s)
        for node_id in sorted(inventory.nodes)
        for uuid in inventory.gpus_of(node_id)
        if uuid in records
    )


def _view(
    inventory: GpuInventory, table: LeaseTable, record: GpuRecord, uuid: str, now_s: float, unix_s: float
) -> GpuView:
    signals = inventory.signals(uuid, now_s)
    telemetry = inventory.nodes[record.node_id]
    age_s = None if telemetry.latest_s is None else max(0.0, now_s - telemetry.latest_s)
    sample, health = inventory.sample(uuid), record.health
    freshness = signals.memory_used_ratio.freshness
    known = freshness is not Freshness.MISSING
    links = value_or(sample.info.nvlinks, ())
    listed = telemetry.latest.gpus if telemetry.latest else ()
    newest = next((gpu for gpu in listed if gpu.info.uuid == uuid), sample)
    return GpuView(
        uuid=uuid,
        node_id=record.node_id,
        index=sample.info.index,
        name=value_or(sample.info.name, None),
        state=health.state.value,
        since_unix_s=unix_s - (now_s - health.since_s),
        rule=health.rule,
        reason=health.reason,
        cordoned=record.out_of_use or record.node_id in inventory.holds,
        node_cordoned=record.node_id in inventory.holds,
        condition=newest.condition.value,
        holders=tuple(
            GpuHolder(holder, part.milli, part.memory_bytes)
            for holder in table.holders(uuid)
            for part in table.leases[holder].parts
            if part.gpu_uuid == uuid
        ),
        freshness=freshness,
        age_s=age_s,
        gpu_ratio=signals.gpu_ratio.value,
        memory_used_bytes=value_or(sample.memory_used_bytes, None) if known else None,
        memory_total_bytes=value_or(sample.memory_total_bytes, None),
        temperature_c=signals.temperature_c.value,
        power_w=signals.power_w.value,
        sm_clock_mhz=value_or(sample.sm_clock_mhz, None) if known else None,
        throttle=value_or(sample.throttle, None) if known else None,
        ecc_corrected=value_or(sample.ecc_corrected, None) if known else None,
        ecc_uncorrected=value_or(sample.ecc_uncorrected, None) if known else None,
        mig_enabled=value_or(sample.info.mig_enabled, None),
        peers=tuple(dict.fromkeys(link.remote_uuid for link in links if link.active and link.remote_uuid)),
    )
