"""The fleet's free capacity as arrays, which the placement planner reads and updates.

Rows are nodes in the order of their ids, columns are a node's GPUs in the order of their indices. A GPU that
doesn't exist or is out of use has nothing free. Only :meth:`FreeCapacity.take` and
:meth:`FreeCapacity.give_back` change the arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from controlplane.core.placement.fragmentation import GpuKind, Ints, NodeStates
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape
from controlplane.core.placement.topology import Gpu, Node, islands, numa_groups

UNKNOWN_BYTES = 1 << 60
"""Used for GPUs whose memory is unknown: enough for any gang."""


class FreeCapacity:
    """Free capacity of nodes. It doesn't record which gang took what. ValueError if two nodes have the same
    id, or two GPUs the same UUID."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = tuple(sorted(nodes, key=lambda node: node.node_id))
        self.row = {node.node_id: i for i, node in enumerate(self.nodes)}
        self.gpus = tuple(tuple(sorted(node.gpus, key=lambda gpu: gpu.index)) for node in self.nodes)
        self.slot = {gpu.uuid: (i, j) for i, gpus in enumerate(self.gpus) for j, gpu in enumerate(gpus)}
        if len(self.row) != len(self.nodes):
            raise ValueError("two nodes have the same id")
        if len(self.slot) != sum(map(len, self.gpus)):
            raise ValueError("two GPUs have the same UUID")
        rows, columns = len(self.nodes), max([1, *map(len, self.gpus)])
        shape = (rows, columns)
        self.present = np.zeros(shape, dtype=np.bool_)
        self.usable = np.zeros(shape, dtype=np.bool_)
        self.kind: Ints = np.zeros(shape, dtype=np.int64)
        self.island: Ints = np.full(shape, -1, dtype=np.int64)
        self.numa: Ints = np.zeros(shape, dtype=np.int64)
        self.free_milli: Ints = np.zeros(shape, dtype=np.int64)
        self.size_bytes: Ints = np.zeros(shape, dtype=np.int64)
        self.free_bytes: Ints = np.zeros(shape, dtype=np.int64)
        self.gap_milli: Ints = np.zeros(shape, dtype=np.int64)
        self.largest_island: Ints = np.ones(rows, dtype=np.int64)
        self.open = np.array([not node.unavailable for node in self.nodes], dtype=np.bool_)
        self.cpu_milli: Ints = np.array([node.cpu_milli for node in self.nodes], dtype=np.int64)
        self.memory_bytes: Ints = np.array([node.memory_bytes for node in self.nodes], dtype=np.int64)
        kinds: dict[GpuKind, int] = {}
        for i, (node, gpus) in enumerate(zip(self.nodes, self.gpus, strict=True)):
            for j, gpu in enumerate(gpus):
                self._write(i, j, node, gpu, kinds)
            for number, group in enumerate(group for group in islands(gpus) if len(group) > 1):
                self.island[i, group] = number
                self.largest_island[i] = max(self.largest_island[i], len(group))
            for number, group in enumerate(numa_groups(gpus)):
                self.numa[i, group] = number
        self.kinds = tuple(kinds) or (GpuKind("", 0),)
        self.gpu_size: Ints = np.where(self.present, self.size_bytes, 0).max(axis=1)
        """Memory of each node's largest GPU; 0 without GPUs."""
        self.sizes_differ = len(np.unique(self.gpu_size)) > 1
        self.islands = int(self.island.max(initial=-1)) + 1
        self.most_cpu_milli = int(self.cpu_milli.max(initial=0))
        self.changed: list[int] = []
        """Rows in the order in which they changed; each reader remembers how far it has read."""

    def _write(self, i: int, j: int, node: Node, gpu: Gpu, kinds: dict[GpuKind, int]) -> None:
        self.present[i, j] = True
        self.kind[i, j] = kinds.setdefault(GpuKind(gpu.model, gpu.memory_bytes), len(kinds))
        self.size_bytes[i, j] = gpu.memory_bytes or UNKNOWN_BYTES
        if not (node.unavailable or gpu.unavailable):
            self.usable[i, j] = True
            self.free_milli[i, j] = self.gap_milli[i, j] = WHOLE_MILLI
            self.free_bytes[i, j] = self.size_bytes[i, j]

    def states(self, rows: Ints) -> NodeStates:
        """The input of :class:`~controlplane.core.placement.fragmentation.Stranding` for these rows."""
        return NodeStates(
            self.gap_milli[rows],
            self.kind[rows],
            self.island[rows],
            self.largest_island[rows],
            self.cpu_milli[rows],
            self.islands,
        )

    def accepted(self, shape: GangShape) -> NDArray[np.bool_]:
        """Whether the shape accepts GPUs of each kind."""
        return np.array([shape.accepts(kind.model) for kind in self.kinds], dtype=np.bool_)

    def take(self, row: int, columns: Sequence[int], shape: GangShape) -> None:
        """Subtract what one stage of ``shape`` uses on this node and these of its GPUs."""
        self._add(row, columns, shape, -1)

    def give_back(self, row: int, columns: Sequence[int], shape: GangShape) -> None:
        """The reverse of :meth:`take`."""
        self._add(row, columns, shape, +1)

    def _add(self, row: int, columns: Sequence[int], shape: GangShape, sign: int) -> None:
        self.cpu_milli[row] += sign * shape.cpu_milli
        self.memory_bytes[row] += sign * shape.memory_bytes
        for column in columns:
            if self.usable[row, column]:
                self.free_milli[row, column] += sign * shape.milli_gpu
                self.free_bytes[row, column] += sign * shape.gpu_memory_bytes
                self.gap_milli[row, column] = gap_of(
                    self.free_milli[row, column], self.free_bytes[row, column], self.size_bytes[row, column]
                )
        self.changed.append(row)


def gap_of(free_milli: Ints, free_bytes: Ints, size_bytes: Ints) -> Ints:
    """The free share of a GPU in thousandths, limited by its free memory."""
    by_memory: Ints = np.floor(free_bytes / np.maximum(size_bytes, 1) * WHOLE_MILLI + 1e-9).astype(np.int64)
    gap: Ints = np.maximum(np.minimum(free_milli, by_memory), 0)
    return gap


def all_rows(capacity: FreeCapacity) -> Ints:
    """Indices of all nodes."""
    return np.arange(len(capacity.nodes), dtype=np.int64)
