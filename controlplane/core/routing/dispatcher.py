"""A request's way through routing and admission, as the gateway and the simulator drive it.

``submit`` starts a request on an endpoint, queues it, or refuses it. ``pump`` starts queued requests:
call it after a slot ended, after a snapshot was applied, and every now and then while something waits
(an open breaker lets its probe through at :meth:`EndpointTable.next_probe_s`). ``expired`` gives back what
ran out of time. Nothing here waits or sends: the caller acts on what is returned.

A request that can run now never overtakes one in the queue: whatever could run there was started by the
``pump`` that followed the slot's release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from controlplane.core.admission.queue import AdmissionQueue, Queued, Rejected, Ticket
from controlplane.core.domain.request import Complexity, Priority
from controlplane.core.routing.endpoint_table import EndpointTable, RequestSlot
from controlplane.core.routing.router import RouteDecision, RouteOutcome, has_room, place
from controlplane.core.routing.tier_table import Api, Route, RouteRequest, TierTable, resolve


class LaneKey(NamedTuple):
    """What two requests must have in common to be served by the same endpoints."""

    order: tuple[int, ...]
    spill: tuple[int, ...]
    bridge: tuple[int, ...]
    api: Api
    exclude: frozenset[str]
    auto: bool
    floor: int


class QueuedRequest(NamedTuple):
    """What a queued request needs to be placed later; the ticket's ``payload``."""

    request: RouteRequest
    route: Route
    payload: Any


class Started(NamedTuple):
    """The request goes to ``decision.load`` now."""

    decision: RouteDecision
    slot: RequestSlot
    ticket: Ticket | None = None
    """What it waited on, if it did; ``ticket.payload.payload`` is the caller's own."""


class WaitsInQueue(NamedTuple):
    """The request waits in the queue."""

    decision: RouteDecision
    ticket: Ticket
    queued: Queued
    """``queued.evicted``, if not None, is another's ticket that had to go."""


class DispatchRefused(NamedTuple):
    """The request can't be served: either routing refuses it (``decision.refusal``) or the queue does."""

    decision: RouteDecision
    rejected: Rejected | None


class Dispatcher:
    """Routing, load and queue of one gateway replica."""

    def __init__(self, table: TierTable, endpoint_table: EndpointTable, queue: AdmissionQueue) -> None:
        self.table = table
        self.endpoint_table = endpoint_table
        self.queue = queue

    def submit(
        self,
        request: RouteRequest,
        now_s: float,
        pick: int,
        *,
        deadline_s: float,
        caller: str = "",
        payload: Any = None,
        cost: float = 1.0,
        arrived_s: float | None = None,
        route: Route | None = None,
        score: Callable[[], Complexity | None] | None = None,
    ) -> Started | WaitsInQueue | DispatchRefused:
        """A new request, or a retry: then with what was tried in ``request.exclude``, its first
        ``arrived_s``, and the ``route`` of before so that it is not scored twice."""
        if route is None:
            route = resolve(request, self.table, score)
        endpoint_table = self.endpoint_table
        if request.priority is Priority.HIGH:
            endpoint_table.high_seen_s = now_s
        decision = place(route, request, endpoint_table, now_s, pick)
        if decision.load is not None and deadline_s > now_s:
            if self.queue:
                self.queue.note_arrival(route.order, request.priority, now_s)
            return Started(decision, decision.load.begin(now_s))
        if decision.outcome is RouteOutcome.REJECT:
            return DispatchRefused(decision, None)
        ticket = Ticket(
            lane=lane_key(route, request),
            tiers=decision.tiers,
            priority=request.priority,
            caller=caller,
            arrived_s=now_s if arrived_s is None else arrived_s,
            deadline_s=deadline_s,
            needs_s=self._first_token_s(decision.tiers),
            cost=cost,
            payload=QueuedRequest(request, route, payload),
        )
        answer = self.queue.offer(
            ticket, now_s, [pool.rate_per_s(request.priority) for pool in self.endpoint_table.pools]
        )
        if isinstance(answer, Rejected):
            return DispatchRefused(decision, answer)
        return WaitsInQueue(decision, ticket, answer)

    def start_now(self, request: RouteRequest, route: Route, now_s: float, pick: int) -> Started | None:
        """A place at once, or None: for a second try beside the first, which must not take anybody's
        place in the queue."""
        load = (decision := place(route, request, self.endpoint_table, now_s, pick)).load
        return None if load is None else Started(decision, load.begin(now_s))

    def pump(self, now_s: float, pick: int) -> list[Started]:
        """Starts what can run of the queue, in the queue's order."""
        started: list[Started] = []
        queue = self.queue
        if not queue:
            return started
        probes: dict[tuple[LaneKey, Priority], tuple[Route, RouteRequest]] = {}

        def can_run(lane: Any, priority: Priority) -> bool:
            known = probes.get((lane, priority))
            if known is None:
                known = probes[lane, priority] = _probe(lane, priority)
            return has_room(*known, self.endpoint_table, now_s)

        while (ticket := queue.next(now_s, can_run)) is not None:
            waiting: QueuedRequest = ticket.payload
            pick += 1
            # The queue has decided that it goes: what is kept for high priority is no longer the question.
            request = waiting.request._replace(priority=Priority.HIGH)
            decision = place(waiting.route, request, self.endpoint_table, now_s, pick)
            assert decision.load is not None
            started.append(Started(decision, decision.load.begin(now_s), ticket))
        return started

    def refused(self, now_s: float, pick: int) -> list[tuple[Ticket, RouteDecision]]:
        """Takes out the queued requests that have become hopeless (all their endpoints failed for good,
        …); to be asked after a snapshot was applied."""
        gone: list[tuple[Ticket, RouteDecision]] = []
        for ticket in self.queue.waiting():
            waiting: QueuedRequest = ticket.payload
            decision = place(waiting.route, waiting.request, self.endpoint_table, now_s, pick)
            if decision.outcome is RouteOutcome.REJECT and self.queue.leave(ticket):
                gone.append((ticket, decision))
        return gone

    def _first_token_s(self, tiers: tuple[int, ...]) -> float:
        """How long the fastest of the tiers usually takes to give a first token; 0 if not known."""
        return min((self.endpoint_table.pools[tier].ttft_s or 0.0 for tier in tiers), default=0.0)


def lane_key(route: Route, request: RouteRequest) -> LaneKey:
    """The request's lane. The order of preference is none of the queue's business."""
    return LaneKey(
        tuple(sorted(route.order)),
        route.spill,
        route.bridge,
        request.api,
        request.exclude,
        route.auto,
        route.floor,
    )


def _probe(lane: LaneKey, priority: Priority) -> tuple[Route, RouteRequest]:
    """A route and a request that stand for all of a lane."""
    route = Route(lane.order, ("",) * len(lane.order), lane.spill, lane.bridge, lane.auto, lane.floor)
    return route, RouteRequest(priority=priority, api=lane.api, exclude=lane.exclude)
