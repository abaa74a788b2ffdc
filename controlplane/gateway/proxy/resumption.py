"""Continues a stream on another engine after its engine was lost, as planned by
:mod:`controlplane.gateway.proxy.resume`."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import msgspec

from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.domain.request import RequestOutcome
from controlplane.core.routing.retry import AttemptFailure
from controlplane.errors import DeadlineExceeded, EndpointLost, RequestError
from controlplane.gateway.proxy.attempt import Attempt, reported_failure
from controlplane.gateway.proxy.attempts import TOO_LATE, Attempts
from controlplane.gateway.proxy.dispatch import RequestDispatch
from controlplane.gateway.proxy.engine_errors import stream_error
from controlplane.gateway.proxy.responses import error_event
from controlplane.gateway.proxy.resume import (
    Continuation,
    NotResumable,
    Policy,
    SentSoFar,
    Splice,
    StreamRecorder,
    plan,
    request_members,
)
from controlplane.gateway.proxy.upstream import UpstreamFailure
from controlplane.gateway.request_context import RequestContext
from controlplane.gateway.telemetry.metrics import Metrics
from controlplane.http.messages import Responder

_encode = msgspec.json.Encoder().encode


class Resumption:
    """Resumes the streams of one gateway replica."""

    def __init__(
        self, policy: Policy, dispatch: RequestDispatch, attempts: Attempts, metrics: Metrics
    ) -> None:
        self._policy = policy
        self._dispatch = dispatch
        self._attempts = attempts
        self._metrics = metrics

    async def resume(
        self,
        context: RequestContext,
        lost: Endpoint,
        recorder: StreamRecorder | None,
        failure: UpstreamFailure,
        out: Responder,
    ) -> None:
        """Continue a stream of ``lost`` that ``failure`` interrupted after part of it was sent, or end it
        with an error event. Raises :class:`DeadlineExceeded`."""
        route = self._dispatch.resume_route(lost.tier, context.request)
        while True:
            if failure.kind is None:
                raise DeadlineExceeded(TOO_LATE)
            attempt: Attempt | None = None
            try:
                if recorder is None:
                    raise NotResumable("streams of this route can't be resumed, or the policy is never to")
                sent = recorder.sent()
                continuation = self._plan(context, sent)
                if continuation.method == "finish":
                    self._finish(context, continuation, sent, out)
                    return
                await self._attempts.retry_or_raise(context, failure, sent=True)
                attempt = self._attempts.begin(context, await self._dispatch.start(context, route))
                if attempt.load.endpoint.model_identity != lost.model_identity:
                    # While a configuration is rolled out, a tier may have replicas with two models.
                    raise NotResumable("the other engine serves another model")
                await self._continue(context, attempt, continuation, sent, out)
                return
            except UpstreamFailure as another:
                failure = another
                if attempt is not None:
                    self._attempts.failed(attempt, failure)
            except (RequestError, NotResumable) as reason:
                if attempt is not None:
                    attempt.abandon()
                self._refuse(context, failure, str(reason), out)
                return
            except BaseException:
                if attempt is not None:
                    attempt.abandon()
                raise

    def _plan(self, context: RequestContext, sent: SentSoFar) -> Continuation:
        if context.fields.asks_token_ids:
            raise NotResumable("the client asked for token ids itself")
        return plan(context.body, sent, self._policy)

    async def _continue(
        self,
        context: RequestContext,
        attempt: Attempt,
        continuation: Continuation,
        sent: SentSoFar,
        out: Responder,
    ) -> None:
        """Send the rest of the stream from another engine."""
        if continuation.needs_context_length:
            continuation = continuation.limited(await _context_length(context, attempt))
            if continuation.method == "finish":
                attempt.abandon()
                self._finish(context, continuation, sent, out)
                return
        options = _stream_options(context)
        splice = Splice(continuation, sent, options)
        body = _body_for(attempt, continuation)
        if continuation.method == "replay":
            asking = {**body, "stream_options": {**(options or {}), "include_usage": True}}
            await attempt.send_asking_usage(continuation.path, _encode(asking), lambda: _encode(body))
        else:
            await attempt.send(continuation.path, _encode(body))
        if 400 <= attempt.status < 500:
            raise NotResumable(f"the other engine answered {attempt.status}")
        if not attempt.streaming:
            raise UpstreamFailure(AttemptFailure.SERVER_ERROR, "the other engine did not stream")
        await self._relay(context, attempt, splice, sent, out)
        attempt.succeed()
        self._attempts.finished(context, attempt, sent.tokens())
        self._resumed(context, continuation, out)

    async def _relay(
        self, context: RequestContext, attempt: Attempt, splice: Splice, sent: SentSoFar, out: Responder
    ) -> None:
        all_written = False
        try:
            while data := await attempt.connection.read():
                attempt.first_token()
                whole = attempt.whole_events(data)
                if whole:
                    if (error := stream_error(whole)) is not None:
                        headers = attempt.connection.headers
                        raise reported_failure(error.report, AttemptFailure.STREAM_ERROR, headers)
                    out.write(splice.feed(whole))
                    if out.congested:
                        await attempt.wait_for_client(out)
                    all_written = sent.done
            if last := attempt.last_event():
                out.write(splice.feed(last))
        except asyncio.CancelledError:
            if not all_written:  # many clients leave at the last event, as in Relay._stream
                raise
        if not sent.done:
            raise UpstreamFailure(AttemptFailure.TRUNCATED, "the stream ended before its end")

    def _finish(
        self, context: RequestContext, continuation: Continuation, sent: SentSoFar, out: Responder
    ) -> None:
        """Send the end of a stream whose tokens the client already has."""
        out.write(Splice(continuation, sent, _stream_options(context)).finish())
        self._attempts.count(context, context.tier, sent.tokens())
        self._resumed(context, continuation, out)

    def _resumed(self, context: RequestContext, continuation: Continuation, out: Responder) -> None:
        context.resumed += 1
        out.finish()
        self._metrics.resumes.labels(continuation.method).inc()
        self._metrics.finished(context, RequestOutcome.OK, "resumed", monotonic())

    def _refuse(self, context: RequestContext, failure: UpstreamFailure, reason: str, out: Responder) -> None:
        """End the stream with an error event, because it can't be resumed."""
        self._metrics.resumes.labels("refused").inc()
        self._metrics.finished(context, RequestOutcome.FAILED, EndpointLost.code, monotonic())
        error = EndpointLost(
            f"the engine was lost ({failure.detail}) and the stream was not resumed: {reason}"
        )
        out.write(error_event(error, context.api))
        out.finish()


def _body_for(attempt: Attempt, continuation: Continuation) -> dict[str, Any]:
    """The request to the other engine."""
    endpoint = attempt.load.endpoint
    body = {**continuation.body, "model": endpoint.model}
    body.pop("models", None)
    if continuation.method == "replay" and endpoint.capabilities.resume_by_token_ids:
        body["return_token_ids"] = True
    return body


async def _context_length(context: RequestContext, attempt: Attempt) -> int | None:
    """The context length in tokens of the attempt's engine; None if it is not known."""
    if not attempt.load.endpoint.capabilities.resume_by_token_ids:
        return None
    return await attempt.upstream.max_model_len(context.request_id)


def _stream_options(context: RequestContext) -> dict[str, object] | None:
    """The request's ``stream_options``; None if it has none or can't be read."""
    try:
        options = request_members(context.body).get("stream_options")
    except NotResumable:
        return None
    return options if isinstance(options, dict) else None
