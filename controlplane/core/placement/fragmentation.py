"""How much free GPU capacity of a node is expected to remain unused («stranded»).

A gap on a GPU is useful only if gangs arrive that fit into it. For a gap of ``x`` thousandths of a GPU with
``c`` CPUs available to it, and gangs that arrive independently with frequencies ``q``, the amount left
stranded obeys a Bellman equation: the first arrival that fits takes its part and leaves a smaller gap; with a
small probability ``HAZARD`` per arrival no more gangs arrive, and the whole gap is lost::

    W(x, c) = (HAZARD · x + Σ q_t · W(x - milli_t, c - cpu_t)) / (HAZARD + Σ q_t)     over t that fit

A node's stranding is the sum over its GPUs, each with its part of the node's free CPUs; plus a small amount
for each GPU that is not idle; plus, for gangs of several GPUs, the free capacity times the share of those
gangs that no longer fit the node (or its best NVLink island). A gang is placed where this sum grows least.

The fragmentation measure of Weng et al., «Beware of Fragmentation» (USENIX ATC'23), asks what the *next* gang
can't use; this one asks what remains after many gangs have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

HAZARD = 0.01
"""Probability per arrival that no more gangs arrive. Placements hardly change between 0.005 and 0.02."""
SEVERAL_GPUS_WEIGHT = 0.5
"""A gap that gangs of several GPUs can't use may still serve gangs of one GPU, so it counts half."""
STARTED_MILLI = HAZARD * WHOLE_MILLI
"""Cost of placing the first gang on an idle GPU. The equation alone would prefer an idle GPU to a partly used
one, because less is lost if no more gangs arrive; but whole idle GPUs are worth more than that."""
_QUANTUM_MILLI = 10
_GAPS = WHOLE_MILLI // _QUANTUM_MILLI + 1
_CPU_STEPS = 128


@dataclass(frozen=True, slots=True)
class GpuKind:
    """A kind of GPU: to a gang, all GPUs of one kind are equal."""

    model: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ExpectedDemand:
    """Relative frequencies of the shapes that are expected."""

    weights: tuple[tuple[GangShape, float], ...] = ()


@dataclass(frozen=True, slots=True)
class NodeStates:
    """States of nodes as arrays. The last axis is the GPU, except for ``largest_island`` and ``cpu_milli``,
    which have no GPU axis; the other axes are the caller's."""

    gap_milli: Ints
    """Free share of each GPU, limited by its free memory."""
    kind: Ints
    """Indices into the kinds, shaped like ``gap_milli`` or broadcast to it."""
    island: Ints
    """Number of the GPU's NVLink island on the node from 0, or -1 for a GPU without links; shaped like
    ``gap_milli`` or broadcast to it."""
    largest_island: Ints
    """GPUs in the node's largest island."""
    cpu_milli: Ints
    """Free CPUs of the node, in thousandths."""
    islands: int
    """The largest number of islands on one node."""


