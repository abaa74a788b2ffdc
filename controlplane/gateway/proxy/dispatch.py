"""Finds a slot at an endpoint for each request.

:class:`controlplane.core.routing.dispatcher.Dispatcher` makes the decisions. This module waits for queued
requests with futures, turns refusals into HTTP errors, and counts both.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

from controlplane.core.admission.queue import Rejected, RejectReason, Ticket, TicketState
from controlplane.core.routing.dispatcher import Dispatcher, DispatchRefused, Started, WaitsInQueue
from controlplane.core.routing.retry import AttemptFailure, GiveUp
from controlplane.core.routing.router import RouteDecision
from controlplane.core.routing.tier_table import Route, RouteRefusal, RouteRequest, resolve, resume_route
from controlplane.errors import (
    BadRequest,
    DeadlineExceeded,
    EndpointLost,
    EngineFailed,
    Forbidden,
    GatewayExhausted,
    NoEndpoint,
    RequestError,
    TooManyRequests,
    UnknownModel,
)
from controlplane.gateway.proxy.upstream import UpstreamFailure
from controlplane.gateway.request_context import RequestContext
from controlplane.gateway.request_inputs import first_part, inputs_of
from controlplane.gateway.telemetry.metrics import Metrics

RETRY_AFTER_S: Final = 5.0
"""``Retry-After`` if it is unknown when an endpoint will be ready."""


_EXHAUSTED: Final = RouteRefusal.EXHAUSTED


class NothingLeft(NoEndpoint):
    """Every endpoint that could serve the request was tried."""


class RequestDispatch:
    """Gives the requests of one gateway replica their slots."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics, *, queue_timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._traffic = metrics.traffic
        self._queue_timeout_s = queue_timeout_s
        self._waiting: dict[Ticket, asyncio.Future[Started]] = {}
        self._picks = 0

    def route(self, context: RequestContext) -> Route:
        """The tiers that may serve a new request. Counts its arrival at the first of them."""
        table = self._dispatcher.endpoint_table
        if not table.takes_all and (inputs := inputs_of(context.body)):
            context.request = context.request._replace(inputs=inputs)
        route = context.route = resolve(context.request, table.tier_table)
        if self._traffic is not None and route.order:
            rank = route.order[0]
            self._traffic.arrived(rank, asleep=not table.pools[rank].loads)
        return route

    async def start(self, context: RequestContext, route: Route) -> Started:
        """A slot for the request's next attempt. Waits in the queue if no slot is free. Raises
        :class:`RequestError` if the request is refused."""
        result = self._submit(context, route)
        if not isinstance(result, Started):
            result = await self._not_at_once(context, route, result)
        context.decision = decision = result.decision
        if decision.overflow is not None:
            self._metrics.spills.labels(decision.wanted_tier, decision.tier, decision.overflow).inc()
        return result

    async def _not_at_once(
        self, context: RequestContext, route: Route, result: Started | WaitsInQueue | DispatchRefused
    ) -> Started:
        if isinstance(result, DispatchRefused) and context.losses and result.decision.refusal is _EXHAUSTED:
            # Every endpoint was tried, but some engines were lost meanwhile: they restart, so wait for them.
            context.tried = frozenset()
            result = self._submit(context, route)
        if isinstance(result, DispatchRefused) and context.attempts and result.decision.refusal is _EXHAUSTED:
            raise NothingLeft(result.decision.message)  # the decision for the last attempt stays
        context.decision = result.decision
        if isinstance(result, WaitsInQueue):
            return await self._wait(context, result)
        if isinstance(result, DispatchRefused):
            if result.rejected is not None:
                raise self._rejection_error(result.rejected)
            raise self._refusal(context, route, result.decision)
        return result

    def resume_route(self, tier: str, request: RouteRequest) -> Route:
        """The tiers that can resume a stream which ``tier`` began."""
        table = self._dispatcher.endpoint_table.tier_table
        return resume_route(table, table.rank_of[tier], request.access)

    def start_hedge(self, context: RequestContext, route: Route) -> Started | None:
        """A slot for a second attempt beside the first; None if none is free, because a hedge is not worth
        waiting for."""
        request = context.request._replace(exclude=context.tried)
        return self._dispatcher.start_at_once(request, route, monotonic(), self._pick())

    def pump(self) -> None:
        """Start the queued requests that can run. Call this when a slot was released."""
        if not self._dispatcher.queue:
            return
        now_s = monotonic()
        abandoned = True
        while abandoned:
            abandoned = False
            for started in self._dispatcher.pump(now_s, self._pick()):
                assert started.ticket is not None
                waiting = self._waiting[started.ticket]
                if waiting.done():  # its client left during this turn of the event loop
                    started.slot.abandon(now_s)
                    abandoned = True
                else:
                    waiting.set_result(started)

    def tick(self, now_s: float) -> None:
        """Fail the queued requests that waited too long, and start those that can run. Call this several
        times a second."""
        queue = self._dispatcher.queue
        if not queue:
            return
        for ticket in queue.expire(now_s):
            waited_s = now_s - ticket.arrived_s
            reason = f"no engine was free in {waited_s:.1f} s, until the request's deadline"
            self._fail(ticket, DeadlineExceeded(reason))
        self.pump()

    def on_snapshot(self) -> None:
        """Refuse queued requests that no endpoint can serve any more, and start those that can run now. Call
        this when the endpoints changed."""
        if not self._dispatcher.queue:
            return
        for ticket, decision in self._dispatcher.remove_unservable(monotonic(), self._pick()):
            self._fail(ticket, _refusal_error(decision))
        self.pump()

    def _pick(self) -> int:
        self._picks += 1
        return self._picks * 7919  # any integers that are evenly spread modulo small numbers

    def _submit(self, context: RequestContext, route: Route) -> Started | WaitsInQueue | DispatchRefused:
        now_s = monotonic()
        request = context.request._replace(exclude=context.tried) if context.tried else context.request
        return self._dispatcher.submit(
            request,
            route,
            now_s,
            self._pick(),
            deadline_s=min(context.deadline_s, now_s + self._queue_timeout_s),
            caller=context.caller,
            arrived_s=context.arrived_s,
        )

    async def _wait(self, context: RequestContext, waits: WaitsInQueue) -> Started:
        since_s = monotonic()
        evicted = waits.queued.evicted
        if evicted is not None:
            self._metrics.shed.labels(TicketState.EVICTED).inc()
            reason = "the queue is full and requests of higher priority came"
            self._fail(evicted, TooManyRequests(reason, retry_after_s=waits.queued.retry_after_s))
        ticket = waits.ticket
        waiting: asyncio.Future[Started] = self._loop.create_future()
        self._waiting[ticket] = waiting
        try:
            return await waiting
        except asyncio.CancelledError:
            if not self._dispatcher.queue.leave(ticket) and _has_result(waiting):
                waiting.result().slot.abandon(monotonic())
                self.pump()
            raise
        finally:
            context.queued_s += monotonic() - since_s
            del self._waiting[ticket]
            self._metrics.queue_wait_s.labels(context.request.priority).observe(monotonic() - since_s)

    def _fail(self, ticket: Ticket, error: RequestError) -> None:
        waiting = self._waiting[ticket]
        if not waiting.done():
            waiting.set_exception(error)

    def _refusal(self, context: RequestContext, route: Route, decision: RouteDecision) -> RequestError:
        """The error for a request that routing refuses; it names the part that no engine takes."""
        error = _refusal_error(decision)
        inputs = context.request.inputs
        if decision.refusal is RouteRefusal.NO_CAPABILITY and inputs:
            pools = self._dispatcher.endpoint_table.pools
            lacking = inputs
            for rank in route.order:
                lacking &= ~pools[rank].api_bits
            param = first_part(context.body, lacking or inputs)
            if param is not None:
                return BadRequest(f"{error.message}: see {param}", param=param)
        return error

    def _rejection_error(self, rejected: Rejected) -> RequestError:
        self._metrics.shed.labels(rejected.reason).inc()
        if rejected.reason is RejectReason.TOO_LATE:
            return DeadlineExceeded("the request's deadline has passed")
        if rejected.reason is RejectReason.WOULD_MISS_DEADLINE:
            wait = f"{rejected.wait_s:.1f} s" if rejected.wait_s is not None else "longer"
            reason = f"it would wait about {wait} for an engine, which its deadline does not allow"
        else:
            reason = "the queue is full (gateway.queue.capacity)"
        return TooManyRequests(reason, retry_after_s=rejected.retry_after_s)


