"""Random failures of nodes, determined by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from controlplane.simulation.clock import VirtualClock


@dataclass(frozen=True, slots=True)
class OutageModel:
    """How often a node fails, and for how long."""

    mtbf_s: float
    """Mean time between a node's (re)start and its failure; exponentially distributed."""
    recovery_s: float
    """Time until the node is back, with nothing running on it."""


class Outages:
    """Fails each node according to its own random sequence, so that nodes don't affect each other."""

    def __init__(
        self,
        clock: VirtualClock,
        model: OutageModel,
        node_ids: Iterable[str],
        *,
        seed: int,
        on_lost: Callable[[str], None],
        on_back: Callable[[str], None],
    ) -> None:
        self._clock = clock
        self._model = model
        self._rngs = {node_id: random.Random(f"node {node_id} {seed}") for node_id in node_ids}
        self._on_lost = on_lost
        self._on_back = on_back
        self.failures = 0
        for node_id in self._rngs:
            self._schedule_failure(node_id)

    def _schedule_failure(self, node_id: str) -> None:
        lifetime_s = self._rngs[node_id].expovariate(1.0 / self._model.mtbf_s)
        self._clock.at(self._clock.now_s + lifetime_s, self._fail, node_id)

    def _fail(self, node_id: str) -> None:
        self.failures += 1
        self._on_lost(node_id)
        self._clock.at(self._clock.now_s + self._model.recovery_s, self._recover, node_id)

    def _recover(self, node_id: str) -> None:
        self._on_back(node_id)
        self._schedule_failure(node_id)
