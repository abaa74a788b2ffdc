"""How long replicas take to start here, by the last ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from controlplane.core.domain.endpoint import Endpoint, EndpointState

STARTS_KEPT: Final = 8
PLACING_S: Final = 3.0
"""From an order to the start of an engine: Serve's and Ray's share of a cold start."""


class ColdStarts:
    """By tier."""

    def __init__(self) -> None:
        self._took_s: dict[str, deque[float]] = {}
        self._known: set[tuple[str, int]] = set()
        """Endpoints and their engine processes that were seen ready."""

    def learn(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Look at all endpoints, by id. An engine process counts once, and one that replaced another in its
        place not at all: what it needed was there."""
        for endpoint in endpoints.values():
            key = endpoint.endpoint_id, endpoint.generation
            if endpoint.state is not EndpointState.READY or key in self._known:
                continue
            self._known.add(key)
            took_s = endpoint.since_unix_s - endpoint.started_unix_s
            if endpoint.generation == 1 and endpoint.started_unix_s > 0 and took_s > 0:
                self._took_s.setdefault(endpoint.tier, deque(maxlen=STARTS_KEPT)).append(took_s)
        self._known = {key for key in self._known if key[0] in endpoints}

    def longest_s(self, tier: str) -> float | None:
        """From an order to an answer, the longest of the last starts; None: none was seen."""
        seen = self._took_s.get(tier)
        return max(seen) + PLACING_S if seen else None

    def values(self) -> dict[str, list[float]]:
        """By tier, as JSON values, for the store."""
        return {tier: list(seen) for tier, seen in self._took_s.items()}

    def restore(self, values: Mapping[str, Sequence[float]]) -> None:
        """What was stored before."""
        for tier, seen in values.items():
            self._took_s[tier] = deque(seen, maxlen=STARTS_KEPT)
