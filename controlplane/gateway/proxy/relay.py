"""The way of a request: placed on an endpoint, relayed, and kept alive when its engine is lost.

Read :meth:`Relay.serve` from top to bottom. Nothing of an answer is sent to the client before an engine
has begun to answer, so that any failure up to there can be hidden by another attempt; after it a lost
stream is resumed (:mod:`controlplane.gateway.proxy.resume`). An answer that is not streamed is held until it
is whole, which makes it retryable to its last byte.
"""

from __future__ import annotations

import asyncio
import re
from time import monotonic
from typing import Final, NamedTuple

import msgspec

from controlplane.config import GatewayConfig
from controlplane.core.domain.request import RequestOutcome
from controlplane.core.routing.dispatcher import Started
from controlplane.core.routing.endpoint_table import EndpointLoad
from controlplane.core.routing.retry import (
    RULES,
    AttemptFailure,
    FailedAttempt,
    GiveUp,
    RetryBudget,
    RetrySettings,
    next_step,
)
from controlplane.errors import DeadlineExceeded, EndpointLost, RequestError
from controlplane.gateway.proxy.attempt import Attempt
from controlplane.gateway.proxy.connections import ConnectionTable, EndpointConnections
from controlplane.gateway.proxy.dispatch import RequestDispatch, give_up_error
from controlplane.gateway.proxy.request_context import RESUME_KINDS, RequestContext
from controlplane.gateway.proxy.resume import (
    TOKEN_ID_MEMBERS,
    Continuation,
    NotResumable,
    SentSoFar,
    Splice,
    Tape,
    error_event,
    plan,
)
from controlplane.gateway.proxy.timeouts import TimeoutWatcher
from controlplane.gateway.proxy.upstream import UpstreamFailure
from controlplane.gateway.telemetry.accounting import UsageLedger
from controlplane.gateway.telemetry.metrics import Metrics
from controlplane.http.messages import EVENT_STREAM, JSON_TYPE, Headers, Responder
from controlplane.http.sse import events_end, has_end, has_error, is_end

MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
MAX_ERROR_BYTES: Final = 64 * 1024
PROMPT_IDS: Final = re.compile(rb'"prompt_token_ids":\[([0-9, ]*)\]')
PLAN_ANY_LENGTH: Final = 1 << 40
LATE: Final = "the request's deadline passed before its answer was whole"

# Attribute look-ups on an enum class cost more than on a module.
_OK: Final = RequestOutcome.OK
_STATUS_FAILURES: Final = {429: AttemptFailure.BUSY, 503: AttemptFailure.UNAVAILABLE}
_OUR_FAULT: Final = frozenset({401, 403})
"""An engine that answers these does not know our key: not the client's business."""


class _ResponseUsage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _CountedResponse(msgspec.Struct, gc=False):
    usage: _ResponseUsage | None = None


_counted = msgspec.json.Decoder(_CountedResponse).decode
_encode = msgspec.json.Encoder().encode


class TokenCounts(NamedTuple):
    """What a finished answer took."""

    prompt: int
    generated: int


