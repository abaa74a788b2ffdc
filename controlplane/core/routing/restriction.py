"""Restricts a route to the tiers that the request's principal may use."""

from __future__ import annotations

from controlplane.core.routing.tier_table import Route, RouteRefusal, TierAccess, TierTable


def allowed_ranks(access: TierAccess, table: TierTable) -> frozenset[int]:
    """The ranks of the tiers that may be used."""
    tiers, models = access
    return frozenset(
        rank
        for rank, policy in enumerate(table.policies)
        if (tiers is None or policy.name in tiers)
        and (models is None or not models.isdisjoint((policy.name, policy.model_id, policy.model_name)))
    )


def restricted(route: Route, access: TierAccess, table: TierTable) -> Route:
    """``route`` without the tiers that may not be used. A request for ``auto`` goes to the nearest tier that
    may be, the more capable first; any other request is refused if nothing is left."""
    if route.refusal is not None:
        return route
    allowed = allowed_ranks(access, table)
    order = tuple(rank for rank in route.order if rank in allowed)
    if order:
        reasons = dict(zip(route.order, route.reasons, strict=True))
        return route._replace(
            order=order,
            reasons=tuple(reasons[rank] for rank in order),
            spill=tuple(rank for rank in route.spill if rank in allowed),
            bridge=tuple(rank for rank in route.bridge if rank in allowed),
            allowed=allowed,
        )
    names = [table.policies[rank].name for rank in sorted(allowed)]
    if route.auto:
        wanted = route.order[0]
        usable = [rank for rank in allowed if rank >= route.floor]
        if usable:
            rank = min(usable, key=lambda rank: (rank < wanted, abs(rank - wanted)))
            spill, bridge = table.neighbours[rank][route.floor]
            nearest = route._replace(
                order=(rank,),
                reasons=(f"{route.reasons[0]}, allowed by the key",),
                spill=spill,
                bridge=bridge,
            )
            return restricted(nearest, access, table)
    there = f"it may use {', '.join(names)}" if names else "none of its tiers or models is here"
    asked = ", ".join(table.policies[rank].name for rank in route.order)
    return Route((), (), refusal=RouteRefusal.NOT_ALLOWED, message=f"this key may not use {asked}: {there}")
