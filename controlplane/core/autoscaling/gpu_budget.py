"""Divides GPUs among tiers that want more than there are: by priority, then by the gain of the next replica.

Reserved replicas and the running replicas of a tier's minimum come first, even beyond the budget, because
they already have their GPUs. Then every tier gets its minimum, by priority. The rest goes replica by replica
to the tier with the highest priority that still wants one, and among equal priorities to the tier with the
largest gain per GPU. If the gains of a tier fall from replica to replica and all replicas have the same size,
this greedy choice is optimal (M. Fox, "Discrete optimization via marginal analysis", 1966). A replica that
already exists counts somewhat more than one that would have to start, so that small changes of the gains move
nothing.

Tiers whose minimum is not running are short. Among these, the ones with the highest priority get their
minimum even without free GPUs: the replicas wait for a node to come back, or make a cluster autoscaler add
one. The minimums of the other short tiers are ordered once those replicas run, so that they can't take their
GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_EXISTING_FACTOR: Final = 1.25
"""The gain of an existing replica is multiplied by this, because replacing it costs a cold start."""


@dataclass(frozen=True, slots=True)
class GpuDemand:
    """The replicas that one tier wants."""

    gpus_per_replica: float
    lowest: int
    """Its minimum."""
    wanted: int
    priority: int = 0
    """Tiers with a higher priority get GPUs first."""
    gains: tuple[float, ...] = ()
    """For the first, second, … replica: the requests per second that meet the SLO because of this replica; 0
    beyond the last entry."""
    ordered: int = 0
    """Replicas that the tier has now, ready or not."""
    running: int = 0
    """Replicas that serve and so have their GPUs."""
    reserved: int = 0
    """Replicas that the tier gets in any case: those set by an operator, or the present ones of a tier whose
    telemetry is not fresh."""

    @property
    def floor(self) -> int:
        """The tier's minimum, or ``wanted`` if that is less."""
        return min(self.lowest, self.wanted)

    @property
    def certain(self) -> int:
        """Replicas granted even beyond the budget: reserved ones, and the running ones of the minimum."""
        return max(min(self.reserved, self.wanted), min(self.running, self.floor))

    @property
    def lacking(self) -> bool:
        """Whether a replica of its minimum has no GPU or does not serve yet."""
        return self.gpus_per_replica > 0 and self.running < self.floor

    def gain(self, replica: int) -> float:
        """The gain per GPU of the ``replica``-th replica, from 1."""
        value = self.gains[replica - 1] if replica <= len(self.gains) else 0.0
        if replica <= self.ordered:
            value *= _EXISTING_FACTOR
        return value / self.gpus_per_replica if self.gpus_per_replica > 0 else float("inf")


def carried_gains(requests_per_s: float, each_per_s: float, wanted: int) -> tuple[float, ...]:
    """The gains of a tier's replicas: each serves ``each_per_s`` until all requests are served."""
    return tuple(min(each_per_s, max(0.0, requests_per_s - k * each_per_s)) for k in range(wanted))


def share_gpus(demands: Sequence[GpuDemand], gpus: float) -> tuple[int, ...]:
    """Replicas per tier, in the order of ``demands``. In total they use at most ``gpus``, apart from the
    ``certain`` replicas, and from the minimums of the most important tiers whose minimum is not running."""
    granted = [demand.certain for demand in demands]
    left = gpus - sum(d.gpus_per_replica * count for d, count in zip(demands, granted, strict=True))
    by_priority = sorted(range(len(demands)), key=lambda index: -demands[index].priority)
    for index in by_priority:
        demand = demands[index]
        while granted[index] < demand.floor and _fits(demand, left):
            granted[index] += 1
            left -= demand.gpus_per_replica
    while True:
        # A tier that needs no GPU always fits.
        candidates = [
            index
            for index in by_priority
            if granted[index] < demands[index].wanted and _fits(demands[index], left)
        ]
        if not candidates:
            break
        best = max(
            candidates, key=lambda i: (demands[i].priority, demands[i].gain(granted[i] + 1), -granted[i])
        )
        granted[best] += 1
        left -= demands[best].gpus_per_replica
    first = max((demand.priority for demand in demands if demand.lacking), default=None)
    for index, demand in enumerate(demands):
        if demand.priority == first:
            granted[index] = max(granted[index], demand.floor)
    return tuple(granted)


def _fits(demand: GpuDemand, left: float) -> bool:
    return demand.gpus_per_replica <= 0 or demand.gpus_per_replica <= left + 1e-9
