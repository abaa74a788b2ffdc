"""Where a request goes: filters → scorers → picker, and a reason for all that was left out.

:func:`decide` is :func:`controlplane.core.routing.tier_table.resolve` (which tiers?) and then :func:`place`
(which endpoint?). A request that waits keeps its route and is placed again when a slot frees. :func:`explain`
says of every endpoint why it was left out, or how it scored; it decides with the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.domain.request import Complexity, Priority
from controlplane.core.routing.endpoint_table import EndpointLoad, EndpointTable, TierPool
from controlplane.core.routing.scorers import better_of_two, home, scores, total
from controlplane.core.routing.tier_table import (
    API_BITS,
    Api,
    Route,
    RouteRefusal,
    RouteRequest,
    TierTable,
    resolve,
)

_GONE: Final = frozenset({EndpointState.FAILED, EndpointState.STOPPED})
_EMBEDDINGS: Final = API_BITS[Api.EMBEDDINGS]
# Attribute look-ups on an enum class cost more than on a module.
_HIGH: Final = Priority.HIGH


class RouteOutcome(StrEnum):
    """What to do with a request."""

    SEND = "send"
    QUEUE = "queue"
    REJECT = "reject"


class RouteDecision(NamedTuple):
    """What to do with a request, and why."""

    outcome: RouteOutcome
    tier: str
    """The tier it goes to; for ``queue`` the one it waits for; empty if rejected."""
    reason: str
    """For ``x-tier-reason``: plain ASCII."""
    load: EndpointLoad | None = None
    """Where to send it."""
    tiers: tuple[int, ...] = ()
    """The ranks of all tiers that may serve it as things are, in order of preference; empty if it goes
    to a tier that was asked for."""
    refusal: RouteRefusal | None = None
    message: str = ""
    """For the client, if rejected."""
    spilled: bool = False
    bridged: bool = False


class ExplainedEndpoint(NamedTuple):
    """One endpoint in an explanation."""

    endpoint_id: str
    tier: str
    left_out: tuple[str, ...]
    """Why; empty if it was fit."""
    score: float | None
    scores: dict[str, float]
    home: bool
    """The session or prefix belongs to it."""


class RouteExplanation(NamedTuple):
    """A decision with everything that led to it."""

    decision: RouteDecision
    route: Route
    candidates: tuple[ExplainedEndpoint, ...]


def decide(
    request: RouteRequest,
    table: TierTable,
    endpoint_table: EndpointTable,
    now_s: float,
    pick: int,
    *,
    score: Callable[[], Complexity | None] | None = None,
) -> RouteDecision:
    """Resolves and places in one go; ``pick`` is any integer from 0, another one for each call."""
    return place(resolve(request, table, score), request, endpoint_table, now_s, pick)


def place(
    route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float, pick: int
) -> RouteDecision:
    """The endpoint for a request whose tiers are known, or that it has to wait, or that it can't be."""
    if route.refusal is not None:
        return RouteDecision(RouteOutcome.REJECT, "", "", refusal=route.refusal, message=route.message)
    needs = API_BITS[request.api]
    if needs == _EMBEDDINGS:
        route = _for_embeddings(route, endpoint_table)
    pools = endpoint_table.pools
    for rank, reason in zip(route.order, route.reasons, strict=True):
        fit = _fit(pools[rank], request, endpoint_table, now_s)
        if fit:
            key = request.session_key if request.session_key is not None else request.prefix_key
            load = better_of_two(fit, now_s, endpoint_table.settings, pick, key)
            return RouteDecision(RouteOutcome.SEND, pools[rank].name, reason, load)
    return _elsewhere(route, request, endpoint_table, now_s, pick)


def has_room(route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float) -> bool:
    """Would :func:`place` send it now?"""
    pools = endpoint_table.pools
    if request.api is Api.EMBEDDINGS:
        route = _for_embeddings(route, endpoint_table)
    if any(_fit(pools[rank], request, endpoint_table, now_s) for rank in route.order):
        return True
    others = route.bridge if _down(route, request, endpoint_table, now_s) else route.spill
    return any(_fit(pools[rank], request, endpoint_table, now_s) for rank in others)


def _kept(pool: TierPool, request: RouteRequest, endpoint_table: EndpointTable, now_s: float) -> bool:
    """Are its last free slots kept for more important requests?"""
    return (
        pool.in_flight >= pool.open_limit and request.priority is not _HIGH and endpoint_table.reserves(now_s)
    )


