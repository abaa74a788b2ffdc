"""Where gangs go: all of a gang or nothing, close together, with as little GPU capacity stranded as can be.

A node is chosen by, in this order: how close together the GPUs of a stage are there (one NVLink island,
one NUMA node, one node); then the growth of the expected stranding
(:mod:`controlplane.core.placement.fragmentation`) plus a charge for each replica of the same tier that the
node already runs; among nodes that are equal in that, the one with the smallest GPUs; then the order of node
ids. A gang that fits somewhere is always placed: none is refused to keep room for another.

:class:`Planner` keeps the fleet's state between calls and looks again only at nodes that changed;
:mod:`controlplane.core.placement.batch_planner` answers a whole list at once with it. Nothing here draws a
random number or reads a clock: equal calls give equal answers.
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
"""What a replica of the same tier on a node counts for: as much as stranding one GPU."""
EQUAL_MILLI = 1.0
"""Nodes whose rank differs by less are equal: a thousandth of a GPU is no reason to take a larger one."""
_LEARN_FIRST = 20
_LEARN_GROWTH = 2


@dataclass(frozen=True, slots=True)
class PlacedCluster:
    """A fleet and what runs on it."""

    nodes: tuple[Node, ...]
    placements: tuple[Placement, ...] = ()


def demand_of(*shapes: Iterable[GangShape]) -> ExpectedDemand:
    """The demand that these are a sample of."""
    counts: dict[GangShape, float] = {}
    for group in shapes:
        for shape in group:
            counts[shape] = counts.get(shape, 0.0) + 1.0
    return ExpectedDemand(tuple(counts.items()))


class Planner:
    """A fleet that gangs come to and leave. It belongs to one caller; there are no locks.

    Without a ``demand`` it learns: what it was asked for so far is what it expects to be asked for.
    """

    def __init__(
        self, state: PlacedCluster, demand: ExpectedDemand | None = None, *, spread_milli: int = SPREAD_MILLI
    ) -> None:
        self._ledger = FreeCapacity(state.nodes)
        self._spread_milli = spread_milli
        self._placements: dict[str, Placement] = {}
        self._replicas: dict[str, Ints] = {}
        self._views: dict[GangShape, _View] = {}
        self._asked: dict[GangShape, float] = {}
        self._arrivals = 0
        self._learn_at = _LEARN_FIRST if demand is None else None
        self._stranding = self._expect(demand or ExpectedDemand())
        for placement in state.placements:
            self._enter(placement)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """What runs now, in the order it was placed."""
        return tuple(self._placements.values())

    def place(self, gang: Gang) -> Placement | Infeasible:
        """Find a place and take it. ValueError if a gang of that id is placed already."""
        if gang.gang_id in self._placements:
            raise ValueError(f"gang '{gang.gang_id}' has its place already")
        self._learn(gang.shape)
        placement = self._on_one_node(gang)
        if placement is None and gang.shape.across_nodes and gang.shape.stages > 1:
            placement = self._on_several_nodes(gang)
        if placement is None:
            return Infeasible(gang, NodeRefusals(self._ledger, gang.shape))
        self._enter(placement)
        return placement

    def remove(self, gang_id: str) -> Placement:
        """Give back what the gang holds. KeyError if there is no such gang."""
        placement = self._placements.pop(gang_id)
        self._book(placement, -1)
        return placement

    def _on_one_node(self, gang: Gang) -> Placement | None:
        """The best node for all of it; nothing is taken yet."""
        view = self._view(gang.shape)
        if not view.fits.any():
            return None
        nearest = view.distance[view.fits].min()
        rank = np.where(view.distance == nearest, view.stranded_milli, np.inf)
        beside = self._replicas.get(gang.tier) if gang.tier else None
        if beside is not None:
            rank = rank + self._spread_milli * beside
        row = int(rank.argmin())
        if self._ledger.sizes_differ:
            close = np.flatnonzero(rank <= rank[row] + EQUAL_MILLI)
            row = int(close[np.lexsort((rank[close], self._ledger.gpu_size[close]))[0]])
        rank[row] = np.inf
        second = int(rank.argmin())
        uuids = [self._ledger.gpus[row][column].uuid for column in view.columns[row].tolist()]
        node_id = self._ledger.nodes[row].node_id
        gpus = gang.shape.gpus
        has_second = np.isfinite(rank[second])
        return Placement(
            gang,
            tuple(
                GangStage(node_id, tuple(uuids[i * gpus : (i + 1) * gpus])) for i in range(gang.shape.stages)
            ),
            Distance(int(view.distance[row])),
            float(view.stranded_milli[row]),
            0 if beside is None else int(beside[row]),
            self._ledger.nodes[second].node_id if has_second else "",
            float(view.stranded_milli[second]) if has_second else 0.0,
        )

    def _on_several_nodes(self, gang: Gang) -> Placement | None:
        """Stage by stage, always as many on one node as fit; None, and nothing taken, if some don't."""
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
            self._book(part, +1)
            left -= len(part.stages)
        for part in parts:
            self._book(part, -1)
        if left:
            return None
        return Placement(
            gang,
            tuple(stage for part in parts for stage in part.stages),
            max(part.distance for part in parts),
            sum(part.stranded_milli for part in parts),
            sum(part.replicas_beside for part in parts),
        )

    def _enter(self, placement: Placement) -> None:
        self._placements[placement.gang.gang_id] = placement
        self._book(placement, +1)

    def _book(self, placement: Placement, sign: int) -> None:
        """Take or give back what a placement holds; what is no longer in the fleet is passed over."""
        ledger, gang = self._ledger, placement.gang
        for stage in placement.stages:
            row = ledger.row.get(stage.node_id)
            if row is None:
                continue
            slots = [ledger.slot[uuid] for uuid in stage.gpu_uuids if uuid in ledger.slot]
            columns = [column for at, column in slots if at == row]
            (ledger.take if sign > 0 else ledger.give_back)(row, columns, gang.shape)
        if gang.tier:
            none = np.zeros(len(ledger.nodes), dtype=np.int64)
            beside = self._replicas.setdefault(gang.tier, none)
            for node_id in placement.node_ids:
                if node_id in ledger.row:
                    beside[ledger.row[node_id]] += sign

    def _view(self, shape: GangShape) -> _View:
        view = self._views.get(shape)
        if view is None:
            view = self._views[shape] = _View(len(self._ledger.nodes), shape)
        view.refresh(self._ledger, self._stranding)
        return view

    def _learn(self, shape: GangShape) -> None:
        """Count what is asked for; look at the counts anew each time they have doubled."""
        if self._learn_at is None:
            return
        self._asked[shape] = self._asked.get(shape, 0.0) + 1.0
        self._arrivals += 1
        if self._arrivals == 1 or self._arrivals >= self._learn_at:
            self._learn_at = max(self._learn_at, self._arrivals * _LEARN_GROWTH)
            self._stranding = self._expect(ExpectedDemand(tuple(self._asked.items())))
            self._views.clear()

    def _expect(self, demand: ExpectedDemand) -> Stranding:
        ledger = self._ledger
        return Stranding(demand, ledger.kinds, ledger.most_cpu_milli, ledger.usable.shape[1])


class _View:
    """One shape on all nodes, kept up to date."""

    def __init__(self, nodes: int, shape: GangShape) -> None:
        self.shape = shape
        self.fits: Bools = np.zeros(nodes, dtype=np.bool_)
        self.distance: Ints = np.zeros(nodes, dtype=np.int64)
        self.stranded_milli: Floats = np.full(nodes, np.inf)
        self.columns: Ints = np.zeros((nodes, shape.total_gpus), dtype=np.int64)
        self._read = -1

    def refresh(self, ledger: FreeCapacity, stranding: Stranding) -> None:
        """Look again at the nodes that changed since the last time."""
        changes = ledger.changed
        if self._read < 0 or len(changes) - self._read >= len(self.fits):
            rows = all_rows(ledger)
        elif self._read == len(changes):
            return
        else:
            rows = np.array(sorted(set(changes[self._read :])), dtype=np.int64)
        self._read = len(changes)
        found: NodeFit = fit_nodes(ledger, stranding, self.shape, rows)
        self.fits[rows] = found.fits
        self.distance[rows] = found.distance
        self.stranded_milli[rows] = found.stranded_milli
        self.columns[rows] = found.columns
