"""The inventory for people and programs: every GPU with its health, its holders and its last readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.core.gpus.inventory import GpuInventory, GpuRecord
from controlplane.core.gpus.leases import LeaseBook
from controlplane.core.telemetry.samples import Missing, Reading, T
from controlplane.core.telemetry.series import Freshness


@dataclass(frozen=True, slots=True)
class GpuHolder:
    """Who has a part of a GPU."""

    endpoint_id: str
    milli: int
    """Thousandths of its compute."""
    memory_bytes: int
    """Set aside; 0: not accounted."""


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU now. What is not known is None."""

    uuid: str
    node_id: str
    index: int
    name: str | None
    state: str
    """See :class:`~controlplane.core.gpus.health.GpuState`."""
    since_unix_s: float
    rule: str
    """What put it in that state; ``operator`` for an operator's wish."""
    reason: str
    cordoned: bool
    """Nothing new comes to it, by its own state or its node's."""
    node_cordoned: bool
    condition: str
    """What the driver says of it: ok, lost, reset_required, unreadable."""
    holders: tuple[GpuHolder, ...]
    freshness: Freshness
    """Of its readings; those of a MISSING one are None."""
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
    """UUIDs that its active NVLinks lead to."""


def gpu_views(fleet: GpuInventory, book: LeaseBook, *, now_s: float, unix_s: float) -> tuple[GpuView, ...]:
    """All GPUs, by node and the driver's order."""
    records: Mapping[str, GpuRecord] = fleet.records
    return tuple(
        _view(fleet, book, records[uuid], uuid, now_s, unix_s)
        for node_id in sorted(fleet.nodes)
        for uuid in fleet.gpus_of(node_id)
        if uuid in records
    )


def _view(
    fleet: GpuInventory, book: LeaseBook, record: GpuRecord, uuid: str, now_s: float, unix_s: float
) -> GpuView:
    signals = fleet.signals(uuid, now_s)
    telemetry = fleet.nodes[record.node_id]
    age_s = None if telemetry.latest_s is None else max(0.0, now_s - telemetry.latest_s)
    sample, health = fleet.sample(uuid), record.health
    # One that the driver never answers for has the freshness of its node's own samples.
    freshness = signals.memory_used_ratio.freshness
    known = freshness is not Freshness.MISSING
    links = _value(sample.info.nvlinks) or ()
    now = (
        next((gpu for gpu in telemetry.latest.gpus if gpu.info.uuid == uuid), sample)
        if telemetry.latest
        else sample
    )
    return GpuView(
        uuid=uuid,
        node_id=record.node_id,
        index=sample.info.index,
        name=_value(sample.info.name),
        state=health.state.value,
        since_unix_s=unix_s - (now_s - health.since_s),
        rule=health.rule,
        reason=health.reason,
        cordoned=record.out_of_use or record.node_id in fleet.holds,
        node_cordoned=record.node_id in fleet.holds,
        condition=now.condition.value,
        holders=tuple(
            GpuHolder(holder, part.milli, part.memory_bytes)
            for holder in book.holders(uuid)
            for part in book.leases[holder].parts
            if part.gpu_uuid == uuid
        ),
        freshness=freshness,
        age_s=age_s,
        gpu_ratio=signals.gpu_ratio.value,
        memory_used_bytes=_value(sample.memory_used_bytes) if known else None,
        memory_total_bytes=_value(sample.memory_total_bytes),
        temperature_c=signals.temperature_c.value,
        power_w=signals.power_w.value,
        sm_clock_mhz=_value(sample.sm_clock_mhz) if known else None,
        throttle=_value(sample.throttle) if known else None,
        ecc_corrected=_value(sample.ecc_corrected) if known else None,
        ecc_uncorrected=_value(sample.ecc_uncorrected) if known else None,
        mig_enabled=_value(sample.info.mig_enabled),
        peers=tuple(dict.fromkeys(link.remote_uuid for link in links if link.active and link.remote_uuid)),
    )


def _value(reading: Reading[T]) -> T | None:
    return None if isinstance(reading, Missing) else reading
