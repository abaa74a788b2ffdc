"""How long replicas take to start on this cluster, measured from the last starts of each tier."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from controlplane.core.domain.endpoint import Endpoint, EndpointState

MAX_STARTS: Final = 8
"""Starts that are stored per tier."""
SCHEDULING_S: Final = 3.0
"""Time from ordering a replica to the start of its engine: the share of Serve and Ray in a cold start."""


class ColdStarts:
    """The last cold starts of all tiers."""

    def __init__(self) -> None:
        self._took_s: dict[str, deque[float]] = {}
        self._known: set[tuple[str, int]] = set()
        """(endpoint id, engine generation) of the engines that have been ready."""

    def learn(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Record the starts of engines that became ready; ``endpoints`` are all endpoints, by id. Each engine
        process counts once. An engine that was restarted in the same replica does not count, because the
        model and the GPU were already there."""
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
        """The longest of the last starts, from ordering a replica until it serves; None if none was
        measured."""
        seen = self._took_s.get(tier)
        return max(seen) + SCHEDULING_S if seen else None

    def values(self) -> dict[str, list[float]]:
        """The measured starts in seconds, by tier, for the store."""
        return {tier: list(seen) for tier, seen in self._took_s.items()}

    def restore(self, values: Mapping[str, Sequence[float]]) -> None:
        """Restore the starts that were stored before a restart of the controller."""
        for tier, seen in values.items():
            self._took_s[tier] = deque(seen, maxlen=MAX_STARTS)
