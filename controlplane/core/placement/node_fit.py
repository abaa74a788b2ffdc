"""Which GPUs of a node a gang would get, how much capacity that would strand, and why a node can't take a
gang.

All functions work on many nodes at once: ``rows`` are row indices of the arrays in :class:`FreeCapacity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from controlplane.core.placement.fragmentation import Floats, Ints, NodeStates, Stranding
from controlplane.core.placement.free_capacity import FreeCapacity, gap_of
from controlplane.core.placement.gangs import GangShape, NodeRefusal, RefusalCause
from controlplane.core.placement.topology import Distance

Bools = NDArray[np.bool_]

_FAR = 1 << 30
"""A sort key larger than that of any GPU that may be chosen."""


@dataclass(frozen=True, slots=True)
class NodeFit:
    """How one shape fits many nodes."""

    fits: Bools
    distance: Ints
    """See :class:`~controlplane.core.placement.topology.Distance`."""
    stranded_milli: Floats
    """Growth of the expected stranding; infinite where the shape doesn't fit."""
    columns: Ints
    """The GPUs it would get, stage by stage; meaningless where the shape doesn't fit."""


def fit_nodes(capacity: FreeCapacity, stranding: Stranding, shape: GangShape, rows: Ints) -> NodeFit:
    """Tries ``shape``, with all its stages on one node, on each of ``rows``. Changes nothing."""
    eligible = _eligible(capacity, shape, rows)
    fits = capacity.open[rows] & (capacity.cpu_milli[rows] >= shape.cpu_milli * shape.stages)
    fits &= capacity.memory_bytes[rows] >= shape.memory_bytes * shape.stages
    if shape.gpus:
        fits &= eligible.sum(axis=1) >= shape.total_gpus
    distance = np.zeros(len(rows), dtype=np.int64)
    stranded = np.full(len(rows), np.inf)
    columns = np.zeros((len(rows), shape.total_gpus), dtype=np.int64)
    where = np.flatnonzero(fits)
    if len(where):
        found, able = rows[where], eligible[where]
        if shape.shared:
            columns[where, 0], stranded[where] = _share(capacity, stranding, shape, found, able)
        else:
            columns[where], distance[where] = _closest(capacity, shape, found, able)
            stranded[where] = _growth(capacity, stranding, shape, found, columns[where])
    return NodeFit(fits, distance, np.round(stranded, 6), columns)


def _eligible(capacity: FreeCapacity, shape: GangShape, rows: Ints) -> Bools:
    """GPUs that now have what the shape needs of one GPU."""
    eligible = capacity.usable[rows] & (capacity.free_milli[rows] >= shape.milli_gpu)
    if shape.gpu_memory_bytes:
        eligible &= capacity.free_bytes[rows] >= shape.gpu_memory_bytes
    if shape.models:
        eligible &= capacity.accepted(shape)[capacity.kind[rows]]
    return eligible


def _share(
    capacity: FreeCapacity, stranding: Stranding, shape: GangShape, rows: Ints, eligible: Bools
) -> tuple[Ints, Floats]:
    """The GPU of each row that can give the share with the least growth of stranding, and that growth."""
    gap = capacity.gap_milli[rows]
    after = gap_of(
        capacity.free_milli[rows] - shape.milli_gpu,
        capacity.free_bytes[rows] - shape.gpu_memory_bytes,
        capacity.size_bytes[rows],
    )
    # GPUs of a node in the same state stay alike: only one of each is evaluated.
    state = np.stack([gap, after, capacity.kind[rows], capacity.island[rows]])
    alike = np.all(state[:, :, :, None] == state[:, :, None, :], axis=0) & eligible[:, None, :]
    distinct = eligible & (alike.argmax(axis=2) == np.arange(gap.shape[1]))
    option, column = np.nonzero(distinct)
    options = gap[option]
    options[np.arange(len(option)), column] = after[option, column]
    which = np.concatenate([option, np.arange(len(rows))])
    cpu = capacity.cpu_milli[rows]
    stranded = stranding.of(
        NodeStates(
            np.concatenate([options, gap]),
            capacity.kind[rows[which]],
            capacity.island[rows[which]],
            capacity.largest_island[rows[which]],
            np.concatenate([cpu[option] - shape.cpu_milli, cpu]),
            capacity.islands,
        )
    )
    growth = np.full(gap.shape, np.inf)
    growth[option, column] = stranded[: len(option)] - stranded[len(option) :][option]
    best = np.argmin(np.round(growth, 6), axis=1)
    return best, growth[np.arange(len(rows)), best]


