"""The controller's state that survives a restart, as JSON values by key.

Times are monotonic in memory and wall clock in the store. ``shift_s`` is wall clock less monotonic clock,
measured once when the process starts. Leases are stored without their renewal time: after a restart their
holders have the usual time to report again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from controlplane.core.gpus.health import GpuHealth
from controlplane.core.gpus.inventory import GpuInventory, NodeHold
from controlplane.core.gpus.leases import GpuLease, GpuPart, LeaseTable
from controlplane.core.json_values import StoredState, Values, shifted, to_value
from controlplane.core.reconcile.in_progress import InProgress
from controlplane.core.reconcile.migrations import Migration, Restart, TierHold
from controlplane.core.reconcile.reconcile import ReplicaFailure

_GPU, _NODE, _LEASE, _MIGRATION, _RESTART = "gpu/", "node/", "lease/", "move/", "restart/"
_COUNTED = "gpus counted"
_DRAIN, _HOLD, _HOLD_HISTORY = "drain/", "hold/", "held/"
_FAILURES, _STALL_RESTARTS = "failures/", "hung/"
_NOT_STORED = ("hot", "good", "recent_events")
"""Of a GPU's health: streaks of readings, which a restart breaks."""


@dataclass(frozen=True, slots=True)
class _StoredGpu:
    health: GpuHealth
    must_leave: bool


@dataclass(frozen=True, slots=True)
class _StoredLease:
    generation: int
    node_id: str
    parts: tuple[tuple[str, int, int], ...]
    """GPU UUID, thousandths of the GPU, bytes of its memory."""


class CheckpointWriter:
    """Converts the state at every save; of the leases, which may be many, only those that changed."""

    def __init__(self, shift_s: float) -> None:
        self._shift_s = shift_s
        self._version = -1
        self._leases: Values = {}

    def values(self, inventory: GpuInventory, leases: LeaseTable, in_progress: InProgress) -> Values:
        """The whole state by key. ``leases`` must be the same table at every call; an unchanged lease is the
        same object as in the call before."""
        changed = leases.changed_since(self._version)
        if changed is None:
            self._leases = {}
        for holder in leases.leases if changed is None else changed:
            lease = leases.leases.get(holder)
            if lease is None:
                self._leases.pop(_LEASE + holder, None)
            else:
                self._leases[_LEASE + holder] = _lease_value(lease)
        self._version = leases.version
        return self._leases | _other_values(inventory, in_progress, self._shift_s)


def restore_gpus(stored: StoredState, inventory: GpuInventory, shift_s: float) -> None:
    """Restore the health of GPUs, which is valid on any cluster that contains them."""
    gpus = stored.entries(_GPU, _StoredGpu)
    inventory.restore([(_shifted_health(gpu.health, -shift_s), gpu.must_leave) for gpu in gpus.values()], {})


def restore_plane(
    stored: StoredState,
    inventory: GpuInventory,
    leases: LeaseTable,
    in_progress: InProgress,
    *,
    now_s: float,
    shift_s: float,
) -> None:
    """Restore the rest, which is valid only while the stored cluster still runs."""
    inventory.restore(
        (), stored.entries(_NODE, NodeHold), has_reported_gpus=bool(stored.value(_COUNTED, bool))
    )
    leases.restore(
        GpuLease(
            holder, lease.generation, lease.node_id, tuple(GpuPart(*part) for part in lease.parts), now_s
        )
        for holder, lease in stored.entries(_LEASE, _StoredLease, _checked_lease).items()
    )

    def past(at_s: float) -> float:
        # A clock that was wrong must not make a wait endless.
        return min(at_s - shift_s, now_s)

    in_progress.migrations.update(
        {
            name: replace(item, since_s=past(item.since_s), began_s=past(item.began_s))
            for name, item in stored.entries(_MIGRATION, Migration, _named).items()
        }
    )
    in_progress.restarts.update(
        {
            name: replace(item, since_s=past(item.since_s))
            for name, item in stored.entries(_RESTART, Restart, _named).items()
        }
    )
    in_progress.drains.update(stored.entries(_DRAIN, str))
    for tier, hold in stored.entries(_HOLD, TierHold).items():
        until_s = None if hold.until_s is None else hold.until_s - shift_s
        in_progress.holds[tier] = replace(hold, since_s=past(hold.since_s), until_s=until_s)
    for tier, (count, at_s) in stored.entries(_HOLD_HISTORY, tuple[int, float], _counted).items():
        in_progress.hold_history[tier] = (count, past(at_s))
    for tier, failures in stored.entries(_FAILURES, tuple[ReplicaFailure, ...]).items():
        in_progress.failures[tier] = tuple(replace(item, at_s=past(item.at_s)) for item in failures)
    for name, times in stored.entries(_STALL_RESTARTS, tuple[float, ...]).items():
        in_progress.stall_restarts[name] = tuple(map(past, times))


_Named = TypeVar("_Named", Migration, Restart)


def _named(item: _Named) -> _Named:
    if not item.endpoint_id or not item.tier:
        raise ValueError("it names no endpoint or no tier")
    return item


def _counted(item: tuple[int, float]) -> tuple[int, float]:
    if item[0] < 0:
        raise ValueError("a count is negative")
    return item


def _checked_lease(lease: _StoredLease) -> _StoredLease:
    if not lease.parts or any(milli <= 0 or memory < 0 for _, milli, memory in lease.parts):
        raise ValueError("it leases no GPU, or less than nothing of one")
    return lease


def _lease_value(lease: GpuLease) -> Values:
    return {
        "generation": lease.generation,
        "node_id": lease.node_id,
        "parts": [[part.gpu_uuid, part.milli, part.memory_bytes] for part in lease.parts],
    }


def _other_values(inventory: GpuInventory, in_progress: InProgress, shift_s: float) -> Values:
    gpus, holds = inventory.state_to_store()
    values: Values = {
        _GPU + uuid: _gpu_value(health, must_leave, shift_s) for uuid, (health, must_leave) in gpus.items()
    }
    values |= {_NODE + node_id: to_value(hold) for node_id, hold in holds.items()}
    values[_COUNTED] = inventory.has_reported_gpus
    for name, migration in in_progress.migrations.items():
        values[_MIGRATION + name] = to_value(shifted(migration, shift_s, "since_s", "began_s"))
    for name, restart in in_progress.restarts.items():
        values[_RESTART + name] = to_value(shifted(restart, shift_s, "since_s"))
    values |= {_DRAIN + name: reason for name, reason in in_progress.drains.items()}
    for tier, tier_hold in in_progress.holds.items():
        values[_HOLD + tier] = to_value(shifted(tier_hold, shift_s, "since_s", "until_s"))
    for tier, (count, at_s) in in_progress.hold_history.items():
        values[_HOLD_HISTORY + tier] = [count, at_s + shift_s]
    for tier, failures in in_progress.failures.items():
        values[_FAILURES + tier] = [to_value(shifted(failure, shift_s, "at_s")) for failure in failures]
    for name, times in in_progress.stall_restarts.items():
        values[_STALL_RESTARTS + name] = [at_s + shift_s for at_s in times]
    return values


def _gpu_value(health: GpuHealth, must_leave: bool, shift_s: float) -> Values:
    value = to_value(_shifted_health(health, shift_s))
    for name in _NOT_STORED:
        del value[name]
    return {"health": value, "must_leave": must_leave}


def _shifted_health(health: GpuHealth, shift_s: float) -> GpuHealth:
    return replace(
        health, since_s=health.since_s + shift_s, cordons_s=tuple(at_s + shift_s for at_s in health.cordons_s)
    )
