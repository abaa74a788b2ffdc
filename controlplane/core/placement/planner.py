"""Places gangs: all of a gang or nothing, on GPUs close together, with little GPU capacity stranded.

A node is chosen by these criteria, in this order: how close together the GPUs of a stage would be (one NVLink
island, one NUMA node, one node); the growth of the expected stranding
(:mod:`controlplane.core.placement.fragmentation`) plus a charge for each replica of the same tier that the
node already runs; the smallest GPUs; the order of node ids. A gang that fits somewhere is always placed: none
is refused to leave room for another.

:class:`Planner` holds the fleet's state between calls and re-evaluates only nodes that changed;
:mod:`controlplane.core.placement.batch_planner` uses it to place a list of gangs. It uses no random numbers
and no clock, so equal calls give equal results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from controlplane.core.placement.fragmentation import ExpectedDemand, Floats, Ints, Stranding
from controlplane.core.placement.free_capacity import FreeCapacity, all_rows
from controlplane.core.placement.gangs import Gang, GangShape, GangStage, Infeasible, Placement
from controlplane.core.placement.node_fit import Bools, NodeFit, NodeRefusals, fit_nodes
from controlplane.core.placement.topology import Distance, Node

SPREAD_MILLI = 1000
"""Charge for each replica of the same tier on the node: as much as stranding one GPU."""
EQUAL_MILLI = 1.0
"""Nodes whose costs differ by less than this count as equal: a thousandth of a GPU doesn't justify a larger
GPU."""
_LEARN_FIRST = 20
"""A learned demand is first updated after this many gangs."""
_LEARN_GROWTH = 2
"""A learned demand is updated again each time the number of gangs has grown by this factor."""


@dataclass(frozen=True, slots=True)
class PlacedCluster:
    """A fleet and the gangs that run on it."""

    nodes: tuple[Node, ...]
    placements: tuple[Placement, ...] = ()


def demand_of(*shapes: Iterable[GangShape]) -> ExpectedDemand:
    """The demand estimated from a sample of shapes: each shape is expected as often as it occurs."""
    counts: dict[GangShape, float] = {}
    for group in shapes:
        for shape in group:
            counts[shape] = counts.get(shape, 0.0) + 1.0
    return ExpectedDemand(tuple(counts.items()))


class Planner:
    """A fleet on which gangs are placed and removed. Not safe for use from several threads.

    Without a ``demand``, the demand is learned from the gangs to be placed so far.
    """

    def __init__(self, state: PlacedCluster, demand: ExpectedDemand | None = None) -> None:
        self._capacity = FreeCapacity(state.nodes)
        self._placements: dict[str, Placement] = {}
        self._replicas: dict[str, Ints] = {}
        """Replicas per node, by tier."""
        self._fits: dict[GangShape, _ShapeFit] = {}
        self._arrivals: dict[GangShape, float] = {}
        """Gangs to be placed so far, by shape."""
        self._total_arrivals = 0
        self._learn_at = _LEARN_FIRST if demand is None else None
        self._stranding = self._expect(demand or ExpectedDemand())
        for placement in state.placements:
            self._add(placement)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Running gangs, in the order in which they were placed."""
        return tuple(self._placements.values())

    def place(self, gang: Gang) -> Placement | Infeasible:
        """Chooses nodes and GPUs and takes them. ValueError if a gang of that id is already placed."""
        if gang.gang_id in self._placements:
            raise ValueError(f"gang '{gang.gang_id}' is already placed")
        self._learn(gang.shape)
        placement = self._on_one_node(gang)
        if placement is None and gang.shape.across_nodes and gang.shape.stages > 1:
            placement = self._on_several_nodes(gang)
        if placement is None:
            return Infeasible(gang, NodeRefusals(self._capacity, gang.shape))
        self._add(placement)
        return placement

    def remove(self, gang_id: str) -> Placement:
        """Frees the gang's resources. KeyError if no gang of that id is placed."""
        placement = self._placements.pop(gang_id)
        self._apply(placement, -1)
        return placement

    def _on_one_node(self, gang: Gang) -> Placement | None:
        """The best node for the whole gang; takes nothing yet."""
        fit = self._fit(gang.shape)
        if not fit.fits.any():
            return None
        nearest = fit.distance[fit.fits].min()
        cost = np.where(fit.distance == nearest, fit.stranded_milli, np.inf)
        beside = self._replicas.get(gang.tier) if gang.tier else None
        if beside is not None:
            cost = cost + SPREAD_MILLI * beside
        row = int(cost.argmin())
        if self._capacity.sizes_differ:
            equal = np.flatnonzero(cost <= cost[row] + EQUAL_MILLI)
            row = int(equal[np.lexsort((cost[equal], self._capacity.gpu_size[equal]))[0]])
        cost[row] = np.inf
        second = int(cost.argmin())
        uuids = [self._capacity.gpus[row][column].uuid for column in fit.columns[row].tolist()]
        node_id = self._capacity.nodes[row].node_id
        gpus = gang.shape.gpus
        has_second = np.isfinite(cost[second])
        return Placement(
            gang,
            tuple(
                GangStage(node_id, tuple(uuids[i * gpus : (i + 1) * gpus])) for i in range(gang.shape.stages)
            ),
            Distance(int(fit.distance[row])),
            float(fit.stranded_milli[row]),
            0 if beside is None else int(beside[row]),
            self._capacity.nodes[second].node_id if has_second else "",
            float(fit.stranded_milli[second]) if has_second else 0.0,
        )

    def _on_several_nodes(self, gang: Gang) -> Placement | None:
        """Places as many stages as fit on one node, then the next ones on another; None if some don't fit.
        Takes nothing yet."""
        parts: list[Placement] = []
        left, most = gang.shape.stages, gang.shape.stages - 1
        while left:
            part = None
            for count in range(min(left, most), 0, -1):
                shape = replace(gang.shape, stages=count, across_nodes=False)
                part = self._on_one_node(Gang(gang.gang_id, shape, gang.tier))
                if part is not None:
                    most = count
                    break
            if part is None:
                break
            parts.append(part)
            self._apply(part, +1)
            left -= len(part.stages)
        for part in parts:
            self._apply(part, -1)
        if left:
            return None
        return Placement(
            gang,
            tuple(stage for part in parts for stage in part.stages),
            max(part.distance for part in parts),
            sum(part.stranded_milli for part in parts),
            sum(part.replicas_beside for part in parts),
        )

    def _add(self, placement: Placement) -> None:
        self._placements[placement.gang.gang_id] = placement
        self._apply(placement, +1)

    def _apply(self, placement: Placement, sign: int) -> None:
        """Takes (+1) or gives back (-1) a placement's resources, except on nodes and GPUs that are gone."""
        capacity, gang = self._capacity, placement.gang
        for stage in placement.stages:
            row = capacity.row.get(stage.node_id)
            if row is None:
                continue
            slots = [capacity.slot[uuid] for uuid in stage.gpu_uuids if uuid in capacity.slot]
            columns = [column for at, column in slots if at == row]
            (capacity.take if sign > 0 else capacity.give_back)(row, columns, gang.shape)
        if gang.tier:
            none = np.zeros(len(capacity.nodes), dtype=np.int64)
            beside = self._replicas.setdefault(gang.tier, none)
            for node_id in placement.node_ids:
                if node_id in capacity.row:
                    beside[capacity.row[node_id]] += sign

    def _fit(self, shape: GangShape) -> _ShapeFit:
        fit = self._fits.get(shape)
        if fit is None:
            fit = self._fits[shape] = _ShapeFit(len(self._capacity.nodes), shape)
        fit.refresh(self._capacity, self._stranding)
        return fit

    def _learn(self, shape: GangShape) -> None:
        """Counts an arrival; updates the expected demand at the first one and whenever the count has
        doubled."""
        if self._learn_at is None:
            return
        self._arrivals[shape] = self._arrivals.get(shape, 0.0) + 1.0
        self._total_arrivals += 1
        if self._total_arrivals == 1 or self._total_arrivals >= self._learn_at:
            self._learn_at = max(self._learn_at, self._total_arrivals * _LEARN_GROWTH)
            self._stranding = self._expect(ExpectedDemand(tuple(self._arrivals.items())))
            self._fits.clear()

    def _expect(self, demand: ExpectedDemand) -> Stranding:
        capacity = self._capacity
        return Stranding(demand, capacity.kinds, capacity.most_cpu_milli, capacity.usable.shape[1])


class _ShapeFit:
    """How one shape fits each node, updated as nodes change."""

    def __init__(self, nodes: int, shape: GangShape) -> None:
        self.shape = shape
        self.fits: Bools = np.zeros(nodes, dtype=np.bool_)
        self.distance: Ints = np.zeros(nodes, dtype=np.int64)
        self.stranded_milli: Floats = np.full(nodes, np.inf)
        self.columns: Ints = np.zeros((nodes, shape.total_gpus), dtype=np.int64)
        self._read = -1

    def refresh(self, capacity: FreeCapacity, stranding: Stranding) -> None:
        """Re-evaluates the nodes that changed since the last call."""
        changes = capacity.changed
        if self._read < 0 or len(changes) - self._read >= len(self.fits):
            rows = all_rows(capacity)
        elif self._read == len(changes):
            return
        else:
            rows = np.array(sorted(set(changes[self._read :])), dtype=np.int64)
        self._read = len(changes)
        found: NodeFit = fit_nodes(capacity, stranding, self.shape, rows)
        self.fits[rows] = found.fits
        self.distance[rows] = found.distance
        self.stranded_milli[rows] = found.stranded_milli
        self.columns[rows] = found.columns
