"""The machines that replicas run on: the production planner finds each its place, and who finds none waits.

What the run begins with is placed at once, as ``tierplane plan`` does it; after that each replica when it is
ordered. One that finds no room waits, and when something is freed all that wait are tried again, the longest
waiting first; none keeps room from those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from controlplane.core.placement.batch_planner import plan
from controlplane.core.placement.gangs import WHOLE_MILLI, Gang, GangShape, Infeasible, Placement
from controlplane.core.placement.planner import PlacedCluster, Planner, demand_of
from controlplane.core.placement.topology import Node
from controlplane.simulation.clock import VirtualClock

Start = Callable[[Placement | None, bool], None]
"""Told where a replica goes, and whether it is there already: the run begins with it."""


class Cluster:
    """Places for replicas. Without nodes there is always one, and nobody says where."""

    def __init__(
        self, clock: VirtualClock, nodes: Sequence[Node] | None, expected: Iterable[GangShape] = ()
    ) -> None:
        """``expected`` are the shapes that must be reckoned with, as often as each is likely. Nothing is
        placed before :meth:`open`."""
        self._clock = clock
        self._nodes = None if nodes is None else tuple(nodes)
        self._demand = demand_of(expected)
        self._planner: Planner | None = None
        self._model_of = {gpu.uuid: gpu.model for node in nodes or () for gpu in node.gpus}
        self._waiting: dict[str, tuple[Gang | None, Start]] = {}
        self._gpus = self._count()
        self._open = False
        self._again = False
        """They are about to be tried again."""
        self._held_milli = 0
        self._most_milli = 0

    @property
    def nodes(self) -> int | None:
        """How many there are; None: nobody says."""
        return None if self._nodes is None else len(self._nodes)

    @property
    def gpus(self) -> float | None:
        """GPUs that can be used now, as the controller counts them: 0 while all that have any are away, None
        where there never was one."""
        return self._gpus

    @property
    def most_gpus(self) -> float:
        """The most that were held at once, shares counted as such."""
        return self._most_milli / WHOLE_MILLI

    @property
    def placements(self) -> tuple[Placement, ...]:
        """What runs now."""
        return self._planner.placements if self._planner is not None else ()

    def model_of(self, placement: Placement | None) -> str:
        """The GPU model that a replica runs on; empty: none, or nobody says."""
        uuids = placement.gpu_uuids if placement is not None else ()
        return self._model_of[uuids[0]] if uuids else ""

    def open(self) -> None:
        """Place what was asked for so far, all of it together. The run begins."""
        self._open = True
        asked, self._waiting = self._waiting, {}
        places: dict[str, Placement] = {}
        if self._nodes is not None:
            state = PlacedCluster(self._nodes)
            found = plan(state, [gang for gang, _ in asked.values() if gang is not None], self._demand)
            places = {placement.gang.gang_id: placement for placement in found.placements}
            self._planner = Planner(replace(state, placements=found.placements), self._demand)
            self._waiting = {each.gang.gang_id: asked.pop(each.gang.gang_id) for each in found.infeasible}
        for replica_id, (_, start) in asked.items():
            placement = places.get(replica_id)
            self._hold(placement)
            start(placement, True)

    def ask(self, replica_id: str, gang: Gang | None, start: Start) -> None:
        """Calls ``start`` as soon as there is a place: at once, or when others have left theirs. ``gang``
        has the replica's id; None: it runs elsewhere, where there is always room."""
        self._waiting[replica_id] = gang, start
        # Those that were there before come first.
        if self._open and not self._again:
            self._try(replica_id)

    def leave(self, replica_id: str) -> None:
        """Gives the place back, or waits no longer for one. KeyError: it has none and waits for none."""
        if self._waiting.pop(replica_id, None) is None and self._planner is not None:
            self._held_milli -= self._planner.remove(replica_id).gang.shape.total_milli
            self._freed()

    def lose(self, node_id: str) -> tuple[str, ...]:
        """The node is gone. The answer are the replicas that were on it: their places are to be left."""
        self._change(node_id, "lost")
        return tuple(p.gang.gang_id for p in self.placements if node_id in p.node_ids)

    def restore(self, node_id: str) -> None:
        """The node is back and empty."""
        self._change(node_id, "")
        self._freed()

    def _count(self) -> float | None:
        usable = [
            not (node.unavailable or gpu.unavailable) for node in self._nodes or () for gpu in node.gpus
        ]
        return float(sum(usable)) if usable else None

    def _change(self, node_id: str, unavailable: str) -> None:
        self._nodes = tuple(
            replace(node, unavailable=unavailable) if node.node_id == node_id else node
            for node in self._nodes or ()
        )
        self._planner = Planner(PlacedCluster(self._nodes, self.placements), self._demand)
        self._gpus = self._count()

    def _freed(self) -> None:
        if self._waiting and not self._again:
            self._again = True
            # Once everything that happens at this moment has happened.
            self._clock.at(self._clock.now_s, self._try_all)

    def _try_all(self, _: Any) -> None:
        self._again = False
        refused: set[GangShape | None] = set()
        for replica_id, (gang, _) in list(self._waiting.items()):
            shape = gang.shape if gang is not None else None
            if shape not in refused and not self._try(replica_id):
                refused.add(shape)

    def _try(self, replica_id: str) -> bool:
        gang, start = self._waiting[replica_id]
        placement = None
        if gang is not None and self._planner is not None:
            found = self._planner.place(gang)
            if isinstance(found, Infeasible):
                return False
            placement = found
        del self._waiting[replica_id]
        self._hold(placement)
        start(placement, False)
        return True

    def _hold(self, placement: Placement | None) -> None:
        if placement is not None:
            self._held_milli += placement.gang.shape.total_milli
            self._most_milli = max(self._most_milli, self._held_milli)