def _fit(
    pool: TierPool, request: RouteRequest, endpoint_table: EndpointTable, now_s: float
) -> list[EndpointLoad]:
    """The filters. :func:`_left_out` says the same in words; a test holds the two together."""
    if pool.in_flight >= pool.open_limit and (
        pool.in_flight >= pool.limit or _kept(pool, request, endpoint_table, now_s)
    ):
        return []
    needs = API_BITS[request.api]
    exclude = request.exclude
    return [
        load
        for load in pool.loads
        if load.in_flight < load.limit
        and load.ready
        and load.api_bits & needs
        and now_s >= load.breaker.blocked_until_s
        and load.key not in exclude
    ]


def _left_out(
    load: EndpointLoad, request: RouteRequest, endpoint_table: EndpointTable, now_s: float
) -> Iterator[str]:
    if not load.ready:
        phase = f" ({load.endpoint.phase})" if load.endpoint.phase else ""
        yield f"{load.endpoint.state}{phase}"
    if not load.api_bits & API_BITS[request.api]:
        yield f"does not serve {request.api}"
    if now_s < load.breaker.blocked_until_s:
        yield f"breaker {load.breaker.state} for {load.breaker.blocked_until_s - now_s:.1f} s"
    if load.key in request.exclude:
        yield "already tried for this request"
    pool = load.pool
    if load.in_flight >= load.limit:
        yield f"at its limit: {load.in_flight} of {load.limit} in flight"
    elif pool is not None and _kept(pool, request, endpoint_table, now_s):
        yield f"its last {pool.limit - pool.open_limit} slots are kept for high priority"


def _down(route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float) -> bool:
    """Is there no endpoint of the tiers asked for that could serve the request once a slot is free?"""
    needs = API_BITS[request.api]
    for rank in route.order:
        for load in endpoint_table.pools[rank].loads:
            if (
                load.ready
                and load.api_bits & needs
                and now_s >= load.breaker.blocked_until_s
                and load.key not in request.exclude
            ):
                return False
    return True


def _for_embeddings(route: Route, endpoint_table: EndpointTable) -> Route:
    """Vectors of two models can't be compared: embeddings never spill or bridge. ``auto`` means the tier
    that serves them, by configuration and not by load: the one hinted at, or else the cheapest."""
    order, reasons = route.order, route.reasons
    if route.auto:
        pools = endpoint_table.pools
        ranked = [*order, *(rank for rank in range(len(pools)) if rank >= route.floor)]
        serving = next((rank for rank in ranked if pools[rank].api_bits & _EMBEDDINGS), None)
        if serving is not None and serving != order[0]:
            order, reasons = (serving,), ("serves embeddings",)
    return route._replace(order=order, reasons=reasons, spill=(), bridge=())


def _elsewhere(
    route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float, pick: int
) -> RouteDecision:
    """No tier that was asked for has room: spill, bridge, queue or reject."""
    pools = endpoint_table.pools
    needs = API_BITS[request.api]
    wanted = pools[route.order[0]]
    down = _down(route, request, endpoint_table, now_s)
    others = route.bridge if down else route.spill
    tiers = route.order + others
    best: list[EndpointLoad] = []
    chosen: TierPool | None = None
    for rank in others:
        pool = pools[rank]
        if chosen is not None and (down or pool.load_ratio >= chosen.load_ratio):
            continue
        fit = _fit(pool, request, endpoint_table, now_s)
        if fit:
            best, chosen = fit, pool
    if chosen is not None:
        key = request.session_key if request.session_key is not None else request.prefix_key
        load = better_of_two(best, now_s, endpoint_table.settings, pick, key)
        if down:
            how = f"bridge: {wanted.name} {_condition(wanted, request, needs, now_s)}"
        else:
            how = f"spill: {wanted.name} -> {chosen.name}"
        return RouteDecision(
            RouteOutcome.SEND,
            chosen.name,
            f"{route.reasons[0]}; {how}",
            load,
            tiers,
            spilled=not down,
            bridged=down,
        )
    refusal = _hopeless(
        [pools[rank] for rank in route.order], [pools[rank] for rank in others], request, needs
    )
    if refusal is not None:
        return RouteDecision(RouteOutcome.REJECT, "", route.reasons[0], None, tiers, refusal[0], refusal[1])
    state = _condition(wanted, request, needs, now_s) if down else "full"
    return RouteDecision(
        RouteOutcome.QUEUE, wanted.name, f"{route.reasons[0]}; {wanted.name} {state}", tiers=tiers
    )


