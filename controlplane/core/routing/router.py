"""Which endpoint a request goes to (filter, score, pick), and why each other endpoint was left out.

:func:`controlplane.core.routing.tier_table.resolve` determines which tiers may serve a request,
:func:`choose_endpoint` chooses the endpoint. A request that waits in the queue keeps its route, and its
endpoint is chosen when a slot becomes free. :func:`explain` uses the same code to show for every endpoint why
it was left out or how it scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.domain.request import Priority
from controlplane.core.routing.endpoint_table import EndpointLoad, EndpointTable, TierPool
from controlplane.core.routing.scorers import better_of_two, home, scores, total
from controlplane.core.routing.tier_table import (
    API_BITS,
    INPUT_BITS,
    Api,
    Route,
    RouteRefusal,
    RouteRequest,
    TierTable,
    resolve,
)


class RouteOutcome(StrEnum):
    """What to do with a request."""

    SEND = "send"
    QUEUE = "queue"
    REJECT = "reject"


class Overflow(StrEnum):
    """Why a request goes to another tier than the one it asked for."""

    SPILL = "spill"
    """The tier it asked for is full."""
    BRIDGE = "bridge"
    """The tier it asked for is down."""


_GONE: Final = frozenset({EndpointState.FAILED, EndpointState.STOPPED})
_EMBEDDINGS: Final = API_BITS[Api.EMBEDDINGS]
# Attribute look-ups on an enum class cost more than on a module.
_EMBEDDINGS_API: Final = Api.EMBEDDINGS
_HIGH: Final = Priority.HIGH
_SEND: Final = RouteOutcome.SEND


class RouteDecision(NamedTuple):
    """What to do with a request, and why."""

    outcome: RouteOutcome
    tier: str
    """The tier it goes to, or waits for; empty if it is rejected."""
    reason: str
    """For the header ``x-tier-reason``: plain ASCII."""
    load: EndpointLoad | None = None
    """The endpoint to send it to."""
    tiers: tuple[int, ...] = ()
    """Ranks of all tiers that may serve it under the current load, in order of preference; empty if it goes
    to a tier it asked for."""
    refusal: RouteRefusal | None = None
    message: str = ""
    """For the client, if it is rejected."""
    overflow: Overflow | None = None
    wanted_tier: str = ""
    """The tier it asked for, if ``overflow`` sends it to another one."""


class ExplainedEndpoint(NamedTuple):
    """One endpoint in an explanation."""

    endpoint_id: str
    tier: str
    left_out: tuple[str, ...]
    """Why it was left out; empty if the endpoint can take the request."""
    score: float | None
    scores: dict[str, float]
    home: bool
    """Whether the request's session or prefix belongs to this endpoint."""


class RouteExplanation(NamedTuple):
    """A decision with everything that led to it."""

    decision: RouteDecision
    route: Route
    candidates: tuple[ExplainedEndpoint, ...]


def choose_endpoint(
    route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float, pick: int
) -> RouteDecision:
    """Chooses an endpoint for a request whose tiers are known, or queues or rejects the request. ``pick``,
    the source of randomness, is a non-negative integer that differs from call to call."""
    if route.refusal is not None:
        return RouteDecision(RouteOutcome.REJECT, "", "", refusal=route.refusal, message=route.message)
    if request.api is _EMBEDDINGS_API:
        route = _for_embeddings(route, endpoint_table)
    pools = endpoint_table.pools
    for rank, reason in zip(route.order, route.reasons, strict=True):
        fit = _fit(pools[rank], request, endpoint_table, now_s)
        if fit:
            key = request.session_key if request.session_key is not None else request.prefix_key
            load = better_of_two(fit, now_s, endpoint_table.settings, pick, key)
            return RouteDecision(_SEND, pools[rank].name, reason, load)
    return _overflow_or_wait(route, request, endpoint_table, now_s, pick)


