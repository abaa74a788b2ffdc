"""Gangs of 1, 2, 4 and 8 whole GPUs on 8-GPU nodes with NVLink islands: how many are inside one island?

The fleet is generated: half of its nodes have one island of 8, half have two of 4, each on its own socket.
Gangs arrive in random order until they have requested three times the fleet's GPUs. After each arrival a
random running gang leaves with a probability of 30 %, so that free GPUs are scattered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from controlplane.core.placement.free_capacity import FreeCapacity
from controlplane.core.placement.gangs import Gang, GangShape, Placement
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.topology import Distance, Gpu, Node, spread_of

NODES = 128
ROUNDS = 3
LEAVE_RATIO = 0.3
SIZES = (1, 2, 4, 8)
FREQUENCY = (4, 3, 2, 1)


def fleet(nodes: int = NODES) -> tuple[Node, ...]:
    """Nodes of 8 GPUs; nodes with an island of 8 and with two of 4 alternate."""

    def gpu(name: str, i: int, island: int) -> Gpu:
        first = i - i % island
        peers = frozenset(f"{name}/{j}" for j in range(first, first + island) if j != i)
        return Gpu(f"{name}/{i}", i, "H100", 80 * 1024**3, peers, i // 4)

    return tuple(
        Node(name, tuple(gpu(name, i, 4 if k % 2 else 8) for i in range(8)), 192_000, 1024**4)
        for k in range(nodes)
        for name in [f"n{k:05d}"]
    )


@dataclass
class _CountingPlacer:
    """Like a scheduler that only counts GPUs: a random node or the tightest one, and its first idle GPUs."""

    capacity: FreeCapacity
    rng: random.Random
    tightest: bool

    def place(self, gang: Gang) -> tuple[str, tuple[str, ...]] | None:
        capacity = self.capacity
        idle = (capacity.free_milli == 1000).sum(axis=1)
        found = np.flatnonzero(idle >= gang.shape.gpus)
        if not len(found):
            return None
        row = int(found[idle[found].argmin()]) if self.tightest else int(self.rng.choice(found))
        columns = np.flatnonzero(capacity.free_milli[row] == 1000)[: gang.shape.gpus].tolist()
        capacity.take(row, columns, gang.shape)
        return capacity.nodes[row].node_id, tuple(capacity.gpus[row][column].uuid for column in columns)

    def remove(self, gang: Gang, uuids: Sequence[str]) -> None:
        row = self.capacity.slot[uuids[0]][0]
        self.capacity.give_back(row, [self.capacity.slot[uuid][1] for uuid in uuids], gang.shape)


@dataclass
class _TierplanePlacer:
    planner: Planner

    def place(self, gang: Gang) -> tuple[str, tuple[str, ...]] | None:
        result = self.planner.place(gang)
        return (result.node_ids[0], result.gpu_uuids) if isinstance(result, Placement) else None

    def remove(self, gang: Gang, uuids: Sequence[str]) -> None:
        self.planner.remove(gang.gang_id)


def _placer(policy: str, nodes: Sequence[Node], rng: random.Random) -> _CountingPlacer | _TierplanePlacer:
    if policy == "tierplane":
        return _TierplanePlacer(Planner(PlacedCluster(tuple(nodes))))
    return _CountingPlacer(FreeCapacity(nodes), rng, policy == "bestfit")


def run(policy: str, seed: int, nodes: Sequence[Node]) -> tuple[float, float, float]:
    """(gangs of several GPUs in one island, gangs placed, GPUs allocated at the end), in percent."""
    rng = random.Random(seed)
    by_id = {node.node_id: node for node in nodes}
    placer = _placer(policy, nodes, rng)
    total = 8 * len(nodes)
    running: list[tuple[Gang, tuple[str, ...]]] = []
    requested = several = together = placed = number = used = 0
    while requested < ROUNDS * total:
        number += 1
        gang = Gang(str(number), GangShape(gpus=rng.choices(SIZES, FREQUENCY)[0]))
        requested += gang.shape.gpus
        found = placer.place(gang)
        if found is not None:
            running.append((gang, found[1]))
            placed += 1
            used += gang.shape.gpus
            if gang.shape.gpus > 1:
                several += 1
                together += spread_of(by_id[found[0]], found[1]) <= Distance.ISLAND
        if running and rng.random() < LEAVE_RATIO:
            leaving, uuids = running.pop(rng.randrange(len(running)))
            placer.remove(leaving, uuids)
            used -= leaving.shape.gpus
    return 100 * together / several, 100 * placed / number, 100 * used / total


def table(seeds: int) -> Iterator[dict[str, object]]:
    """One row per policy."""
    nodes = fleet()
    for policy in ("random", "bestfit", "tierplane"):
        runs = [run(policy, seed, nodes) for seed in range(seeds)]
        island, placed, used = (sum(column) / len(runs) for column in zip(*runs, strict=True))
        yield {
            "policy": policy,
            "workload": "gangs of 1, 2, 4, 8",
            "seeds": seeds,
            "in_one_island_percent": round(island, 2),
            "gangs_placed_percent": round(placed, 2),
            "allocation_percent": round(used, 2),
        }
