"""Takes a request through routing and admission, without I/O; used by the gateway and the simulator.

:meth:`Dispatcher.submit` starts a request on an endpoint, queues it, or refuses it. :meth:`Dispatcher.pump`
starts queued requests: call it after a slot was released, after a snapshot was applied, and every fraction of
a second while requests wait (an open circuit breaker lets a probe through once its pause is over). The caller
acts on the results, and expires tickets that waited too long (:meth:`AdmissionQueue.expire`).

A new request never overtakes one in the queue: the ``pump`` that followed the release of a slot has already
started every request that could run on it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from controlplane.core.admission.queue import AdmissionQueue, Queued, Rejected, Ticket
from controlplane.core.domain.request import Priority
from controlplane.core.routing.endpoint_table import EndpointTable, RequestSlot
from controlplane.core.routing.router import RouteDecision, RouteOutcome, choose_endpoint, has_room
from controlplane.core.routing.tier_table import Api, Route, RouteRequest

# Attribute look-ups on an enum class cost more than on a module.
_HIGH = Priority.HIGH
_REJECT = RouteOutcome.REJECT


class LaneKey(NamedTuple):
    """What two requests must have in common to be served by the same endpoints."""

    order: tuple[int, ...]
    spill: tuple[int, ...]
    bridge: tuple[int, ...]
    api: Api
    inputs: int
    exclude: frozenset[str]
    auto: bool
    floor: int
    allowed: frozenset[int] | None


class QueuedRequest(NamedTuple):
    """A ticket's ``payload``: what is needed to start the request later."""

    request: RouteRequest
    route: Route


class Started(NamedTuple):
    """The request goes to ``decision.load`` now."""

    decision: RouteDecision
    slot: RequestSlot
    ticket: Ticket | None = None
    """The ticket with which it waited; None if it did not wait."""


class WaitsInQueue(NamedTuple):
    """The request waits in the queue."""

    decision: RouteDecision
    ticket: Ticket
    queued: Queued
    """``queued.evicted``, if not None, is the ticket of another request that was removed to make room."""


class DispatchRefused(NamedTuple):
    """The request is not served: routing refuses it (``decision.refusal``) or the queue rejects it."""

    decision: RouteDecision
    rejected: Rejected | None


class Dispatcher:
    """Routing, load and queue of one gateway replica."""

    def __init__(self, endpoint_table: EndpointTable, queue: AdmissionQueue) -> None:
        self.endpoint_table = endpoint_table
        self.queue = queue

    def submit(
        self,
        request: RouteRequest,
        route: Route,
        now_s: float,
        pick: int,
        *,
        deadline_s: float,
        caller: str = "",
        arrived_s: float | None = None,
    ) -> Started | WaitsInQueue | DispatchRefused:
        """Starts, queues or refuses a request whose tiers are known (:func:`resolve`).

        A retry passes the endpoints already tried in ``request.exclude``, and the time of its first arrival
        in ``arrived_s``, so that it keeps its age in the queue.
        """
        table = self.endpoint_table
        if request.priority is _HIGH:
            table.high_seen_s = now_s
        decision = choose_endpoint(route, request, table, now_s, pick)
        if decision.load is not None and deadline_s > now_s:
            if self.queue:
                self.queue.note_arrival(route.order, request.priority, now_s)
            return Started(decision, decision.load.begin(now_s))
        if decision.outcome is _REJECT:
            return DispatchRefused(decision, None)
        ticket = Ticket(
            lane_key=lane_key(route, request),
            tiers=decision.tiers,
            priority=request.priority,
            caller=caller,
            arrived_s=now_s if arrived_s is None else arrived_s,
            deadline_s=deadline_s,
            needs_s=self._first_token_s(decision.tiers),
            payload=QueuedRequest(request, route),
        )
        offered = self.queue.offer(ticket, now_s, [pool.rate_per_s(request.priority) for pool in table.pools])
        if isinstance(offered, Rejected):
            return DispatchRefused(decision, offered)
        return WaitsInQueue(decision, ticket, offered)

    def start_at_once(self, request: RouteRequest, route: Route, now_s: float, pick: int) -> Started | None:
        """Starts a request if an endpoint has room, else returns None: for a hedge, which must not take a
        position in the queue from another request."""
        decision = choose_endpoint(route, request, self.endpoint_table, now_s, pick)
        return None if decision.load is None else Started(decision, decision.load.begin(now_s))

    def pump(self, now_s: float, pick: int) -> list[Started]:
        """Starts the queued requests that can run, in the queue's order."""
        started: list[Started] = []
        queue = self.queue
        if not queue:
            return started
        probes: dict[tuple[Hashable, Priority], tuple[Route, RouteRequest]] = {}

        def can_run(lane: Hashable, priority: Priority) -> bool:
            probe = probes.get((lane, priority))
            if probe is None:
                assert isinstance(lane, LaneKey)
                probe = probes[lane, priority] = _probe(lane, priority)
            return has_room(*probe, self.endpoint_table, now_s)

        while (ticket := queue.next(now_s, can_run)) is not None:
            waiting: QueuedRequest = ticket.payload
            pick += 1
            # The queue has decided to serve this ticket, so it may also use reserved slots.
            request = waiting.request._replace(priority=_HIGH)
            decision = choose_endpoint(waiting.route, request, self.endpoint_table, now_s, pick)
            assert decision.load is not None
            started.append(Started(decision, decision.load.begin(now_s), ticket))
        return started

    def remove_unservable(self, now_s: float, pick: int) -> list[tuple[Ticket, RouteDecision]]:
        """Removes the queued requests that no endpoint can serve any more, for example because all their
        endpoints failed for good. Call it after a snapshot was applied."""
        removed: list[tuple[Ticket, RouteDecision]] = []
        for ticket in self.queue.waiting():
            waiting: QueuedRequest = ticket.payload
            decision = choose_endpoint(waiting.route, waiting.request, self.endpoint_table, now_s, pick)
            if decision.outcome is _REJECT and self.queue.leave(ticket):
                removed.append((ticket, decision))
        return removed

    def _first_token_s(self, tiers: tuple[int, ...]) -> float:
        """Usual time to first token of the fastest of the tiers; 0 if unknown."""
        return min((self.endpoint_table.pools[tier].ttft_s or 0.0 for tier in tiers), default=0.0)


def lane_key(route: Route, request: RouteRequest) -> LaneKey:
    """The key of the request's lane, which does not depend on the order of preference."""
    return LaneKey(
        order=tuple(sorted(route.order)),
        spill=route.spill,
        bridge=route.bridge,
        api=request.api,
        inputs=request.inputs,
        exclude=request.exclude,
        auto=route.auto,
        floor=route.floor,
        allowed=route.allowed,
    )


def _probe(lane: LaneKey, priority: Priority) -> tuple[Route, RouteRequest]:
    """A route and a request that represent all requests of a lane."""
    route = Route(
        order=lane.order,
        reasons=("",) * len(lane.order),
        spill=lane.spill,
        bridge=lane.bridge,
        auto=lane.auto,
        floor=lane.floor,
        allowed=lane.allowed,
    )
    return route, RouteRequest(priority=priority, api=lane.api, inputs=lane.inputs, exclude=lane.exclude)
