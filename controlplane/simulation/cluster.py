"""The machines on which replicas run. The production planner places replicas; those without room wait.

The replicas at the beginning of a run are placed together, as by ``tierplane plan``; later ones are placed
one by one when they are ordered. When resources become free, all waiting replicas are tried again, the
longest waiting first; one that doesn't fit doesn't block those behind it.
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

OnPlaced = Callable[[Placement | None, bool], None]
"""Called with the placement (None without nodes), and whether the replica is ready at once because it belongs
to the beginning of the run."""


class Cluster:
    """The nodes of a scenario and the replicas on them. Without nodes there is always room."""

    def __init__(
        self, clock: VirtualClock, nodes: Sequence[Node] | None, expected: Iterable[GangShape] = ()
    ) -> None:
        """``expected`` is a sample of the shapes that replicas will have. Nothing is placed before
        :meth:`open`."""
        self._clock = clock
        self._nodes = None if nodes is None else tuple(nodes)
        self._demand = demand_of(expected)
        self._planner: Planner | None = None
        self._model_of = {gpu.uuid: gpu.model for node in nodes or () for gpu in node.gpus}
        self._waiting: dict[str, tuple[Gang | None, OnPlaced]] = {}
        self._gpus = self._usable_gpus()
        self._open = False
        self._retry_scheduled = False
        self._used_milli = 0
        self._most_milli = 0

    @property
    def nodes(self) -> int | None:
        """Number of nodes; None without nodes."""
        return None if self._nodes is None else len(self._nodes)

    @property
    def gpus(self) -> float | None:
        """Number of usable GPUs, as the controller counts them: 0 while all nodes with GPUs are lost, None if
        no node has any."""
        return self._gpus

    @property
    def most_gpus(self) -> float:
        """Largest number of GPUs in use at once; a share counts as a fraction."""
        return self._most_milli / WHOLE_MILLI

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The placements of the replicas that run now."""
        return self._planner.placements if self._planner is not None else ()

    def model_of(self, placement: Placement | None) -> str:
        """The GPU model on which a replica runs; empty if it has no GPU or there are no nodes."""
        uuids = placement.gpu_uuids if placement is not None else ()
        return self._model_of[uuids[0]] if uuids else ""

    def open(self) -> None:
        """Begin the run: place all replicas added so far together."""
        self._open = True
        added, self._waiting = self._waiting, {}
        placements: dict[str, Placement] = {}
        if self._nodes is not None:
            state = PlacedCluster(self._nodes)
            found = plan(state, [gang for gang, _ in added.values() if gang is not None], self._demand)
            placements = {placement.gang.gang_id: placement for placement in found.placements}
            self._planner = Planner(replace(state, placements=found.placements), self._demand)
            self._waiting = {each.gang.gang_id: added.pop(each.gang.gang_id) for each in found.infeasible}
        for replica_id, (_, on_placed) in added.items():
            placement = placements.get(replica_id)
            self._count(placement)
            on_placed(placement, True)

    def add(self, replica_id: str, gang: Gang | None, on_placed: OnPlaced) -> None:
        """Place a replica and call ``on_placed``: at once, or as soon as there is room. ``gang`` has the
        replica's id, or is None for a replica outside the nodes, for which there is always room."""
        self._waiting[replica_id] = gang, on_placed
        # Replicas that are already waiting come first.
        if self._open and not self._retry_scheduled:
            self._try(replica_id)

    def remove(self, replica_id: str) -> None:
        """Free the replica's resources, or stop waiting for room. KeyError if it is neither placed nor
        waiting."""
        if self._waiting.pop(replica_id, None) is None and self._planner is not None:
            self._used_milli -= self._planner.remove(replica_id).gang.shape.total_milli
            self._freed()

    def lose(self, node_id: str) -> tuple[str, ...]:
        """Fail the node. Returns the ids of the replicas on it, which the caller must remove."""
        self._change(node_id, "lost")
        return tuple(p.gang.gang_id for p in self.placements if node_id in p.node_ids)

    def restore(self, node_id: str) -> None:
        """Bring the node back, with nothing running on it."""
        self._change(node_id, "")
        self._freed()

    def _usable_gpus(self) -> float | None:
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
        self._gpus = self._usable_gpus()

    def _freed(self) -> None:
        if self._waiting and not self._retry_scheduled:
            self._retry_scheduled = True
            # After all other events of this time.
            self._clock.at(self._clock.now_s, self._try_all)

    def _try_all(self, _: Any) -> None:
        self._retry_scheduled = False
        refused: set[GangShape | None] = set()
        for replica_id, (gang, _) in list(self._waiting.items()):
            shape = gang.shape if gang is not None else None
            if shape not in refused and not self._try(replica_id):
                refused.add(shape)

    def _try(self, replica_id: str) -> bool:
        gang, on_placed = self._waiting[replica_id]
        placement = None
        if gang is not None and self._planner is not None:
            found = self._planner.place(gang)
            if isinstance(found, Infeasible):
                return False
            placement = found
        del self._waiting[replica_id]
        self._count(placement)
        on_placed(placement, False)
        return True

    def _count(self, placement: Placement | None) -> None:
        if placement is not None:
            self._used_milli += placement.gang.shape.total_milli
            self._most_milli = max(self._most_milli, self._used_milli)