def has_room(route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float) -> bool:
    """Whether :func:`choose_endpoint` would find an endpoint now."""
    pools = endpoint_table.pools
    if request.api is Api.EMBEDDINGS:
        route = _for_embeddings(route, endpoint_table)
    if any(_fit(pools[rank], request, endpoint_table, now_s) for rank in route.order):
        return True
    others = route.bridge if _down(route, request, endpoint_table, now_s) else route.spill
    if any(_fit(pools[rank], request, endpoint_table, now_s) for rank in others):
        return True
    return bool(_held_fit(route, request, endpoint_table, now_s)[1])


def _reserved(pool: TierPool, request: RouteRequest, endpoint_table: EndpointTable, now_s: float) -> bool:
    """Whether the tier's last free slots are reserved for more important requests."""
    return (
        pool.in_flight >= pool.open_limit and request.priority is not _HIGH and endpoint_table.reserves(now_s)
    )


def _fit(
    pool: TierPool, request: RouteRequest, endpoint_table: EndpointTable, now_s: float
) -> list[EndpointLoad]:
    """The filters: the endpoints of a tier that can take the request now. :func:`_left_out` gives the same
    result as reasons; a test makes sure that the two agree."""
    if pool.in_flight >= pool.open_limit and (
        pool.in_flight >= pool.limit or _reserved(pool, request, endpoint_table, now_s)
    ):
        return []
    needs = API_BITS[request.api] | request.inputs
    exclude = request.exclude
    return [
        load
        for load in pool.loads
        if load.in_flight < load.limit
        and load.ready
        and load.api_bits & needs == needs
        and now_s >= load.breaker.blocked_until_s
        and now_s >= load.held_until_s
        and load.key not in exclude
    ]


def _held_fit(
    route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float
) -> tuple[int, list[EndpointLoad]]:
    """The first requested tier, by rank, with endpoints that could take the request if they had not asked for
    a pause, and these endpoints. Empty while any other endpoint of the requested tiers is usable: then the
    request waits for that one."""
    needs = API_BITS[request.api] | request.inputs
    found: tuple[int, list[EndpointLoad]] = (0, [])
    for rank in route.order:
        pool = endpoint_table.pools[rank]
        usable = [
            load
            for load in pool.loads
            if load.ready
            and load.api_bits & needs == needs
            and now_s >= load.breaker.blocked_until_s
            and load.key not in request.exclude
        ]
        if any(now_s >= load.held_until_s for load in usable):
            return 0, []
        if found[1] or pool.in_flight >= pool.limit or _reserved(pool, request, endpoint_table, now_s):
            continue
        found = rank, [load for load in usable if load.in_flight < load.limit]
    return found


def _lacks(bits: int, request: RouteRequest) -> str:
    """What an engine with these bits can't do for the request: ``does not serve responses``, ``does not take
    images``. Empty if it lacks nothing."""
    if not bits & API_BITS[request.api]:
        return f"does not serve {request.api}"
    lacking = request.inputs & ~bits
    names = ", ".join(each for each, bit in INPUT_BITS.items() if bit & lacking)
    return f"does not take {names}" if names else ""


def _left_out(
    load: EndpointLoad,
    request: RouteRequest,
    endpoint_table: EndpointTable,
    now_s: float,
    *,
    chosen: bool = False,
) -> Iterator[str]:
    if not load.ready:
        phase = f" ({load.endpoint.phase})" if load.endpoint.phase else ""
        yield f"{load.endpoint.state}{phase}"
    if lacks := _lacks(load.api_bits, request):
        yield lacks
    if now_s < load.breaker.blocked_until_s:
        yield f"breaker {load.breaker.state} for {load.breaker.blocked_until_s - now_s:.1f} s"
    if now_s < load.held_until_s and not chosen:
        yield f"it asked for no requests for {load.held_until_s - now_s:.1f} s more"
    if load.key in request.exclude:
        yield "already tried for this request"
    pool = load.pool
    if load.in_flight >= load.limit:
        yield f"at its limit: {load.in_flight} of {load.limit} in flight"
    elif pool is not None and _reserved(pool, request, endpoint_table, now_s):
        yield f"its last {pool.limit - pool.open_limit} slots are reserved for high priority"