def _closest(capacity: FreeCapacity, shape: GangShape, rows: Ints, idle: Bools) -> tuple[Ints, Ints]:
    """Whole GPUs for all stages on each row, stage by stage, and the largest distance inside a stage."""
    distance = np.zeros(len(rows), dtype=np.int64)
    if not shape.gpus:
        return np.zeros((len(rows), 0), dtype=np.int64), distance
    if shape.total_gpus == 1 and not capacity.islands:
        return idle.argmax(axis=1)[:, None], distance
    stages = []
    for _ in range(shape.stages):
        columns, far = _together(idle, capacity.island[rows], capacity.numa[rows], shape.gpus)
        np.put_along_axis(idle, columns, False, axis=1)
        distance = np.maximum(distance, far)
        stages.append(columns)
    return np.concatenate(stages, axis=1), distance


def _growth(
    capacity: FreeCapacity, stranding: Stranding, shape: GangShape, rows: Ints, columns: Ints
) -> Floats:
    """Growth of the stranding if these whole GPUs are taken."""
    now = capacity.states(rows)
    gap = now.gap_milli.copy()
    np.put_along_axis(gap, columns, 0, axis=1)
    cpu = now.cpu_milli - shape.cpu_milli * shape.stages
    both = NodeStates(
        np.stack([now.gap_milli, gap], axis=1),
        now.kind[:, None, :],
        now.island[:, None, :],
        now.largest_island[:, None],
        np.stack([now.cpu_milli, cpu], axis=1),
        capacity.islands,
    )
    stranded = stranding.of(both)
    growth: Floats = stranded[:, 1] - stranded[:, 0]
    return growth


def _together(idle: Bools, island: Ints, numa: Ints, gpus: int) -> tuple[Ints, Ints]:
    """``gpus`` idle GPUs per row, as close together as possible, and their distance.

    They come from the island that is large enough and leaves the fewest GPUs idle, else from such a NUMA
    node, else from anywhere on the node.
    """
    width = idle.shape[1]
    column = np.arange(width)
    in_island = _idle_in_group(idle, np.where(island >= 0, island, column - width))
    in_numa = _idle_in_group(idle, numa)
    # Among groups that are large enough, the one with the fewest idle GPUs; its number breaks ties.
    by_island = np.where(idle & (in_island >= gpus), in_island * width + island % width, _FAR)
    by_numa = np.where(idle & (in_numa >= gpus), in_numa * width + numa, _FAR)
    # Inside a NUMA node or a node, large islands first, so that the GPUs come from few islands.
    pieces = (width - in_island) * width + island % width
    linked: Bools = np.any(by_island < _FAR, axis=1)
    near: Bools = np.any(by_numa < _FAR, axis=1)
    order = np.where(
        linked[:, None],
        by_island * width * width,
        np.where(near[:, None], by_numa * width * width + pieces, np.where(idle, pieces, _FAR * width)),
    )
    chosen = np.argsort(order, axis=1, kind="stable")[:, :gpus]
    far = np.where(linked, Distance.ISLAND, np.where(near, Distance.NUMA, Distance.NODE))
    return np.sort(chosen, axis=1), np.where(gpus == 1, int(Distance.SAME), far).astype(np.int64)


def _idle_in_group(idle: Bools, group: Ints) -> Ints:
    """For each GPU, the number of idle GPUs in its group."""
    counts: Ints = np.sum((group[:, :, None] == group[:, None, :]) & idle[:, None, :], axis=2)
    return counts