class Stranding:
    """The expected stranding under one demand, for the kinds of GPUs in one fleet."""

    def __init__(
        self, demand: ExpectedDemand, kinds: Sequence[GpuKind], most_cpu_milli: int, most_gpus: int
    ) -> None:
        """``kinds`` has at least one; ``most_cpu_milli`` and ``most_gpus`` are those of the largest node."""
        self._step = max(1, -(-most_cpu_milli // _CPU_STEPS))
        total = sum(weight for _, weight in demand.weights) or 1.0
        shares = [(shape, weight / total) for shape, weight in demand.weights if weight > 0 and shape.gpus]
        known: dict[tuple[tuple[tuple[int, int], float], ...], Floats] = {}
        tables = []
        for kind in kinds:
            items = self._items(shares, kind)
            if items not in known:
                known[items] = _solve(items)
            tables.append(known[items])
        self._table = np.concatenate([table.ravel() for table in tables])
        self._missed_on_node, self._missed_in_island = self._several(shares, kinds, most_gpus)

    def _items(
        self, shares: Sequence[tuple[GangShape, float]], kind: GpuKind
    ) -> tuple[tuple[tuple[int, int], float], ...]:
        """The demand per single GPU of this kind: (gap quanta, CPU steps) → frequency."""
        items: dict[tuple[int, int], float] = {}
        for shape, share in shares:
            milli = shape.milli_gpu
            if kind.memory_bytes and shape.gpu_memory_bytes:
                milli = max(milli, -(-shape.gpu_memory_bytes * WHOLE_MILLI // kind.memory_bytes))
            if shape.accepts(kind.model) and milli <= WHOLE_MILLI:
                item = -(-milli // _QUANTUM_MILLI), -(-shape.cpu_milli // (shape.gpus * self._step))
                items[item] = items.get(item, 0.0) + share * shape.total_gpus
        return tuple(sorted(items.items()))

    def of(self, states: NodeStates) -> Floats:
        """Expected stranding of each state, in thousandths of a GPU."""
        gap = states.gap_milli
        free = gap.sum(axis=-1)
        budget = np.maximum(states.cpu_milli, 0) / (np.maximum(free, 1) * self._step)
        steps = np.minimum(gap * budget[..., None], _CPU_STEPS - 1e-9)
        low = steps.astype(np.int64)
        part = steps - low
        at = (states.kind * _GAPS + gap // _QUANTUM_MILLI) * (_CPU_STEPS + 1) + low
        singles = self._table[at] * (1.0 - part) + self._table[at + 1] * part
        started = (gap < WHOLE_MILLI).sum(axis=-1)
        result: Floats = singles.sum(axis=-1) + STARTED_MILLI * started
        if self._missed_on_node is not None:
            result += SEVERAL_GPUS_WEIGHT * free * self._missed(states)
        return result

    def _missed(self, states: NodeStates) -> Floats:
        """The share of the demand that needs several GPUs at once and no longer fits."""
        assert self._missed_on_node is not None
        idle = states.gap_milli == WHOLE_MILLI
        kind = states.kind[..., 0]
        cpu = np.maximum(states.cpu_milli // self._step, 0)
        missed: Floats = self._missed_on_node[kind, states.largest_island, idle.sum(axis=-1), cpu]
        if self._missed_in_island is not None and states.islands:
            most = _most_idle_in_island(idle, states)
            missed = missed + self._missed_in_island[kind, states.largest_island, most, cpu]
        return missed

    def _several(
        self, shares: Sequence[tuple[GangShape, float]], kinds: Sequence[GpuKind], most_gpus: int
    ) -> tuple[Floats | None, Floats | None]:
        """The missed share of the demand by kind, size of the largest island, idle GPUs and CPU steps.

        The first table is indexed by the idle GPUs of the node, the second by those of its best island. If an
        island is large enough for a shape, each table counts half. A node with several kinds counts as the
        kind of its first GPU.
        """
        several = [(shape, share) for shape, share in shares if shape.gpus > 1]
        if not several:
            return None, None
        on_node = np.zeros((len(kinds), most_gpus + 1, most_gpus + 1, _CPU_STEPS + 1))
        in_island = np.zeros_like(on_node)
        count, cpu = np.arange(most_gpus + 1), np.arange(_CPU_STEPS + 1)
        for shape, share in several:
            needed = -(-shape.cpu_milli // self._step)
            missed = share * ((count[:, None] < shape.gpus) | (cpu[None, :] < needed))
            linked = (count >= shape.gpus)[:, None, None]
            accepted = [i for i, kind in enumerate(kinds) if shape.accepts(kind.model)]
            on_node[accepted] += np.where(linked, missed / 2, missed)
            in_island[accepted] += np.where(linked, missed / 2, 0.0)
        return on_node, in_island


def _most_idle_in_island(idle: NDArray[np.bool_], states: NodeStates) -> Ints:
    """Idle GPUs in the island that has the most, per state."""
    most = np.zeros(idle.shape[:-1], dtype=np.int64)
    for island in range(states.islands):
        np.maximum(most, (idle & (states.island == island)).sum(axis=-1), out=most)
    return most


def _solve(items: Sequence[tuple[tuple[int, int], float]]) -> Floats:
    """W for every gap (rows, in quanta) and CPU budget (columns, in steps)."""
    columns = np.arange(_CPU_STEPS + 1)
    table = np.zeros((_GAPS, _CPU_STEPS + 1))
    size = np.array([gap for (gap, _), _ in items], dtype=np.int64)
    cpu = np.array([steps for (_, steps), _ in items], dtype=np.int64)
    weight = np.array([share for _, share in items])
    left = columns[None, :] - cpu[:, None]
    weights = np.where(left >= 0, weight[:, None], 0.0)
    left = np.maximum(left, 0)
    for gap in range(1, _GAPS):
        lost = HAZARD * gap * _QUANTUM_MILLI
        fits = np.searchsorted(size, gap, side="right")  # the items are sorted by size
        after = table[gap - size[:fits, None], left[:fits]]
        table[gap] = (lost + (weights[:fits] * after).sum(axis=0)) / (HAZARD + weights[:fits].sum(axis=0))
    return table
