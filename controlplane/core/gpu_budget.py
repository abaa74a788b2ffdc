"""Who gets GPUs when the tiers want more than there are: by priority, then by what the next replica gains.

Every tier first gets its minimum, the important ones first. What is left goes replica by replica to the most
important tier that still wants one, and among equals to the largest gain per GPU. Where the gains of a tier
fall from replica to replica and replicas are of one size, that greedy choice is the best one
(M. Fox, "Discrete optimization via marginal analysis", 1966).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuDemand:
    """What one tier wants."""

    tier: str
    gpus_per_replica: float
    lowest: int
    """Replicas that it must have."""
    wanted: int
    priority: int = 0
    """The higher goes first."""
    gains: tuple[float, ...] = ()
    """Of the first, second, … replica: requests a second that it lets keep the SLO; 0 past the last."""

    def gain(self, replica: int) -> float:
        """Of the ``replica``-th (from 1) per GPU."""
        value = self.gains[replica - 1] if replica <= len(self.gains) else 0.0
        return value / self.gpus_per_replica if self.gpus_per_replica > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class GpuShare:
    """What a tier gets."""

    tier: str
    replicas: int
    reason: str


def carried_gains(requests_per_s: float, each_per_s: float, wanted: int) -> tuple[float, ...]:
    """The gains of a tier's replicas: each carries ``each_per_s`` until all requests are carried."""
    return tuple(min(each_per_s, max(0.0, requests_per_s - k * each_per_s)) for k in range(wanted))


def share_gpus(demands: Sequence[GpuDemand], gpus: float) -> tuple[GpuShare, ...]:
    """Replicas per tier, in the order of ``demands``; never more than ``gpus`` in all."""
    given = [0] * len(demands)
    left = gpus
    by_priority = sorted(range(len(demands)), key=lambda index: -demands[index].priority)
    for index in by_priority:
        demand = demands[index]
        while given[index] < min(demand.lowest, demand.wanted) and demand.gpus_per_replica <= left + 1e-9:
            given[index] += 1
            left -= demand.gpus_per_replica
    while True:
        open_ = [
            index
            for index in by_priority
            if given[index] < demands[index].wanted and demands[index].gpus_per_replica <= left + 1e-9
        ]
        if not open_:
            break
        best = max(open_, key=lambda i: (demands[i].priority, demands[i].gain(given[i] + 1), -given[i]))
        given[best] += 1
        left -= demands[best].gpus_per_replica
    return tuple(
        GpuShare(demand.tier, count, _reason(demand, count, gpus))
        for demand, count in zip(demands, given, strict=True)
    )


def _reason(demand: GpuDemand, count: int, gpus: float) -> str:
    if count >= demand.wanted:
        return f"all {demand.wanted} that it wants"
    short = demand.wanted - count
    return (
        f"{short} fewer than the {demand.wanted} it wants: {gpus:g} GPUs are shared, and tiers of higher "
        "priority or gain went first"
    )
