"""The policies with which the placement is compared, and the placement itself behind the same interface.

Random, BestFit and FGD follow their definitions in Weng et al., «Beware of Fragmentation: Scheduling
GPU-Sharing Workloads with Fragmentation Gradient Descent» (USENIX ATC'23). Scores are rounded to integers as
in the published runs, and among equal scores the first node wins.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Protocol

import numpy as np

from controlplane.core.placement.fragmentation import Floats, Ints
from controlplane.core.placement.free_capacity import FreeCapacity, all_rows
from controlplane.core.placement.gangs import WHOLE_MILLI, Gang, GangShape, Placement
from controlplane.core.placement.node_fit import Bools
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.topology import Node

MOST_CPU_MILLI = 128_000
MOST_GPU_MILLI = 8_000
"""Divisors with which the published BestFit adds CPUs and GPUs."""
TYPICAL_RATIO = 0.95
"""FGD's typical pods are the most frequent shapes that make up this share of all pods."""


class Policy(Protocol):
    """Places pods one by one."""

    def place(self, shape: GangShape) -> bool:
        """Place a pod; False if it fits nowhere."""
        ...


class Tierplane:
    """The production placement, which learns the demand from the pods so far."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._planner = Planner(PlacedCluster(tuple(nodes)))
        self._number = count()

    def place(self, shape: GangShape) -> bool:
        return isinstance(self._planner.place(Gang(str(next(self._number)), shape)), Placement)


class _Baseline:
    """The fleet's free capacity, for the other policies."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.capacity = FreeCapacity(nodes)
        self.rows = all_rows(self.capacity)

    def fits(self, shape: GangShape, rows: Ints) -> Bools:
        capacity = self.capacity
        fits = capacity.cpu_milli[rows] >= shape.cpu_milli
        fits &= capacity.memory_bytes[rows] >= shape.memory_bytes
        if shape.gpus:
            able = capacity.free_milli[rows] >= shape.milli_gpu
            if shape.models:
                able &= capacity.accepted(shape)[capacity.kind[rows]]
            fits &= able.sum(axis=1) >= shape.gpus
        return fits

    def first_idle(self, row: int, shape: GangShape) -> list[int]:
        idle = np.flatnonzero(self.capacity.free_milli[row] == WHOLE_MILLI)
        return [int(gpu) for gpu in idle[: shape.gpus]]


class Random(_Baseline):
    """A random node that fits, and a random GPU of it."""

    def __init__(self, nodes: Sequence[Node], rng: random.Random) -> None:
        super().__init__(nodes)
        self._rng = rng

    def place(self, shape: GangShape) -> bool:
        found = np.flatnonzero(self.fits(shape, self.rows))
        if not len(found):
            return False
        row = int(self._rng.choice(found))
        columns = self.first_idle(row, shape)
        if shape.shared:
            columns = [
                int(self._rng.choice(np.flatnonzero(self.capacity.free_milli[row] >= shape.milli_gpu)))
            ]
        self.capacity.take(row, columns, shape)
        return True


class BestFit(_Baseline):
    """The node with the fewest CPUs and GPUs left over, and the GPU with the least left over."""

    def place(self, shape: GangShape) -> bool:
        found = np.flatnonzero(self.fits(shape, self.rows))
        if not len(found):
            return False
        capacity = self.capacity
        cpu = (capacity.cpu_milli[found] - shape.cpu_milli) / MOST_CPU_MILLI
        gpu = (capacity.free_milli[found].sum(axis=1) - shape.total_milli) / MOST_GPU_MILLI
        score = ((1.0 - (cpu + gpu) / 2) * 100).astype(np.int64)
        span = int(score.max() - score.min())
        scaled = (score - score.min()) * 100 // span if span else np.zeros_like(score)
        row = int(found[scaled.argmax()])
        columns = self.first_idle(row, shape)
        if shape.shared:
            free = capacity.free_milli[row]
            columns = [int(np.where(free >= shape.milli_gpu, free, WHOLE_MILLI + 1).argmin())]
        capacity.take(row, columns, shape)
        return True


