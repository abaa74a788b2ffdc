"""Who gets GPUs when the tiers want more than there are: by priority, then by what the next replica gains.

What must not be touched is counted first, even over the budget; so is what runs of a tier's minimum, for it
has its GPUs, whatever is away. Then every tier gets its minimum, the important ones first. What is left goes
replica by replica to the most important tier that still wants one, and among equals to the largest gain per
GPU. Where the gains of a tier fall from replica to replica and replicas are of one size, that greedy choice
is the best one (M. Fox, "Discrete optimization via marginal analysis", 1966). A replica that is there already
counts a little more than one that would have to start: small changes of the gains move nothing.

A minimum that finds no GPU is not forgotten: that of the most important tier which lacks it is ordered all
the same. It waits for a node that comes back, or that a growing cluster adds because somebody waits. The
others have their turn when it runs, so that nobody takes the place of a more important one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_STAYS: Final = 1.25
"""How much more a replica gains that is there already: to move it costs a cold start."""


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
    held: int = 0
    """Replicas that it has now, ready or not."""
    running: int = 0
    """Replicas that answer: they have their GPUs."""
    kept: int = 0
    """Replicas that are not up for sharing: set by a person, or of a tier whose telemetry is not fresh."""

    @property
    def floor(self) -> int:
        """Its minimum, as far as it wants it."""
        return min(self.lowest, self.wanted)

    @property
    def sure(self) -> int:
        """What it gets even over the budget: what is kept, and what runs of its minimum."""
        return max(min(self.kept, self.wanted), min(self.running, self.floor))

    @property
    def lacking(self) -> bool:
        """Whether a part of its minimum has no GPU, or does not answer yet."""
        return self.gpus_per_replica > 0 and self.running < self.floor

    def gain(self, replica: int) -> float:
        """Of the ``replica``-th (from 1) per GPU."""
        value = self.gains[replica - 1] if replica <= len(self.gains) else 0.0
        if replica <= self.held:
            value *= _STAYS
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
    """Replicas per tier, in the order of ``demands``; never more than ``gpus`` in all, but for what is
    ``sure`` and for the minimum of the most important tiers that lack theirs."""
    given = [demand.sure for demand in demands]
    left = gpus - sum(d.gpus_per_replica * count for d, count in zip(demands, given, strict=True))
    by_priority = sorted(range(len(demands)), key=lambda index: -demands[index].priority)
    for index in by_priority:
        demand = demands[index]
        while given[index] < demand.floor and _fits(demand, left):
            given[index] += 1
            left -= demand.gpus_per_replica
    while True:
        # A tier without GPUs is never short of them, whatever the others took.
        open_ = [
            index
            for index in by_priority
            if given[index] < demands[index].wanted and _fits(demands[index], left)
        ]
        if not open_:
            break
        best = max(open_, key=lambda i: (demands[i].priority, demands[i].gain(given[i] + 1), -given[i]))
        given[best] += 1
        left -= demands[best].gpus_per_replica
    first = max((demand.priority for demand in demands if demand.lacking), default=None)
    for index, demand in enumerate(demands):
        if demand.priority == first:
            given[index] = max(given[index], demand.floor)
    return tuple(
        GpuShare(demand.tier, count, _reason(demand, count, gpus))
        for demand, count in zip(demands, given, strict=True)
    )


def _fits(demand: GpuDemand, left: float) -> bool:
    return demand.gpus_per_replica <= 0 or demand.gpus_per_replica <= left + 1e-9


def _reason(demand: GpuDemand, count: int, gpus: float) -> str:
    if count >= demand.wanted:
        return f"all {demand.wanted} that it wants"
    short = demand.wanted - count
    return (
        f"{short} fewer than the {demand.wanted} it wants: {gpus:g} GPUs are shared, and tiers of higher "
        "priority or gain went first"
    )
