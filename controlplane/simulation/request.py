"""A request between its arrival and its end."""

from __future__ import annotations

from controlplane.core.routing.endpoint_table import RequestSlot
from controlplane.core.routing.tier_table import Route, RouteRequest
from controlplane.simulation.trace_rows import Arrival


class RequestInFlight:
    """A request that waits or runs."""

    __slots__ = (
        *("arrival", "arrived_s", "attempts", "first_token_s", "generated_tokens", "rank", "route"),
        *("route_request", "slot", "started_s"),
    )

    def __init__(self, arrival: Arrival, route_request: RouteRequest, route: Route, now_s: float) -> None:
        self.arrival = arrival
        self.route_request = route_request
        self.route = route
        self.rank = route.order[0] if route.order else 0
        """Rank of the tier for which the request counts."""
        self.arrived_s = now_s
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.attempts = 0
        self.generated_tokens = 0
        """Tokens that the client got from earlier attempts."""
        self.slot: RequestSlot | None = None