def give_up_error(step: GiveUp, failure: UpstreamFailure) -> RequestError:
    """The error of a request whose failed attempt is not retried. ``Retry-After`` is the engine's own, if it
    gave one."""
    text = f"{step.reason}: {failure.detail}" if failure.detail else step.reason
    retry_after_s = RETRY_AFTER_S if failure.retry_after_s is None else failure.retry_after_s
    if step.status == 408:
        return DeadlineExceeded(text)
    if step.code == GatewayExhausted.code:
        remedy = "raise its limit of open files, or add gateway replicas"
        return GatewayExhausted(
            f"the gateway can't open another connection: {failure.detail} ({remedy})", retry_after_s=1.0
        )
    if step.status == 429:
        return TooManyRequests(text, retry_after_s=retry_after_s)
    if step.status == 503:
        return NoEndpoint(text, retry_after_s=retry_after_s)
    if step.code == EndpointLost.code:
        return EndpointLost(text)
    return EngineFailed(
        text,
        status=step.status,
        code=step.code,
        retry_after_s=retry_after_s if failure.kind is AttemptFailure.UNAVAILABLE else failure.retry_after_s,
    )


def _refusal_error(decision: RouteDecision) -> RequestError:
    message = decision.message or str(decision.refusal)
    if decision.refusal is RouteRefusal.UNKNOWN_MODEL:
        return UnknownModel(message, param="model")
    if decision.refusal is RouteRefusal.NOT_ALLOWED:
        return Forbidden(message, param="model", code="tier_not_allowed")
    if decision.refusal in {RouteRefusal.UNKNOWN_TIER, RouteRefusal.BELOW_FLOOR, RouteRefusal.NO_CAPABILITY}:
        return BadRequest(message)
    return NoEndpoint(message, retry_after_s=RETRY_AFTER_S)


def _has_result(future: asyncio.Future[Started]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