class Relay:
    """Serves the calls of one gateway replica."""

    def __init__(
        self,
        config: GatewayConfig,
        placing: RequestDispatch,
        sites: ConnectionTable,
        metrics: Metrics,
        ledger: UsageLedger,
        watcher: TimeoutWatcher,
    ) -> None:
        self._placing = placing
        self._sites = sites
        self._metrics = metrics
        self._ledger = ledger
        self._watcher = watcher
        self._resume_policy = config.resume
        self._hedge_after_s = config.hedge_after_s
        self._retry = RetrySettings(
            max_attempts=config.retry.max_attempts,
            budget_ratio=config.retry.budget_ratio,
            budget_min_per_s=config.retry.budget_min_per_s,
        )
        self._budget = RetryBudget(self._retry, monotonic())

    async def serve(self, context: RequestContext, out: Responder) -> None:
        """Answer a context. Raises :class:`RequestError` for what the client is to be told: as the answer if
        nothing of it was sent yet, else as an event that ends the stream."""
        self._budget.on_request()
        started = await self._placing.place(context)
        while True:
            exchange = self._begin(context, started)
            try:
                exchange = await self._answer(context, exchange)
                break
            except UpstreamFailure as failure:
                self._failed(context, exchange, failure)
                await self._decide(context, failure)
                started = await self._placing.place_again(context)
            except BaseException:  # the client left, or an error that nobody foresaw
                exchange.abandon()
                raise
        if exchange.streaming:
            await self._stream(context, exchange, out)
        else:
            self._whole(context, exchange, out)

    # -- one attempt -----------------------------------------------------------------------------

    def _begin(self, context: RequestContext, started: Started) -> Attempt:
        context.attempts += 1
        context.tried |= {started.slot.load.key}
        try:
            site = self._sites.site(started.slot.load)
        except ValueError:  # an address that is none
            started.slot.abandon(monotonic())
            raise
        return Attempt(context, started.slot, site, self._watcher, self._placing.pump)

    async def _answer(self, context: RequestContext, exchange: Attempt) -> Attempt:
        """The exchange once it has begun to answer; a hedge may win over the one that was begun."""
        if self._hedge_after_s is None or not context.stream:
            await self._open(context, exchange)
            return exchange
        first = asyncio.ensure_future(self._open(context, exchange))
        try:
            await asyncio.wait((first,), timeout=self._hedge_after_s)
            hedge = None if first.done() else self._placing.place_now(context)
            if hedge is None:
                await first
                return exchange
            winner = await self._race(context, exchange, first, self._begin(context, hedge))
            if winner is not exchange:
                context.decision = hedge.decision
            return winner
        finally:
            if not first.done():
                first.cancel()
            elif not first.cancelled():
                first.exception()  # it was looked at

    async def _race(
        self, context: RequestContext, exchange: Attempt, first: asyncio.Future[None], other: Attempt
    ) -> Attempt:
        """Two exchanges of one call: the one that answers first goes on, the other ends here. If both
        fail, so does the context, with the first one's failure."""
        second = asyncio.ensure_future(self._open(context, other))
        runs = {first: exchange, second: other}
        winner: asyncio.Future[None] | None = None
        try:
            pending = set(runs)
            while pending and winner is None:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                winner = next((task for task in done if task.exception() is None), None)
            if winner is None:
                raise _failure_of(first)
            self._metrics.hedges.labels("won" if winner is second else "lost").inc()
            return runs[winner]
        finally:
            for task, run in runs.items():
                if not task.done():
                    task.cancel()
                    run.abandon()
                elif task is not winner and isinstance(failure := task.exception(), UpstreamFailure):
                    if winner is not None or task is second:  # else the caller accounts for it
                        self._failed(context, run, failure)
                elif task is not winner:
                    run.abandon()

    async def _open(self, context: RequestContext, exchange: Attempt) -> None:
        """Send the request and wait until there is something to send on."""
        endpoint = exchange.load.endpoint
        exchange.ids_added = (
            context.stream
            and context.api in RESUME_KINDS
            and endpoint.capabilities.resume_by_token_ids
            and self._resume_policy != "never"
            and context.envelope.return_token_ids is None
            and context.envelope.n in (None, 1)
        )
        body = context.body_for(exchange.load, token_ids=exchange.ids_added)
        await self._send(exchange, context.path, context.identity, body)
        if exchange.streaming:
            await exchange.first_event()
            if has_error(context.api, exchange.data):
                raise UpstreamFailure(AttemptFailure.STREAM_ERROR, _detail(exchange.data))
        else:
            exchange.data = await exchange.read_all(MAX_ANSWER_BYTES)
        exchange.answered()

    async def _send(self, exchange: Attempt, path: str, identity: str, body: bytes) -> None:
        status = await exchange.post(path, identity, body)
        if status >= 500 or status == 429 or status in _OUR_FAULT:
            said = await exchange.read_all(MAX_ERROR_BYTES)
            kind = _STATUS_FAILURES.get(status, AttemptFailure.SERVER_ERROR)
            told = "the engine does not take the gateway's key" if status in _OUR_FAULT else _detail(said)
            raise UpstreamFailure(kind, f"{status}: {told}", status=status if status >= 500 else None)

    # -- failures --------------------------------------------------------------------------------

    def _failed(self, context: RequestContext, exchange: Attempt, failure: UpstreamFailure) -> None:
        """Account for a failed attempt and free its place."""
        kind = failure.kind
        if kind is None:  # the deadline passed, which tells nothing of the endpoint
            exchange.abandon()
        else:
            exchange.fail(RULES[kind].breaker_weight)
        name = str(kind) if kind is not None else "deadline"
        self._metrics.endpoint_failures.labels(exchange.load.endpoint.tier, name).inc()

    async def _decide(
        self, context: RequestContext, failure: UpstreamFailure, not_resumable: str = "", sent: bool = False
    ) -> None:
        """Return when the call is to go on elsewhere, raise what the client gets if it is not."""
        kind = failure.kind
        if kind is None:
            raise DeadlineExceeded(LATE)
        now_s = monotonic()
        attempt = FailedAttempt(
            number=context.attempts,
            sent=sent,
            deadline_s=context.deadline_s,
            refused=context.refused,
            losses=context.losses,
            not_resumable=not_resumable,
            engine_status=failure.status,
        )
        step = next_step(kind, attempt, self._retry, self._budget, now_s)
        context.refused += kind is AttemptFailure.REFUSED
        if RULES[kind].lost:
            context.losses += 1
        if isinstance(step, GiveUp):
            raise give_up_error(step, failure.detail)
        self._metrics.retries.labels(context.tier, str(kind)).inc()
        if step.pause_s:
            await asyncio.sleep(step.pause_s)

    # -- answers ---------------------------------------------------------------------------------

    def _whole(self, context: RequestContext, exchange: Attempt, out: Responder) -> None:
        context.first_byte_s = monotonic()
        content_type = exchange.content_type or JSON_TYPE
        exchange.succeed()
        tokens = TokenCounts(0, 0)
        if exchange.status < 400:
            tokens = _count_whole(exchange.data)
        self._account(context, exchange, tokens)
        headers = [(b"content-type", content_type), *answer_headers(context)]
        if exchange.status < 400:
            headers.append((b"x-gpu-seconds", b"%.6f" % context.gpu_s))
        out.send(exchange.status, headers, exchange.data)
        outcome = _OK if exchange.status < 400 else RequestOutcome.CLIENT_ERROR
        self._metrics.finished(context, outcome, str(exchange.status), monotonic())

    async def _stream(self, context: RequestContext, exchange: Attempt, out: Responder) -> None:
        kind = RESUME_KINDS.get(context.api)
        tape = Tape(kind) if kind is not None and self._resume_policy != "never" else None
        strip = TOKEN_ID_MEMBERS.sub if exchange.ids_added else None
        started_s = context.first_byte_s = monotonic()
        out.start(
            exchange.status, [(b"content-type", EVENT_STREAM), *STREAM_HEADERS, *answer_headers(context)]
        )
        carry = last = b""
        events = prompt = 0
        data = exchange.data
        if exchange.ids_added and (ids := PROMPT_IDS.search(data)) is not None:
            prompt = ids[1].count(b",") + 1
        try:
            while data:
                if carry:
                    data = carry + data
                end = events_end(data)
                whole, carry = (data, b"") if end == len(data) else (data[:end], data[end:])
                if end:
                    if has_error(context.api, whole):
                        raise UpstreamFailure(AttemptFailure.STREAM_ERROR, _detail(whole))
                    if tape is not None:
                        tape.keep(whole)
                    events += whole.count(b'"token_ids":[') if exchange.ids_added else whole.count(b"data: {")
                    out.write(strip(b"", whole) if strip is not None else whole)
                    if out.congested:
                        await _client(context, exchange, out)
                    last = whole
                data = await exchange.connection.read()
            if not is_end(context.api, last):
                raise UpstreamFailure(AttemptFailure.CUT, "the stream ended before its end")
        except UpstreamFailure as failure:
            self._failed(context, exchange, failure)
            if failure.kind is None:
                raise DeadlineExceeded(LATE) from None
            seen = tape.read() if tape is not None else None
            await self._go_on(context, exchange.load, seen, failure, out)
            return
        except asyncio.CancelledError:
            if not has_end(context.api, last):
                exchange.abandon()
                raise
            # Clients leave at the last event; the end of the engine's body may come after it.
        except BaseException:
            exchange.abandon()
            raise
        out.write(carry)
        now_s = monotonic()
        exchange.succeed()
        out.finish()
        if events > 1:
            self._metrics.itl_s.labels(context.tier).observe((now_s - started_s) / (events - 1))
        self._account(context, exchange, TokenCounts(prompt, events))
        self._metrics.finished(context, _OK, "stream", now_s)

    # -- resume ----------------------------------------------------------------------------------

    async def _go_on(
        self,
        context: RequestContext,
        lost: EndpointLoad,
        seen: SentSoFar | None,
        failure: UpstreamFailure,
        out: Responder,
    ) -> None:
        """A stream was lost after a part of it was sent: go on elsewhere, or say that it ends here."""
        exchange: Attempt | None = None
        tier = lost.endpoint.tier
        while True:
            try:
                how, refusal = self._plan(context, seen, PLAN_ANY_LENGTH)
                if how is not None and how.method == "finish" and seen is not None:
                    out.write(Splice(how, seen, stream_options(context)).finish())
                    self._resumed(context, how, out)
                    return
                await self._decide(context, failure, refusal, sent=True)
                if seen is None:
                    raise EndpointLost("streams of this route can't be resumed")
                exchange = self._begin(context, await self._placing.place_resumed(context, tier))
                if how is None or _needs_length(how):
                    how = await self._plan_at(context, seen, exchange)
                await self._resume(context, exchange, how, seen, out)
                return
            except UpstreamFailure as again:
                failure = again
                if exchange is not None:
                    self._failed(context, exchange, failure)
                    exchange = None
                if failure.kind is None:
                    raise DeadlineExceeded(LATE) from None
            except (RequestError, NotResumable) as reason:
                if exchange is not None:
                    exchange.abandon()
                self._refuse_resume(context, failure, str(reason), out)
                return
            except BaseException:
                if exchange is not None:
                    exchange.abandon()
                raise

    def _plan(
        self, context: RequestContext, seen: SentSoFar | None, max_model_len: int
    ) -> tuple[Continuation | None, str]:
        if seen is None:
            return None, "streams of this route can't be resumed, or the policy is never to"
        if context.envelope.return_token_ids is not None:
            return None, "the client asked for token ids itself"
        try:
            return plan(context.body, seen, self._resume_policy, max_model_len), ""
        except NotResumable as reason:
            return None, str(reason)

    async def _plan_at(self, context: RequestContext, seen: SentSoFar, exchange: Attempt) -> Continuation:
        site = exchange.site
        if site.max_model_len is None and exchange.load.endpoint.capabilities.resume_by_token_ids:
            site.max_model_len = await _max_model_len(site, context.request_id)
        return plan(context.body, seen, self._resume_policy, site.max_model_len)

    async def _resume(
        self, context: RequestContext, exchange: Attempt, how: Continuation, seen: SentSoFar, out: Responder
    ) -> None:
        splice = Splice(how, seen, stream_options(context))
        if how.method != "finish":
            body = {**how.body, "model": exchange.load.endpoint.model}
            body.pop("models", None)
            if how.method == "replay" and exchange.load.endpoint.capabilities.resume_by_token_ids:
                body["return_token_ids"] = True
            await self._send(exchange, how.path, context.identity, _encode(body))
            if 400 <= exchange.status < 500:
                raise NotResumable(f"the other engine answered {exchange.status}")
            if not exchange.streaming:
                raise UpstreamFailure(AttemptFailure.SERVER_ERROR, "the other engine did not stream")
            await self._relay_resumed(context, exchange, splice, seen, out)
            exchange.succeed()
            self._account(context, exchange, TokenCounts(len(seen.prompt_ids or ()), len(seen.token_ids)))
        else:
            exchange.abandon()
            out.write(splice.finish())
        self._resumed(context, how, out)

    async def _relay_resumed(
        self, context: RequestContext, exchange: Attempt, splice: Splice, seen: SentSoFar, out: Responder
    ) -> None:
        carry = b""
        taken = False
        try:
            while data := await exchange.connection.read():
                exchange.answered()
                data = carry + data
                end = events_end(data)
                whole, carry = data[:end], data[end:]
                if whole:
                    if has_error(context.api, whole):
                        raise UpstreamFailure(AttemptFailure.STREAM_ERROR, _detail(whole))
                    out.write(splice.feed(whole))
                    if out.congested:
                        await _client(context, exchange, out)
                    taken = seen.done
        except asyncio.CancelledError:
            if not taken:  # else the client left at the last event, as in _stream
                raise
        if not seen.done:
            raise UpstreamFailure(AttemptFailure.CUT, "the stream ended before its end")

    def _resumed(self, context: RequestContext, how: Continuation, out: Responder) -> None:
        context.resumed += 1
        out.finish()
        self._metrics.resumes.labels(how.method).inc()
        self._metrics.finished(context, _OK, "resumed", monotonic())

    def _refuse_resume(
        self, context: RequestContext, failure: UpstreamFailure, reason: str, out: Responder
    ) -> None:
        self._metrics.resumes.labels("refused").inc()
        self._metrics.finished(context, RequestOutcome.FAILED, "endpoint_lost", monotonic())
        error = EndpointLost(
            f"the engine was lost ({failure.detail}) and the stream was not resumed: {reason}"
        )
        out.write(error_event(error, context.api))
        out.finish()

    def _account(self, context: RequestContext, exchange: Attempt, tokens: TokenCounts) -> None:
        tier = exchange.load.endpoint.tier
        next_gpu_s = self._ledger.record(
            tier, context.session, tokens.prompt, tokens.generated, context.gpu_s
        )
        self._metrics.used(context, tier, tokens.prompt, tokens.generated, next_gpu_s)


