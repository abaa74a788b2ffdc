"""Waiting for a place: the core's dispatcher with futures, and its refusals as HTTP errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Final

from controlplane.core.admission.queue import Rejected, RejectReason, Ticket
from controlplane.core.domain.request import Complexity
from controlplane.core.routing.dispatcher import Dispatcher, DispatchRefused, Started, WaitsInQueue
from controlplane.core.routing.retry import GiveUp
from controlplane.core.routing.router import RouteDecision
from controlplane.core.routing.tier_table import Route, RouteRefusal, resolve, resume_route
from controlplane.errors import (
    BadRequest,
    DeadlineExceeded,
    EndpointLost,
    EngineFailed,
    NoEndpoint,
    RequestError,
    TooManyRequests,
    UnknownModel,
)
from controlplane.gateway.proxy.request_context import RequestContext
from controlplane.gateway.telemetry.metrics import Metrics

RETRY_AFTER_S: Final = 5.0
"""``Retry-After`` where nothing tells when an endpoint will be there."""

Scorer = Callable[[RequestContext], Complexity | None]
"""What a prompt needs, for ``auto`` without a hint; None: it can't tell."""


class RequestDispatch:
    """Finds places for the calls of one gateway replica."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        queue_timeout_s: float,
        score: Scorer | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._traffic = metrics.traffic
        self._queue_timeout_s = queue_timeout_s
        self._score = score
        self._picks = 0

    async def place(self, context: RequestContext) -> Started:
        """The first place of a context, after waiting for it if need be. Raises :class:`RequestError`."""
        scorer = self._score
        score = None if scorer is None else partial(scorer, context)
        context.route = resolve(context.request, self._dispatcher.table, score)
        if self._traffic is not None and context.route.order:
            rank = context.route.order[0]
            self._traffic.arrived(rank, asleep=not self._dispatcher.endpoint_table.pools[rank].loads)
        return await self._submit(context, context.route)

    async def place_again(self, context: RequestContext) -> Started:
        """Another place, after an attempt failed."""
        return await self._submit(context, context.route)

    async def place_resumed(self, context: RequestContext, tier: str) -> Started:
        """A place for going on with a stream that ``tier`` began: the same model."""
        table = self._dispatcher.table
        return await self._submit(context, resume_route(table, table.rank_of[tier]))

    def place_now(self, context: RequestContext) -> Started | None:
        """A second place at once, or None: for a hedge, which is not worth waiting for."""
        now_s = monotonic()
        request = context.request._replace(exclude=context.tried)
        if context.route is None:
            return None
        return self._dispatcher.start_now(request, context.route, now_s, self._pick())

    def pump(self) -> None:
        """Start what can run of the queue; to be called when a place was given back."""
        if not self._dispatcher.queue:
            return
        now_s = monotonic()
        lost = True
        while lost:
            lost = False
            for started in self._dispatcher.pump(now_s, self._pick()):
                waiting = _future(started.ticket)
                if waiting.done():  # the client left in this very turn of the loop
                    started.slot.abandon(now_s)
                    lost = True
                else:
                    waiting.set_result(started)

    def tick(self, now_s: float) -> None:
        """Expire what waited too long, and start what can run; to be called every now and then."""
        queue = self._dispatcher.queue
        if not queue:
            return
        for ticket in queue.expire(now_s):
            _fail(ticket, DeadlineExceeded(_waited(ticket, now_s)))
        self.pump()

    def recheck(self) -> None:
        """After a snapshot: start what can run now, refuse what can't be served any more."""
        if not self._dispatcher.queue:
            return
        for ticket, decision in self._dispatcher.refused(monotonic(), self._pick()):
            _fail(ticket, _refusal_error(decision))
        self.pump()

    def _pick(self) -> int:
        self._picks += 1
        return self._picks * 7919  # any integers that spread over small moduli

    async def _submit(self, context: RequestContext, route: Route | None, *, forgive: bool = True) -> Started:
        now_s = monotonic()
        request = context.request._replace(exclude=context.tried) if context.tried else context.request
        answer = self._dispatcher.submit(
            request,
            now_s,
            self._pick(),
            deadline_s=min(context.deadline_s, now_s + self._queue_timeout_s),
            caller=context.caller,
            payload=self._loop.create_future(),
            arrived_s=context.arrived_s,
            route=route,
        )
        if isinstance(answer, WaitsInQueue):
            return await self._wait(context, answer, now_s)
        if isinstance(answer, Started):
            context.decision = answer.decision
            self._note(answer.decision)
            return answer
        return await self._refused(context, answer, route, forgive)

    async def _refused(
        self, context: RequestContext, answer: DispatchRefused, route: Route | None, forgive: bool
    ) -> Started:
        if answer.decision.refusal is RouteRefusal.EXHAUSTED and context.losses and forgive:
            # Everything was tried, but engines were lost on the way: they come back, so wait for them.
            context.tried = frozenset()
            return await self._submit(context, route, forgive=False)
        context.decision = answer.decision
        if answer.rejected is not None:
            raise self._rejection_error(answer.rejected)
        raise _refusal_error(answer.decision)

    async def _wait(self, context: RequestContext, held: WaitsInQueue, since_s: float) -> Started:
        context.decision = held.decision
        evicted = held.queued.evicted
        if evicted is not None:
            self._metrics.shed.labels("evicted").inc()
            reason = "the queue is full and requests of higher priority came"
            _fail(evicted, TooManyRequests(reason, retry_after_s=held.queued.retry_after_s))
        waiting = _future(held.ticket)
        try:
            started = await waiting
        except asyncio.CancelledError:
            if not self._dispatcher.queue.leave(held.ticket) and _has_result(waiting):
                waiting.result().slot.abandon(monotonic())
                self.pump()
            raise
        finally:
            waited_s = monotonic() - since_s
            self._metrics.queue_wait_s.labels(context.request.priority).observe(waited_s)
        context.decision = started.decision
        self._note(started.decision)
        return started

    def _rejection_error(self, rejected: Rejected) -> RequestError:
        self._metrics.shed.labels(str(rejected.reason)).inc()
        if rejected.reason is RejectReason.TOO_LATE:
            return DeadlineExceeded("the request's deadline has passed")
        if rejected.reason is RejectReason.WOULD_MISS_DEADLINE:
            wait = f"{rejected.wait_s:.1f} s" if rejected.wait_s is not None else "longer"
            reason = f"it would wait about {wait} for an engine, which its deadline does not allow"
        else:
            reason = "the queue is full (gateway.queue.capacity)"
        return TooManyRequests(reason, retry_after_s=rejected.retry_after_s)

    def _note(self, decision: RouteDecision) -> None:
        if decision.spilled or decision.bridged:
            kind = "spill" if decision.spilled else "bridge"
            wanted = decision.reason.rpartition(f"{kind}: ")[2].split(" ", 1)[0]
            self._metrics.spills.labels(wanted, decision.tier, kind).inc()