def _condition(pool: TierPool, request: RouteRequest, needs: int, now_s: float) -> str:
    """In a word why none of its endpoints can be used."""
    if not pool.loads:
        return "has no endpoint"
    serving = [load for load in pool.loads if load.api_bits & needs]
    if not serving:
        return f"does not serve {request.api}"
    fresh = [load for load in serving if load.key not in request.exclude]
    if not fresh:
        return "tried"
    if any(load.ready for load in fresh):
        return "fails"
    states = [load.endpoint.state for load in fresh]
    order = (EndpointState.RESTARTING, EndpointState.STARTING, EndpointState.DRAINING, EndpointState.FAILED)
    return next((str(state) for state in order if state in states), str(states[0]))


def _hopeless(
    asked: list[TierPool], others: list[TierPool], request: RouteRequest, needs: int
) -> tuple[RouteRefusal, str] | None:
    """Why waiting for these tiers makes no sense; None if it does."""
    pools = asked + others
    names = ", ".join(pool.name for pool in pools)
    if all(pool.api_bits and not pool.api_bits & needs for pool in pools):
        return RouteRefusal.NO_CAPABILITY, f"no engine of {names} serves {request.api}"
    if any(not pool.loads for pool in asked):
        return None  # It may be starting its first endpoint.
    serving = [load for pool in pools for load in pool.loads if load.api_bits & needs]
    living = [load for load in serving if load.endpoint.state not in _GONE]
    if not living:
        told = next((load.endpoint.diagnosis for load in serving if load.endpoint.diagnosis), "")
        return RouteRefusal.FAILED, f"all endpoints of {names} failed{': ' + told if told else ''}"
    # A tried process that is being replaced comes back under another key.
    if all(load.ready and load.key in request.exclude for load in living):
        return RouteRefusal.EXHAUSTED, f"every endpoint of {names} was tried"
    return None


def explain(
    request: RouteRequest,
    table: TierTable,
    endpoint_table: EndpointTable,
    now_s: float,
    pick: int,
    *,
    score: Callable[[], Complexity | None] | None = None,
) -> RouteExplanation:
    """What :func:`decide` says, and of every endpoint why it was left out or how it scored."""
    route = resolve(request, table, score)
    decision = place(route, request, endpoint_table, now_s, pick)
    needs = API_BITS[request.api]
    asked = (
        route if needs != _EMBEDDINGS or route.refusal is not None else _for_embeddings(route, endpoint_table)
    )
    key = request.session_key if request.session_key is not None else request.prefix_key
    candidates: list[ExplainedEndpoint] = []
    for pool in endpoint_table.pools:
        fit = _fit(pool, request, endpoint_table, now_s)
        homed = fit[home(fit, key)] if fit and key is not None else None
        barred = _tier_left_out(pool.rank, asked, decision, table)
        for load in pool.loads:
            why = tuple(
                reason for reason in (barred, *_left_out(load, request, endpoint_table, now_s)) if reason
            )
            at_home = load is homed
            candidates.append(
                ExplainedEndpoint(
                    load.endpoint.endpoint_id,
                    pool.name,
                    why,
                    None if why else total(load, now_s, endpoint_table.settings, at_home),
                    {} if why else scores(load, now_s, endpoint_table.settings, at_home),
                    at_home,
                )
            )
    return RouteExplanation(decision, asked, tuple(candidates))


def _tier_left_out(rank: int, route: Route, decision: RouteDecision, table: TierTable) -> str:
    """Why a tier is not for this request; empty if it is."""
    name = table.policies[rank].name
    if route.refusal is not None:
        return route.message
    if rank in route.order:
        return ""
    wanted = table.policies[route.order[0]].name
    if rank in route.spill or rank in route.bridge:
        if not decision.tiers:
            return f"not needed: {decision.tier} has room"
        if rank in decision.tiers:
            return ""
        if rank in route.spill:
            return f"tier '{name}' only takes what {wanted} has no room for, and {wanted} is down"
        return f"tier '{name}' only bridges {wanted}, which is not down"
    if rank < max(route.floor, table.own_floor[route.order[0]]):
        return f"tier '{name}' is below the quality floor"
    if not route.spill and not route.bridge:
        return f"tier '{name}' is not asked for and '{wanted}' does not spill to it"
    return f"tier '{name}' is not allowed by {wanted}.spill"