STREAM_HEADERS: Final[Headers] = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


def answer_headers(context: RequestContext) -> Headers:
    """What every answer tells about its way."""
    headers = [(b"x-request-id", context.request_id.encode("latin-1"))]
    if context.decision is not None:
        headers.append((b"x-tier", context.decision.tier.encode()))
        headers.append((b"x-tier-reason", context.decision.reason.encode("latin-1", "replace")))
    if context.attempts > 1:
        headers.append((b"x-attempts", str(context.attempts).encode()))
    return headers


def stream_options(context: RequestContext) -> dict[str, object] | None:
    """The request's ``stream_options``."""
    options = msgspec.json.decode(context.body).get("stream_options")
    return options if isinstance(options, dict) else None


def _count_whole(body: bytes) -> TokenCounts:
    try:
        usage = _counted(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        usage = None
    if usage is None:
        return TokenCounts(0, 0)
    return TokenCounts(
        usage.prompt_tokens or usage.input_tokens, usage.completion_tokens or usage.output_tokens
    )


async def _max_model_len(site: EndpointConnections, request_id: str) -> int | None:
    """The engine's context length in tokens, from its model list; None if it does not say."""
    connection = await site.origin.acquire(fresh=True)
    try:
        connection.send(site.origin.request("GET", "/v1/models", request_id, b""))
        async with asyncio.timeout(5.0):
            await connection.head()
            body = b""
            while data := await connection.read():
                body += data
        length = msgspec.json.decode(body)["data"][0].get("max_model_len")
        return length if isinstance(length, int) else None
    except (TimeoutError, msgspec.DecodeError, LookupError, AttributeError, TypeError):
        return None
    finally:
        connection.close()


async def _client(context: RequestContext, exchange: Attempt, out: Responder) -> None:
    """Wait for a client that takes less than it is sent: until the deadline, for it holds a place at the
    engine all the while, which is not to blame."""
    exchange.hold()
    try:
        async with asyncio.timeout(context.deadline_s - monotonic()):
            await out.drain()
    except TimeoutError:
        raise UpstreamFailure(None, "the client took nothing until the deadline") from None
    finally:
        exchange.go_on()


def _needs_length(how: Continuation) -> bool:
    """The engine's context length sets the limit, as the request has none."""
    return how.method == "continue" and int(how.body["max_tokens"]) > PLAN_ANY_LENGTH // 2


def _failure_of(task: asyncio.Future[None]) -> UpstreamFailure:
    error = task.exception()
    if isinstance(error, UpstreamFailure):
        return error
    raise error if error is not None else RuntimeError("the task did not fail")


def _detail(body: bytes) -> str:
    return body[:300].decode("utf-8", "replace").strip()
