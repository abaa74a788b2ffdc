"""For tests of routing: a decision from a request."""

from __future__ import annotations

from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.core.routing.router import RouteDecision, choose_endpoint
from controlplane.core.routing.tier_table import RouteRequest, resolve


def decide(request: RouteRequest, endpoint_table: EndpointTable, now_s: float, pick: int) -> RouteDecision:
    """The tiers of a request and its endpoint."""
    return choose_endpoint(resolve(request, endpoint_table.tier_table), request, endpoint_table, now_s, pick)
