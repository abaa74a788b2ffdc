"""One attempt of a request at one endpoint: its slot, its connection, its time-outs, its GPU time.

An attempt ends once, by :meth:`Attempt.succeed`, :meth:`Attempt.fail` or :meth:`Attempt.abandon`, which
release its slot and its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic, time
from typing import Final

from controlplane.core.routing.endpoint_table import EndpointLoad, RequestSlot
from controlplane.core.routing.retry import AttemptFailure
from controlplane.core.routing.tier_table import Api
from controlplane.gateway.proxy.connections import EndpointConnections
from controlplane.gateway.proxy.engine_errors import (
    BACK_PRESSURE,
    NOT_THE_CLIENTS,
    UNREACHABLE,
    EngineErrorReport,
    is_event_stream,
    response_error,
    retry_after_s,
    stream_error,
    whole_error,
)
from controlplane.gateway.proxy.first_token import MAX_PREAMBLE_BYTES, completed, has_content
from controlplane.gateway.proxy.timeouts import TimeoutWatcher, WatchedAttempt
from controlplane.gateway.proxy.upstream import (
    UpstreamConnection,
    UpstreamFailure,
    UpstreamOrigin,
    WireRequest,
)
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import EVENT_STREAM, Headers, Responder
from controlplane.http.redirects import MAX_REDIRECTS
from controlplane.http.sse import EventBuffer, EventTooLarge

MAX_ERROR_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 256 * 1024 * 1024
"""The largest response that is not streamed."""
MAX_HELD_BYTES: Final = 512 * 1024 * 1024
"""The most bytes of responses that are not streamed and being received from one engine."""
HOLD_S: Final = 1.0
"""How long other endpoints are preferred to one that is too busy and does not say for how long."""

_INVALID: Final = frozenset({400, 422})
"""With these statuses engines reject a member of the request."""
_KEY_REFUSED: Final = frozenset({401, 402, 403, 407})
"""With these statuses an engine rejects the gateway's key or account, which is not the client's fault."""
_KEY_TEXT: Final = "the engine does not accept the gateway's key"


class Attempt:
    """One attempt; the caller has already taken ``slot`` for it."""

    __slots__ = (
        "_connection", "_context", "_events", "_meter_reading", "_on_released", "_origin", "_timeouts",
        "_watched", "content_type", "data", "ended", "ids_added", "load", "slot", "status", "streaming",
        "upstream", "usage_added",
    )  # fmt: skip

    def __init__(
        self,
        context: RequestContext,
        slot: RequestSlot,
        upstream: EndpointConnections,
        timeouts: TimeoutWatcher,
        on_released: Callable[[], None],
    ) -> None:
        """``on_released`` is called when the attempt has released its slot."""
        self._context = context
        self._on_released = on_released
        self._timeouts = timeouts
        self._watched: WatchedAttempt | None = None
        self._connection: UpstreamConnection | None = None
        self._meter_reading = upstream.meter.start(monotonic())
        self.slot = slot
        self.load: EndpointLoad = slot.load
        self.upstream = upstream
        self._origin = upstream.origin
        """Where the connection belongs: elsewhere than the endpoint's after a redirect to https."""
        self.status = 0
        self.content_type = b""
        self.streaming = False
        """The response is a stream of events."""
        self.data = b""
        """The response's first events, or its whole body."""
        self._events = EventBuffer()
        self.usage_added = False
        """The gateway requested usage that the client did not request."""
        self.ids_added = False
        """The gateway requested token ids that the client did not request."""
        self.ended = False

    @property
    def connection(self) -> UpstreamConnection:
        """The connection. RuntimeError before :meth:`send`."""
        if self._connection is None:
            raise RuntimeError("nothing was sent yet")
        return self._connection

    async def send(self, path: str, body: bytes) -> None:
        """Send the request and wait for the head of the response. Raises :class:`UpstreamFailure` if the
        engine can't be reached, or if another engine might not fail with the same status."""
        origin = self.upstream.origin
        status = await self._exchange(origin, origin.request("POST", path, self._context.identity, body))
        if 300 <= status < 400:
            status = await self._follow_redirects(path, body)
        self.status = status
        for name, value in self.connection.headers:
            if name == b"content-type":
                self.content_type = value
                self.streaming = value[:17].lower() == EVENT_STREAM and status < 400
        if status < 300 or (400 <= status < 500 and status not in NOT_THE_CLIENTS):
            return
        response = await self.read_all(MAX_ERROR_BYTES)
        report = response_error(status, response)
        raise reported_failure(report, AttemptFailure.SERVER_ERROR, self.connection.headers)

    async def receive(self) -> None:
        """Receive what shows that the engine answers, into :attr:`data`: the whole body or, of a stream, its
        beginning up to the first event with content. Raises :class:`UpstreamFailure` if it is no answer."""
        context = self._context
        data = b""
        if context.stream and not self.streaming and self.status < 400:
            data = await self.connection.read()
            self.streaming = is_event_stream(data)  # whatever the content type says
        if self.streaming:
            if not context.stream:
                detail = "the engine answered with a stream, which was not asked for"
                raise UpstreamFailure(AttemptFailure.SERVER_ERROR, detail)
            await self._begin_stream(data)
            return
        self.data = data = data + await self.read_all(MAX_BODY_BYTES)
        if self.status < 400 and (report := whole_error(data, self.content_type)) is not None:
            raise reported_failure(report, AttemptFailure.SERVER_ERROR, self.connection.headers)
        if self.status < 400 and context.stream and context.api is not Api.EMBEDDINGS:
            raise UpstreamFailure(AttemptFailure.SERVER_ERROR, "the engine did not stream its answer")

    async def _begin_stream(self, data: bytes) -> None:
        """Read into :attr:`data` until the stream's first event with content is complete. How the events are
        split into packets makes no difference."""
        read = self.connection.read
        api = self._context.api
        before = b""
        data = (data or await read()).removeprefix(b"\xef\xbb\xbf")
        is_empty = not data
        while data:
            events = self.whole_events(data)
            if events:
                error = stream_error(events)
                if has_content(api, events if error is None else events[: error.offset]):
                    self.data = before + events
                    return
                if error is not None:
                    raise reported_failure(error.report, AttemptFailure.STREAM_ERROR, self.connection.headers)
                before += events
                if len(before) > MAX_PREAMBLE_BYTES:
                    self.data = before
                    return
            data = await read()
        last = self.last_event()
        if not has_content(api, last):
            detail = "the stream is empty" if is_empty else "the stream ended before its first token"
            raise UpstreamFailure(AttemptFailure.TRUNCATED, detail)
        self.data = before + last

    def whole_events(self, data: bytes) -> bytes:
        """The whole events of the stream that ``data``, its next bytes, completes; ``b""`` if there are none.
        Raises :class:`UpstreamFailure` if an event is too large."""
        try:
            return self._events.feed(data)
        except EventTooLarge as error:
            raise UpstreamFailure(AttemptFailure.SERVER_ERROR, str(error)) from None

    def last_event(self) -> bytes:
        """At the end of the stream: its last event, if that lacks only its blank line; else ``b""``."""
        return completed(self._events.rest())

    async def send_asking_usage(self, path: str, asking: bytes, plain: Callable[[], bytes]) -> None:
        """:meth:`send` with ``asking``, a body whose ``stream_options`` ask for usage. To an engine that
        rejects them, send the body of ``plain`` instead, now and from now on."""
        if self.upstream.refuses_usage:
            await self.send(path, plain())
            return
        await self.send(path, asking)
        self.usage_added = True
        if self.status not in _INVALID:
            return
        error = await self.read_all(MAX_ERROR_BYTES)
        if b"stream_options" not in error:
            self.connection.unread(error)
            return
        self.usage_added = False
        await self.send(path, plain())
        # Otherwise the engine has only named what the client sent.
        if self.status < 400 and not self._context.fields.stream_options:
            self.upstream.refuses_usage = True

    async def _exchange(self, origin: UpstreamOrigin, request: WireRequest) -> int:
        """Send the request over a connection of ``origin`` and return the status of the response.

        A keep-alive connection that turns out to be closed is replaced once, because the engine did not fail.
        """
        deadline_s = self._context.deadline_s
        connection = await origin.acquire(deadline_s=deadline_s)
        try:
            return await self._head(origin, connection, request)
        except UpstreamFailure as failure:
            if not failure.stale:
                raise
            connection = await origin.acquire(fresh=True, deadline_s=deadline_s)
            return await self._head(origin, connection, request)

    async def _follow_redirects(self, path: str, body: bytes) -> int:
        """The status of the response to which the engine's redirects lead."""
        path = self._origin.full_path(path)
        for _ in range(MAX_REDIRECTS):
            identity = self._context.identity
            origin, path, request = self._origin.redirected(path, self.connection, identity, body)
            status = await self._exchange(origin, request)
            if not 300 <= status < 400:
                return status
        raise UpstreamFailure(
            AttemptFailure.SERVER_ERROR, f"the engine answered with over {MAX_REDIRECTS} redirects"
        )

    async def _head(
        self, origin: UpstreamOrigin, connection: UpstreamConnection, request: WireRequest
    ) -> int:
        if self._watched is not None:
            self._timeouts.discard(self._watched)
        if self._connection is not None:
            self._origin.release(self._connection)
        self._origin, self._connection = origin, connection
        connection.send(request)
        self._watched = WatchedAttempt(
            connection,
            self.slot,
            deadline_s=self._context.deadline_s,
            started_s=monotonic(),
            streaming=self._context.stream,
            attempt=self._context.attempts,
        )
        self._timeouts.add(self._watched)
        return await connection.head()

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body. Raises :class:`UpstreamFailure` if it is larger than ``limit_bytes``."""
        connection = self.connection
        data = await connection.read()
        if connection.complete and not connection.pending:
            return data
        parts = [data]
        size = len(data)
        upstream = self.upstream
        upstream.held_bytes += size
        try:
            while data:
                data = await connection.read()
                parts.append(data)
                size += len(data)
                upstream.held_bytes += len(data)
                if size > limit_bytes:
                    detail = f"the engine's response is over {limit_bytes} bytes"
                    raise UpstreamFailure(AttemptFailure.SERVER_ERROR, detail)
                if upstream.held_bytes > MAX_HELD_BYTES:
                    detail = f"responses of over {MAX_HELD_BYTES} bytes are being received from one engine"
                    raise UpstreamFailure(AttemptFailure.GATEWAY, detail)
        finally:
            upstream.held_bytes -= size
        return b"".join(parts)

    def first_token(self) -> None:
        """Record that the first token arrived."""
        if self._watched is not None and not self._watched.first_token_came:
            self._watched.first_token_came = True
            self.slot.first_token(monotonic())

    async def wait_for_client(self, out: Responder) -> None:
        """Wait until the client has read what was written, but not past the deadline. A client that reads
        slowly occupies the slot through no fault of the engine, so the other time-outs are paused."""
        watched = self._watched
        if watched is not None:
            watched.paused = True
        try:
            async with asyncio.timeout(self._context.deadline_s - monotonic()):
                await out.drain()
        except TimeoutError:
            raise UpstreamFailure(None, "the client did not read until the deadline") from None
        finally:
            if watched is not None:
                watched.paused = False
                watched.started_s = monotonic()

    def succeed(self) -> None:
        """End the attempt: the response is complete."""
        if not self.ended:
            self.slot.succeed(self._end())
            self._on_released()

    def fail(self, weight: int) -> None:
        """End the attempt: the endpoint failed. ``weight`` is that of :meth:`RequestSlot.fail`."""
        if not self.ended:
            self.slot.fail(self._end(), weight)
            self._on_released()

    def refuse(self) -> None:
        """End the attempt: the engine rejected the request as invalid."""
        self.fail(0)

    def hold(self, hold_s: float) -> None:
        """End the attempt: the endpoint is too busy for it, and other endpoints are preferred for
        ``hold_s``."""
        if not self.ended:
            now_s = self._end()
            self.slot.hold(now_s, hold_s)
            self._on_released()

    def end_unjudged(self) -> None:
        """End the attempt: it failed, and it is not known yet whether through the endpoint's fault."""
        if not self.ended:
            self.slot.end_unjudged(self._end())
            self._on_released()

    @property
    def context(self) -> RequestContext:
        """The request."""
        return self._context

    def abandon(self) -> None:
        """End the attempt: its response is no longer needed, because the client left or another attempt was
        faster."""
        if not self.ended:
            self.slot.abandon(self._end())
            self._on_released()

    def _end(self) -> float:
        self.ended = True
        now_s = monotonic()
        self._context.gpu_s += self.upstream.meter.stop(self._meter_reading, now_s)
        if self._watched is not None:
            self._timeouts.discard(self._watched)
        if self._connection is not None:
            self._origin.release(self._connection)
        return now_s


def reported_failure(report: EngineErrorReport, kind: AttemptFailure, headers: Headers) -> UpstreamFailure:
    """The failure of an attempt to which the engine answered with this error. ``kind`` is that of an error
    which is neither the client's nor back-pressure."""
    status = report.status
    text = f"{status}: {report.message}" if status else report.message
    if report.by_client:
        return UpstreamFailure(AttemptFailure.INVALID, report.message, status=status, report=report)
    if status in _KEY_REFUSED:
        return UpstreamFailure(AttemptFailure.SERVER_ERROR, f"{status}: {_KEY_TEXT}")
    if status in BACK_PRESSURE:
        return UpstreamFailure(
            AttemptFailure.BUSY if status == 429 else AttemptFailure.UNAVAILABLE,
            text,
            status=status if status >= 500 else None,
            retry_after_s=retry_after_s(headers, time()),
        )
    return UpstreamFailure(
        kind,
        text,
        status=status if status >= 500 else None,
        # Of an error without a status only its text is known, which may well be about the request.
        report=report if status not in UNREACHABLE and not report.is_no_answer else None,
    )