def give_up_error(step: GiveUp, detail: str) -> RequestError:
    """The error of a call that is not tried again."""
    text = f"{step.reason}: {detail}" if detail else step.reason
    if step.status == 408:
        return DeadlineExceeded(text)
    if step.status == 429:
        return TooManyRequests(text, retry_after_s=RETRY_AFTER_S)
    if step.status == 503:
        return NoEndpoint(text, retry_after_s=RETRY_AFTER_S)
    if step.code == EndpointLost.code:
        return EndpointLost(text)
    return EngineFailed(text, status=step.status, code=step.code)


def _refusal_error(decision: RouteDecision) -> RequestError:
    message = decision.message or str(decision.refusal)
    if decision.refusal is RouteRefusal.UNKNOWN_MODEL:
        return UnknownModel(message, param="model")
    if decision.refusal in {RouteRefusal.UNKNOWN_TIER, RouteRefusal.BELOW_FLOOR, RouteRefusal.NO_CAPABILITY}:
        return BadRequest(message)
    return NoEndpoint(message, retry_after_s=RETRY_AFTER_S)


def _future(ticket: Ticket | None) -> asyncio.Future[Started]:
    if ticket is None:
        raise RuntimeError("a request that waited has a ticket")
    future: asyncio.Future[Started] = ticket.payload.payload
    return future


def _has_result(future: asyncio.Future[Started]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _fail(ticket: Ticket, error: RequestError) -> None:
    future = _future(ticket)
    if not future.done():
        future.set_exception(error)


def _waited(ticket: Ticket, now_s: float) -> str:
    return f"no engine was free in {now_s - ticket.arrived_s:.1f} s, until the request's deadline"
