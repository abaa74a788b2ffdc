"""Divides GPUs among tiers that want more than there are: by priority, then by the gain of the next replica.

Reserved replicas come first, even beyond the budget, and so do the running replicas of a tier's minimum: they
have their GPUs, whatever else is missing. Then every tier gets its minimum, by priority. The rest goes
replica by replica to the tier with the highest priority that still wants one; among equal priorities to the
largest gain per GPU. If the gains of a tier fall from replica to replica and all replicas have the same size,
this greedy choice is optimal (M. Fox, "Discrete optimization via marginal analysis", 1966). A replica that
already exists counts somewhat more than one that would have to start, so that small changes of the gains move
nothing.

A minimum for which there is no GPU is ordered nevertheless, for the tiers of the highest priority that lack
theirs. It waits for a node to come back, or makes a cluster autoscaler add one. The minimums of other tiers
are ordered once it runs, so that they can't take its GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_EXISTING_FACTOR: Final = 1.25
"""The gain of a replica that exists is multiplied by this: to move it costs a cold start."""


@dataclass(frozen=True, slots=True)
class GpuDemand:
    """The replicas that one tier wants."""

    gpus_per_replica: float
    lowest: int
    """Its minimum."""
    wanted: int
    priority: int = 0
    """Higher ones go first."""
    gains: tuple[float, ...] = ()
    """For the first, second, … replica: the requests a second that meet the SLO because of it; 0 beyond the
    last."""
    ordered: int = 0
    """Replicas that it has now, ready or not."""
    running: int = 0
    """Replicas that serve: they have their GPUs."""
    reserved: int = 0
    """Replicas that it gets in any case: set by an operator, or those of a tier whose telemetry is not
    fresh."""

    @property
    def floor(self) -> int:
        """Its minimum, unless it wants less."""
        return min(self.lowest, self.wanted)

    @property
    def certain(self) -> int:
        """What it gets even beyond the budget: reserved replicas, and the running ones of its minimum."""
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
    """The gains of a tier's replicas: each carries ``each_per_s`` until all requests are carried."""
    return tuple(min(each_per_s, max(0.0, requests_per_s - k * each_per_s)) for k in range(wanted))


def share_gpus(demands: Sequence[GpuDemand], gpus: float) -> tuple[int, ...]:
    """Replicas per tier, in the order of ``demands``. They use at most ``gpus`` in all, apart from what is
    ``certain`` and the minimum of the tiers with the highest priority that lack theirs."""
    granted = [demand.certain for demand in demands]
    left = gpus - sum(d.gpus_per_replica * count for d, count in zip(demands, granted, strict=True))
    by_priority = sorted(range(len(demands)), key=lambda index: -demands[index].priority)
    for index in by_priority:
        demand = demands[index]
        while granted[index] < demand.floor and _fits(demand, left):
            granted[index] += 1
            left -= demand.gpus_per_replica
    while True:
        # A tier without GPUs always fits, whatever the others took.
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
