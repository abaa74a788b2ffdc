"""How long replicas take to start on this cluster, measured on the last starts of each tier."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from controlplane.core.domain.endpoint import Endpoint, EndpointState

MAX_STARTS: Final = 8
"""Starts that are remembered per tier."""
SCHEDULING_S: Final = 3.0
"""From an order to the start of an engine: the part of a cold start that Serve and Ray take."""


class ColdStarts:
    """The last cold starts of all tiers."""

    def __init__(self) -> None:
        self._took_s: dict[str, deque[float]] = {}
        self._known: set[tuple[str, int]] = set()
        """(endpoint, generation of its engine) that were seen ready."""

    def learn(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Take in all endpoints, by id. Each engine process counts once; one that replaced another in the
        same replica does not count, because model and GPU were already there."""
        for endpoint in endpoints.values():
            key = endpoint.endpoint_id, endpoint.generation
            if endpoint.state is not EndpointState.READY or key in self._known:
                continue
            self._known.add(key)
            took_s = endpoint.since_unix_s - endpoint.started_unix_s
            if endpoint.generation == 1 and endpoint.started_unix_s > 0 and took_s > 0:
                self._took_s.setdefault(endpoint.tier, deque(maxlen=MAX_STARTS)).append(took_s)
        self._known = {key for key in self._known if key[0] in endpoints}

    def longest_s(self, tier: str) -> float | None:
        """From an order until the replica serves: the longest of the last starts; None: none was seen."""
        seen = self._took_s.get(tier)
        return max(seen) + SCHEDULING_S if seen else None

    def values(self) -> dict[str, list[float]]:
        """The measured starts in seconds, by tier, for the store."""
        return {tier: list(seen) for tier, seen in self._took_s.items()}

    def restore(self, values: Mapping[str, Sequence[float]]) -> None:
        """Take in what was stored before a restart."""
        for tier, seen in values.items():
            self._took_s[tier] = deque(seen, maxlen=MAX_STARTS)
