"""One request between its arrival and its end."""

from __future__ import annotations

from controlplane.core.routing.endpoint_table import RequestSlot
from controlplane.core.routing.tier_table import Route, RouteRequest
from controlplane.simulation.traces import Arrival


class RequestInFlight:
    """One request on its way."""

    __slots__ = (
        *("arrival", "arrived_s", "attempts", "first_s", "slot", "made", "rank", "request", "route"),
        "started_s",
    )

    def __init__(self, arrival: Arrival, request: RouteRequest, route: Route, now_s: float) -> None:
        self.arrival = arrival
        self.request = request
        self.route = route
        self.rank = route.order[0] if route.order else 0
        self.arrived_s = now_s
        self.started_s: float | None = None
        self.first_s: float | None = None
        self.attempts = 0
        self.made = 0
        self.slot: RequestSlot | None = None
