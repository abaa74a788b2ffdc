"""Serves a request, from its arrival to the last byte that is sent to the client; start at
:meth:`Relay.serve`.

Nothing is sent to the client before an engine has begun to respond, so another attempt can hide any failure
up to then. After that, a lost stream is resumed (:mod:`controlplane.gateway.proxy.resumption`). A response
that is not streamed is sent only when it is complete, so it can be retried up to its last byte.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import Final

from controlplane.config import GatewayConfig
from controlplane.core.domain.request import RequestOutcome
from controlplane.core.routing.retry import AttemptFailure
from controlplane.core.routing.tier_table import Api, Route
from controlplane.errors import EngineRefused
from controlplane.gateway.proxy.attempt import Attempt, reported_failure
from controlplane.gateway.proxy.attempts import Attempts, TokenCounts
from controlplane.gateway.proxy.dispatch import NothingLeft, RequestDispatch
from controlplane.gateway.proxy.engine_errors import response_error, stream_error
from controlplane.gateway.proxy.first_token import missing_end
from controlplane.gateway.proxy.responses import STREAM_HEADERS, response_headers
from controlplane.gateway.proxy.resume import TOKEN_ID_MEMBERS, StreamRecorder
from controlplane.gateway.proxy.resumption import Resumption
from controlplane.gateway.proxy.upstream import UpstreamFailure
from controlplane.gateway.proxy.waiting_comments import WaitingComments
from controlplane.gateway.request_context import COUNT_TOKENS, RESUME_KINDS, RequestContext
from controlplane.gateway.stream_usage import (
    USAGE_APIS,
    USAGE_MARK,
    StreamUsage,
    asks_usage,
    response_usage,
    without_usage_events,
)
from controlplane.gateway.telemetry.metrics import Metrics
from controlplane.http.messages import EVENT_STREAM, JSON_TYPE, Responder
from controlplane.http.sse import has_end, is_end

PROMPT_IDS: Final = re.compile(rb'"prompt_token_ids":\[([0-9, ]*)\]')

_NO_SUCH_ROUTE: Final = frozenset({404, 405})

# Attribute look-ups on an enum class cost more than on a module.
_OK: Final = RequestOutcome.OK


class Relay:
    """Serves the requests of one gateway replica."""

    def __init__(
        self, config: GatewayConfig, dispatch: RequestDispatch, attempts: Attempts, metrics: Metrics
    ) -> None:
        self._dispatch = dispatch
        self._attempts = attempts
        self._metrics = metrics
        self._resumption = Resumption(config.resume, dispatch, attempts, metrics)
        self._resumable = config.resume != "never"
        self._hedge_after_s = config.hedge_after_s
        self._comments_s = config.stream_comments_s

    async def serve(self, context: RequestContext, out: Responder) -> None:
        """Serve a request. Raises :class:`RequestError` if it fails; the caller sends this error to the
        client as the response or, if part of the response was already sent, as an event that ends the
        stream."""
        self._attempts.budget.on_request()
        route = self._dispatch.route(context)
        comments_s = self._comments_s if context.comments_s is None else context.comments_s
        comments = WaitingComments(context, out, comments_s) if comments_s and context.stream else None
        try:
            try:
                attempt = await self._answering(context, route)
            finally:
                if comments is not None:
                    comments.stop()
            if attempt.streaming:
                await self._stream(context, attempt, out)
            else:
                self._whole(context, attempt, out)
        finally:
            if context.accusations is not None:
                self._attempts.verdicts.later(context)

    def close(self) -> None:
        """End the checks of engines that still run."""
        self._attempts.verdicts.close()

    # -- until an engine begins to respond -------------------------------------------------------

    async def _answering(self, context: RequestContext, route: Route) -> Attempt:
        """The attempt that answers the request."""
        last: UpstreamFailure | None = None
        last_tier = ""
        while True:
            try:
                started = await self._dispatch.start(context, route)
            except NothingLeft:
                if last is None:
                    raise
                raise await self._attempts.last_error(context, last) from None
            if last is not None:
                self._attempts.retried(context, last_tier, last)
            attempt = self._attempts.begin(context, started)
            try:
                if self._hedge_after_s is None or not context.stream:
                    await self._open(context, attempt)
                else:
                    attempt = await self._open_hedged(context, route, attempt, self._hedge_after_s)
                return attempt
            except UpstreamFailure as failure:
                self._attempts.failed(attempt, failure)
                await self._attempts.retry_or_raise(context, failure, sent=False)
                last, last_tier = failure, attempt.load.endpoint.tier
            except BaseException:  # the client left, or an unforeseen error
                attempt.abandon()
                raise

    async def _open(self, context: RequestContext, attempt: Attempt) -> None:
        """Send the request and wait for the first event of the stream, or for the whole response."""
        attempt.ids_added = (
            context.stream
            and context.api in RESUME_KINDS
            and attempt.load.endpoint.capabilities.resume_by_token_ids
            and self._resumable
            and not context.fields.asks_token_ids
            and context.fields.one_choice
        )
        if context.stream and context.api in USAGE_APIS and not asks_usage(context.fields.stream_options):
            body = partial(context.body_for, attempt.load, token_ids=attempt.ids_added)
            await attempt.send_asking_usage(context.path, body(usage=True), body)
        else:
            await attempt.send(context.path, context.body_for(attempt.load, token_ids=attempt.ids_added))
        await attempt.receive()
        if attempt.status < 400:
            attempt.first_token()

    async def _open_hedged(
        self, context: RequestContext, route: Route, attempt: Attempt, after_s: float
    ) -> Attempt:
        """The attempt whose response begins first: ``attempt``, or a second one that starts ``after_s``
        later."""
        first = asyncio.ensure_future(self._open(context, attempt))
        try:
            await asyncio.wait((first,), timeout=after_s)
            started = None if first.done() else self._dispatch.start_hedge(context, route)
            if started is None:
                await first
                return attempt
            hedge = self._attempts.begin(context, started)
            winner = await self._race(context, attempt, first, hedge)
            if winner is hedge:
                context.decision = started.decision
            return winner
        finally:
            await _unwind(first)
            if not first.cancelled():
                first.exception()  # marks it as retrieved

    async def _race(
        self, context: RequestContext, attempt: Attempt, first: asyncio.Future[None], hedge: Attempt
    ) -> Attempt:
        """The attempt whose response begins first; the other one is ended. If both fail, the failure of the
        first attempt is raised."""
        second = asyncio.ensure_future(self._open(context, hedge))
        attempts = {first: attempt, second: hedge}
        winner: asyncio.Future[None] | None = None
        try:
            pending = set(attempts)
            while pending and winner is None:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                winner = next((task for task in done if task.exception() is None), None)
            if winner is None:
                raise _failure_of(first)
            self._metrics.hedges.labels("won" if winner is second else "lost").inc()
            return attempts[winner]
        finally:
            try:
                await _unwind(*(task for task in attempts if task is not winner))
            finally:
                for task, other in attempts.items():
                    if task is winner:
                        continue
                    if not task.done() or task.cancelled():
                        other.abandon()
                    elif isinstance(failure := task.exception(), UpstreamFailure):
                        if winner is not None or task is second:  # otherwise the caller accounts for it
                            self._attempts.failed(other, failure)
                    else:
                        other.abandon()

    # -- the response ----------------------------------------------------------------------------

    def _whole(self, context: RequestContext, attempt: Attempt, out: Responder) -> None:
        """Send a response that is not streamed. Raises :class:`EngineRefused` for an error that is not
        JSON."""
        context.first_byte_s = monotonic()
        if attempt.status >= 400:
            self._refusal(context, attempt, out)
            return
        content_type = attempt.content_type or JSON_TYPE
        attempt.succeed()
        self._attempts.finished(context, attempt, response_usage(attempt.data))
        headers = [(b"content-type", content_type), *response_headers(context)]
        headers.append((b"x-gpu-seconds", b"%.6f" % context.gpu_s))
        out.send(attempt.status, headers, attempt.data)
        self._metrics.finished(context, _OK, str(attempt.status), monotonic())

    def _refusal(self, context: RequestContext, attempt: Attempt, out: Responder) -> None:
        """Send an error with which an engine rejected the request, as the engine wrote it if it is JSON and
        the API is OpenAI's; not every engine writes Anthropic's errors. It says nothing about the engine."""
        attempt.refuse()
        status = attempt.status
        body = attempt.data
        if context.path == COUNT_TOKENS and status in _NO_SUCH_ROUTE:
            text = f"the engine of tier '{context.tier}' does not count tokens"
            raise EngineRefused(text, status=HTTPStatus.NOT_IMPLEMENTED)
        if out.started or context.api is Api.MESSAGES or body.strip()[:1] != b"{":
            report = response_error(status, body)
            raise EngineRefused(
                report.message, status=status, kind=report.kind, code=report.code, param=report.param
            )
        headers = [(b"content-type", attempt.content_type or JSON_TYPE), *response_headers(context)]
        headers.append((b"x-should-retry", b"false"))
        out.send(status, headers, body)
        self._metrics.finished(context, RequestOutcome.CLIENT_ERROR, str(status), monotonic())

    async def _stream(self, context: RequestContext, attempt: Attempt, out: Responder) -> None:
        """Send a stream event by event as it comes, and resume it if its engine is lost."""
        kind = RESUME_KINDS.get(context.api)
        recorder = StreamRecorder(kind) if kind is not None and self._resumable else None
        strip = TOKEN_ID_MEMBERS.sub if attempt.ids_added else None
        started_s = context.first_byte_s = monotonic()
        if not out.started:
            headers = [(b"content-type", EVENT_STREAM), *STREAM_HEADERS, *response_headers(context)]
            out.start(attempt.status, headers)
        before = last = b""
        events = prompt = 0
        usage = StreamUsage()
        whole = attempt.data
        read, whole_events = attempt.connection.read, attempt.whole_events
        if attempt.ids_added and (ids := PROMPT_IDS.search(whole)) is not None:
            prompt = ids[1].count(b",") + 1
        try:
            while True:
                if whole:
                    error = stream_error(whole) if b"error" in whole else None
                    if error is not None:
                        whole = whole[: error.offset]
                    if recorder is not None:
                        recorder.add(whole)
                    shown = strip(b"", whole) if strip is not None else whole
                    mark = whole.find(USAGE_MARK)
                    if mark >= 0:
                        usage.add(whole, mark)
                        if attempt.usage_added:
                            shown = without_usage_events(shown)
                    events += whole.count(b'"token_ids":[') if attempt.ids_added else shown.count(b"data: {")
                    out.write(shown)
                    if out.congested:
                        await attempt.wait_for_client(out)
                    if b"data:" in whole:  # not only a comment
                        before, last = last, whole
                    if error is not None:
                        headers = attempt.connection.headers
                        raise reported_failure(error.report, AttemptFailure.STREAM_ERROR, headers)
                data = await read()
                whole = whole_events(data) if data else attempt.last_event()
                if not data and not whole:
                    break
            if not is_end(context.api, before + last):
                ending = missing_end(context.api, before + last)
                if ending is None:
                    raise UpstreamFailure(AttemptFailure.TRUNCATED, "the stream ended before its end")
                out.write(ending)
        except UpstreamFailure as failure:
            self._attempts.failed(attempt, failure)
            if failure.kind is AttemptFailure.INVALID:
                raise await self._attempts.last_error(context, failure) from None
            await self._resumption.resume(context, attempt.load.endpoint, recorder, failure, out)
            return
        except asyncio.CancelledError:
            if not has_end(context.api, before + last):
                attempt.abandon()
                raise
            # Many clients close the connection at the last event, before the engine's body has ended.
        except BaseException:
            attempt.abandon()
            raise
        now_s = monotonic()
        attempt.succeed()
        out.finish()
        if events > 1:
            self._metrics.itl_s.labels(context.tier).observe((now_s - started_s) / (events - 1))
        self._attempts.finished(context, attempt, usage.read(), TokenCounts(prompt, events))
        self._metrics.finished(context, _OK, "stream", now_s)


async def _unwind(*tasks: asyncio.Future[None]) -> None:
    """Cancel the tasks that still run, and wait until they have ended and use their connections no more."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


def _failure_of(task: asyncio.Future[None]) -> UpstreamFailure:
    error = task.exception()
    if isinstance(error, UpstreamFailure):
        return error
    raise error if error is not None else RuntimeError("the task did not fail")