def _down(route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float) -> bool:
    """Whether no endpoint of the requested tiers could serve the request even if a slot were free."""
    needs = API_BITS[request.api] | request.inputs
    for rank in route.order:
        for load in endpoint_table.pools[rank].loads:
            if (
                load.ready
                and load.api_bits & needs == needs
                and now_s >= load.breaker.blocked_until_s
                and load.key not in request.exclude
            ):
                return False
    return True


def _for_embeddings(route: Route, endpoint_table: EndpointTable) -> Route:
    """The route of a request for embeddings, which never spills or bridges: vectors of two models can't be
    compared. ``auto`` means a tier that is configured to serve embeddings, whatever the load: the tier that
    the request's hints name, or else the cheapest one."""
    order, reasons = route.order, route.reasons
    if route.auto:
        pools = endpoint_table.pools
        ranked = [*order, *(rank for rank in range(len(pools)) if rank >= route.floor)]
        if route.allowed is not None:
            ranked = [rank for rank in ranked if rank in route.allowed]
        serving = next((rank for rank in ranked if pools[rank].api_bits & _EMBEDDINGS), None)
        if serving is not None and serving != order[0]:
            order, reasons = (serving,), ("serves embeddings",)
    return route._replace(order=order, reasons=reasons, spill=(), bridge=())


def _overflow_or_wait(
    route: Route, request: RouteRequest, endpoint_table: EndpointTable, now_s: float, pick: int
) -> RouteDecision:
    """The decision when no requested tier has room: spill, bridge, queue or reject."""
    pools = endpoint_table.pools
    needs = API_BITS[request.api] | request.inputs
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
            reason = f"bridge: {wanted.name} {_condition(wanted, request, needs)}"
        else:
            reason = f"spill: {wanted.name} -> {chosen.name}"
        return RouteDecision(
            _SEND,
            chosen.name,
            f"{route.reasons[0]}; {reason}",
            load,
            tiers=tiers,
            overflow=Overflow.BRIDGE if down else Overflow.SPILL,
            wanted_tier=wanted.name,
        )
    rank, best = _held_fit(route, request, endpoint_table, now_s)
    if best:
        load = min(best, key=lambda held: held.held_until_s)
        reason = route.reasons[route.order.index(rank)]
        return RouteDecision(_SEND, pools[rank].name, f"{reason}; {pools[rank].name} busy", load)
    refusal = _refusal(
        [pools[rank] for rank in route.order], [pools[rank] for rank in others], request, needs
    )
    if refusal is not None:
        kind, message = refusal
        return RouteDecision(
            RouteOutcome.REJECT, "", route.reasons[0], tiers=tiers, refusal=kind, message=message
        )
    state = _condition(wanted, request, needs) if down else "full"
    return RouteDecision(
        RouteOutcome.QUEUE, wanted.name, f"{route.reasons[0]}; {wanted.name} {state}", tiers=tiers
    )


def _condition(pool: TierPool, request: RouteRequest, needs: int) -> str:
    """In one to three words, why none of the tier's endpoints can be used."""
    if not pool.loads:
        return "has no endpoint"
    serving = [load for load in pool.loads if load.api_bits & needs == needs]
    if not serving:
        return _lacks(pool.api_bits, request) or f"does not serve {request.api}"
    fresh = [load for load in serving if load.key not in request.exclude]
    if not fresh:
        return "tried"
    if any(load.ready for load in fresh):
        return "fails"
    states = [load.endpoint.state for load in fresh]
    order = (EndpointState.RESTARTING, EndpointState.STARTING, EndpointState.DRAINING, EndpointState.FAILED)
    return next((str(state) for state in order if state in states), str(states[0]))


