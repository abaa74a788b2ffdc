"""Nodes that fail and come back, at random by the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from controlplane.simulation.clock import VirtualClock


@dataclass(frozen=True, slots=True)
class OutageModel:
    """How often a node fails, and for how long."""

    mtbf_s: float
    """Mean time from when a node is there until it fails; exponentially distributed."""
    recovery_s: float
    """Until it is back, empty."""


class Outages:
    """Fails each node by a random sequence of its own, so that one node's fate changes no other's."""

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
            self._await(node_id)

    def _await(self, node_id: str) -> None:
        lasts_s = self._rngs[node_id].expovariate(1.0 / self._model.mtbf_s)
        self._clock.at(self._clock.now_s + lasts_s, self._fail, node_id)

    def _fail(self, node_id: str) -> None:
        self.failures += 1
        self._on_lost(node_id)
        self._clock.at(self._clock.now_s + self._model.recovery_s, self._return, node_id)

    def _return(self, node_id: str) -> None:
        self._on_back(node_id)
        self._await(node_id)