class Fgd(_Baseline):
    """Fragmentation gradient descent: where the fragmentation for the typical pods grows least."""

    def __init__(self, nodes: Sequence[Node], workload: Sequence[GangShape]) -> None:
        super().__init__(nodes)
        typical = _typical(workload)
        self._weight = np.array([weight for *_, weight in typical])
        self._cpu = np.array([cpu for cpu, *_ in typical])
        self._gpus = np.array([gpus for _, gpus, *_ in typical])
        milli = np.array([milli for _, _, milli, *_ in typical])
        self._milli, self._size = np.unique(milli, return_inverse=True)
        self._accepted = np.array(
            [
                [gpus > 0 and (not models or kind.model in models) for _, gpus, _, models, _ in typical]
                for kind in self.capacity.kinds
            ]
        )
        self._views: dict[GangShape, tuple[int, Ints, Ints]] = {}

    def place(self, shape: GangShape) -> bool:
        score, column = self._scores(shape)
        row = int(score.argmax())
        if score[row] < 0:
            return False
        columns = [int(column[row])] if shape.shared else self.first_idle(row, shape)
        self.capacity.take(row, columns, shape)
        return True

    def _scores(self, shape: GangShape) -> tuple[Ints, Ints]:
        """A score per node from 0 to 100, -1 if the pod doesn't fit; and the GPU for a share."""
        changed = self.capacity.changed
        empty = (-1, np.full(len(self.rows), -1), np.zeros(len(self.rows), dtype=np.int64))
        read, score, column = self._views.get(shape, empty)
        rows = self.rows if read < 0 else np.unique(np.array(changed[read:], dtype=np.int64))
        self._views[shape] = len(changed), score, column
        score[rows] = -1
        rows = rows[self.fits(shape, rows)]
        if len(rows):
            column[rows], score[rows] = self._rate(shape, rows)
        return score, column

    def _rate(self, shape: GangShape, rows: Ints) -> tuple[Ints, Ints]:
        capacity = self.capacity
        free = capacity.free_milli[rows]
        width = free.shape[1]
        options = np.repeat(free[:, None, :], width if shape.shared else 1, axis=1)
        if shape.shared:
            each = np.arange(width)
            options[:, each, each] -= shape.milli_gpu
        else:
            for option, now in zip(options[:, 0], free, strict=True):
                option[np.flatnonzero(now == WHOLE_MILLI)[: shape.gpus]] = 0
        kind = capacity.kind[rows, 0]
        cpu = capacity.cpu_milli[rows]
        before = self._fragmentation(free[:, None, :], cpu[:, None], kind)
        after = self._fragmentation(options, cpu[:, None] - shape.cpu_milli, kind)
        rating = (100.0 / (1.0 + np.exp((after - before) / WHOLE_MILLI))).astype(np.int64)
        if shape.shared:
            rating = np.where(free >= shape.milli_gpu, rating, -1)
        best = rating.argmax(axis=1)
        return best, rating[np.arange(len(rows)), best]

    def _fragmentation(self, free: Ints, cpu: Ints, kind: Ints) -> Floats:
        """Free capacity that a random typical pod can't use; ``free`` is [node, option, GPU]."""
        enough = free[:, :, None, :] >= self._milli[:, None]
        many = enough.sum(axis=-1)[:, :, self._size]
        small = np.where(enough, 0, free[:, :, None, :]).sum(axis=-1)[:, :, self._size]
        usable = (many >= self._gpus) & (cpu[:, :, None] >= self._cpu)
        usable &= self._accepted[kind][:, None, :]
        total = free.sum(axis=-1)[:, :, None]
        result: Floats = np.where(usable, small, total) @ self._weight
        return result


def _typical(workload: Sequence[GangShape]) -> list[tuple[int, int, int, frozenset[str], float]]:
    """The most frequent pods as (CPUs, GPUs, share, models, weight); FGD ignores memory."""
    counts = Counter(
        (shape.cpu_milli, shape.gpus, shape.milli_gpu if shape.gpus else 0, shape.models)
        for shape in workload
    )
    order = sorted(
        counts.items(), key=lambda item: (-item[1], -item[0][0], -item[0][2], -item[0][1], sorted(item[0][3]))
    )
    typical: list[tuple[int, int, int, frozenset[str], float]] = []
    covered = 0
    for (cpu, gpus, milli, models), times in order:
        if covered >= TYPICAL_RATIO * len(workload):
            break
        covered += times
        typical.append((cpu, gpus, milli, models, float(times)))
    return [(cpu, gpus, milli, models, times / covered) for cpu, gpus, milli, models, times in typical]