class NodeRefusals(Sequence[NodeRefusal]):
    """Why each node refused. Copies the free capacity at once, but computes the reasons only when read."""

    def __init__(self, capacity: FreeCapacity, shape: GangShape) -> None:
        self._capacity = capacity
        self._shape = shape
        self._nodes = capacity.nodes
        self._gpus = capacity.gpus
        self._free = (
            capacity.free_milli.copy(),
            capacity.free_bytes.copy(),
            capacity.cpu_milli.copy(),
            capacity.memory_bytes.copy(),
        )

    @cached_property
    def _found(self) -> tuple[Ints, Sequence[int], Sequence[Ints]]:
        """Each node's index in ``_CAUSES``; for each cause, the amount needed; for each cause, what each node
        has."""
        capacity, shape = self._capacity, self._shape
        free_milli, free_bytes, cpu_milli, memory_bytes = self._free
        # If stages may be on different nodes, a node needs room for only one of them.
        stages = 1 if shape.across_nodes else shape.stages
        gpus = shape.gpus * stages
        accepted = capacity.present & capacity.accepted(shape)[capacity.kind]
        usable = accepted & capacity.usable
        large = usable & (capacity.size_bytes >= shape.gpu_memory_bytes)
        idle = large & (free_milli >= shape.milli_gpu)
        roomy = idle & (free_bytes >= shape.gpu_memory_bytes)
        counts = [part.sum(axis=1) for part in (accepted, usable, large, idle, roomy)]
        needed = [*[gpus] * len(counts), shape.cpu_milli * stages, shape.memory_bytes * stages]
        has = [*counts, cpu_milli, memory_bytes]
        lacking = [~capacity.open, *(have < need for have, need in zip(has, needed, strict=True))]
        code = np.select(lacking, range(len(lacking)), default=len(lacking))
        return (code, [0, *needed, shape.stages], [np.zeros_like(has[0]), *has, _stages(has[4:], shape)])

    def __len__(self) -> int:
        return len(self._nodes)

    @overload
    def __getitem__(self, index: int) -> NodeRefusal: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NodeRefusal]: ...
    def __getitem__(self, index: int | slice) -> NodeRefusal | Sequence[NodeRefusal]:
        if isinstance(index, slice):
            return [self._refusal(i) for i in range(*index.indices(len(self)))]
        return self._refusal(range(len(self))[index])

    def _refusal(self, row: int) -> NodeRefusal:
        codes, needed, has = self._found
        code = int(codes[row])
        cause = _CAUSES[code]
        note = ""
        if cause is RefusalCause.NODE_UNAVAILABLE:
            note = self._nodes[row].unavailable
        elif cause is RefusalCause.GPU_UNAVAILABLE:
            note = "; ".join(
                f"GPU {gpu.index}: {gpu.unavailable}" for gpu in self._gpus[row] if gpu.unavailable
            )
        return NodeRefusal(self._nodes[row].node_id, cause, needed[code], int(has[code][row]), note)


def _stages(has: Sequence[Ints], shape: GangShape) -> Ints:
    """Number of stages that each node has room for: by its GPUs, CPUs and memory."""
    needed = (shape.gpus, shape.cpu_milli, shape.memory_bytes)
    counts = [have // need for have, need in zip(has, needed, strict=True) if need]
    most: Ints = np.minimum.reduce(counts) if counts else np.full_like(has[0], shape.stages)
    return most


_CAUSES = (
    RefusalCause.NODE_UNAVAILABLE,
    RefusalCause.NO_SUCH_GPU,
    RefusalCause.GPU_UNAVAILABLE,
    RefusalCause.GPU_TOO_SMALL,
    RefusalCause.GPU_BUSY,
    RefusalCause.GPU_MEMORY,
    RefusalCause.CPU,
    RefusalCause.MEMORY,
    RefusalCause.STAGES,
)
"""In the order in which they are checked: the first that applies is the node's cause."""
