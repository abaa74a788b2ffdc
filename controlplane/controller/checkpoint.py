"""What the controller knows that has to survive it, as JSON values by key.

Times are the process's monotonic clock inside and wall-clock seconds in the values; ``shift_s`` is the
difference (wall clock less monotonic), taken once when the process starts. Leases keep no time: after a
restart their holders have the usual time to be heard of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlplane.core.gpus.health import GpuHealth
from controlplane.core.gpus.inventory import GpuInventory, NodeHold
from controlplane.core.gpus.leases import GpuLease, GpuPart, LeaseBook
from controlplane.core.json_values import Values, from_value, shifted, to_value, under
from controlplane.core.reconcile.in_progress import InProgress
from controlplane.core.reconcile.migrations import Migration, Restart, TierHold
from controlplane.core.reconcile.reconcile import ReplicaFailure

_GPU, _NODE, _LEASE, _MOVE, _RESTART = "gpu/", "node/", "lease/", "move/", "restart/"
_COUNTED = "gpus counted"
_DRAIN, _HOLD, _HELD, _FAILURES, _HUNG = "drain/", "hold/", "held/", "failures/", "hung/"


class CheckpointWriter:
    """Turns the state into values again and again; the many leases only when they changed."""

    def __init__(self, shift_s: float) -> None:
        self._shift_s = shift_s
        self._version = -1
        self._leases: Values = {}

    def values(self, fleet: GpuInventory, book: LeaseBook, work: InProgress) -> Values:
        """All of it, by key; what did not change is the same object as before. Always of the same book."""
        changed = book.changed_since(self._version)
        if changed is None:
            self._leases = {}
        for holder in book.leases if changed is None else changed:
            lease = book.leases.get(holder)
            if lease is None:
                self._leases.pop(_LEASE + holder, None)
            else:
                self._leases[_LEASE + holder] = _of_lease(lease)
        self._version = book.version
        return self._leases | _of_rest(fleet, work, self._shift_s)


def to_values(fleet: GpuInventory, book: LeaseBook, work: InProgress, shift_s: float) -> Values:
    """All of it, by key."""
    return CheckpointWriter(shift_s).values(fleet, book, work)


def _of_lease(lease: GpuLease) -> Values:
    return {
        "generation": lease.generation,
        "node_id": lease.node_id,
        "parts": [[part.gpu_uuid, part.milli, part.memory_bytes] for part in lease.parts],
    }


def _of_rest(fleet: GpuInventory, work: InProgress, shift_s: float) -> Values:
    gpus, holds = fleet.kept()
    values: Values = {_GPU + uuid: _of_gpu(health, leave, shift_s) for uuid, (health, leave) in gpus.items()}
    values |= {_NODE + node_id: to_value(hold) for node_id, hold in holds.items()}
    values[_COUNTED] = fleet.counted
    for name, move in work.moves.items():
        values[_MOVE + name] = shifted(to_value(move), shift_s, "since_s", "began_s")
    for name, restart in work.restarts.items():
        values[_RESTART + name] = shifted(to_value(restart), shift_s, "since_s")
    values |= {_DRAIN + name: reason for name, reason in work.drains.items()}
    for tier, tier_hold in work.holds.items():
        values[_HOLD + tier] = shifted(to_value(tier_hold), shift_s, "since_s", "until_s")
    for tier, (count, at_s) in work.held_before.items():
        values[_HELD + tier] = [count, at_s + shift_s]
    for tier, failures in work.failures.items():
        values[_FAILURES + tier] = [shifted(to_value(item), shift_s, "at_s") for item in failures]
    for name, times in work.hung_before.items():
        values[_HUNG + name] = [at_s + shift_s for at_s in times]
    return values


def restore_gpus(values: Mapping[str, Any], fleet: GpuInventory, shift_s: float) -> None:
    """What concerns the hardware; it holds on any cluster that these GPUs are in."""
    fleet.restore([_gpu(value, shift_s) for value in under(values, _GPU).values()], {})


def restore_plane(
    values: Mapping[str, Any],
    fleet: GpuInventory,
    book: LeaseBook,
    work: InProgress,
    *,
    now_s: float,
    shift_s: float,
) -> None:
    """What concerns the plane that ran when it was written."""
    fleet.restore(
        (),
        {node_id: from_value(NodeHold, value) for node_id, value in under(values, _NODE).items()},
        counted=bool(values.get(_COUNTED)),
    )
    book.restore(
        GpuLease(
            holder,
            value["generation"],
            value["node_id"],
            tuple(GpuPart(*part) for part in value["parts"]),
            now_s,
        )
        for holder, value in under(values, _LEASE).items()
    )
    for name, value in under(values, _MOVE).items():
        work.moves[name] = from_value(Migration, shifted(value, -shift_s, "since_s", "began_s"))
    for name, value in under(values, _RESTART).items():
        work.restarts[name] = from_value(Restart, shifted(value, -shift_s, "since_s"))
    work.drains.update(under(values, _DRAIN))
    for tier, value in under(values, _HOLD).items():
        work.holds[tier] = from_value(TierHold, shifted(value, -shift_s, "since_s", "until_s"))
    for tier, (count, at_s) in under(values, _HELD).items():
        work.held_before[tier] = (count, at_s - shift_s)
    for tier, failures in under(values, _FAILURES).items():
        work.failures[tier] = tuple(
            from_value(ReplicaFailure, shifted(item, -shift_s, "at_s")) for item in failures
        )
    for name, times in under(values, _HUNG).items():
        work.hung_before[name] = tuple(at_s - shift_s for at_s in times)


def _of_gpu(health: GpuHealth, must_leave: bool, shift_s: float) -> Values:
    value = {
        "uuid": health.uuid,
        "state": health.state.value,
        "since_s": health.since_s + shift_s,
        "rule": health.rule,
        "reason": health.reason,
        "recovery": health.recovery.value,
        "hold_s": health.hold_s,
        "cordons_s": [at_s + shift_s for at_s in health.cordons_s],
        "reset_seen": health.reset_seen,
        "was_lost": health.was_lost,
        "boot_id": health.boot_id,
        "ecc_uncorrected": health.ecc_uncorrected,
        "ecc_corrected": health.ecc_corrected,
    }
    return {"health": value, "must_leave": must_leave}


def _gpu(value: Mapping[str, Any], shift_s: float) -> tuple[GpuHealth, bool]:
    fields = shifted(value["health"], -shift_s, "since_s")
    fields["cordons_s"] = [at_s - shift_s for at_s in fields["cordons_s"]]
    return from_value(GpuHealth, fields), bool(value["must_leave"])