def _refusal(
    wanted: list[TierPool], others: list[TierPool], request: RouteRequest, needs: int
) -> tuple[RouteRefusal, str] | None:
    """Why waiting for these tiers would not help, and the message for the client; None if it may help."""
    pools = wanted + others
    names = ", ".join(pool.name for pool in pools)
    if all(pool.api_bits and pool.api_bits & needs != needs for pool in pools):
        verb, _, what = _lacks(pools[0].api_bits, request).removeprefix("does not ").partition(" ")
        return RouteRefusal.NO_CAPABILITY, f"no engine of {names} {verb}s {what}"
    if any(not pool.loads for pool in wanted):
        return None  # The tier may be starting its first endpoint.
    serving = [load for pool in pools for load in pool.loads if load.api_bits & needs == needs]
    living = [load for load in serving if load.endpoint.state not in _GONE]
    if not living:
        diagnosis = next((load.endpoint.diagnosis for load in serving if load.endpoint.diagnosis), "")
        return RouteRefusal.FAILED, f"all endpoints of {names} failed{': ' + diagnosis if diagnosis else ''}"
    # A process that was tried and is being replaced comes back under another key.
    if all(load.ready and load.key in request.exclude for load in living):
        return RouteRefusal.EXHAUSTED, f"every endpoint of {names} was tried"
    return None


def explain(
    request: RouteRequest, endpoint_table: EndpointTable, now_s: float, pick: int
) -> RouteExplanation:
    """The decision for a request, and for every endpoint why it was left out or how it scored."""
    tier_table = endpoint_table.tier_table
    route = resolve(request, tier_table)
    decision = choose_endpoint(route, request, endpoint_table, now_s, pick)
    if request.api is Api.EMBEDDINGS and route.refusal is None:
        route = _for_embeddings(route, endpoint_table)
    key = request.session_key if request.session_key is not None else request.prefix_key
    candidates: list[ExplainedEndpoint] = []
    for pool in endpoint_table.pools:
        fit = _fit(pool, request, endpoint_table, now_s)
        homed = fit[home(fit, key)] if fit and key is not None else None
        tier_reason = _tier_left_out(pool.rank, route, decision, tier_table)
        for load in pool.loads:
            chosen = load is decision.load  # despite the pause that it asked for, if no other is left
            reasons = _left_out(load, request, endpoint_table, now_s, chosen=chosen)
            left_out = tuple(reason for reason in (tier_reason, *reasons) if reason)
            at_home = load is homed
            candidates.append(
                ExplainedEndpoint(
                    load.endpoint.endpoint_id,
                    pool.name,
                    left_out,
                    None if left_out else total(load, now_s, endpoint_table.settings, at_home),
                    {} if left_out else scores(load, now_s, endpoint_table.settings, at_home),
                    at_home,
                )
            )
    return RouteExplanation(decision, route, tuple(candidates))


def _tier_left_out(rank: int, route: Route, decision: RouteDecision, tier_table: TierTable) -> str:
    """Why a tier is not open to this request; empty if it is."""
    name = tier_table.policies[rank].name
    if route.refusal is not None:
        return route.message
    if rank in route.order:
        return ""
    if route.allowed is not None and rank not in route.allowed:
        return f"tier '{name}' is not allowed by the key"
    wanted = tier_table.policies[route.order[0]].name
    if rank in route.spill or rank in route.bridge:
        if not decision.tiers:
            return f"not needed: {decision.tier} has room"
        if rank in decision.tiers:
            return ""
        if rank in route.spill:
            return f"tier '{name}' only takes what {wanted} has no room for, and {wanted} is down"
        return f"tier '{name}' only bridges {wanted}, which is not down"
    if rank < max(route.floor, tier_table.own_floor[route.order[0]]):
        return f"tier '{name}' is below the quality floor"
    if not route.spill and not route.bridge:
        return f"tier '{name}' is not asked for and '{wanted}' does not spill to it"
    return f"tier '{name}' is not allowed by {wanted}.spill"
