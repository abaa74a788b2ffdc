"""One attempt of a request at one endpoint: its slot, its connection, its time-outs, its GPU time.

An attempt ends once, by :meth:`Attempt.succeed`, :meth:`Attempt.fail` or :meth:`Attempt.abandon`, which
release its slot and its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Final

from controlplane.core.routing.endpoint_table import EndpointLoad, RequestSlot
from controlplane.core.routing.retry import AttemptFailure
from controlplane.gateway.proxy.connections import EndpointConnections
from controlplane.gateway.proxy.timeouts import TimeoutWatcher, WatchedAttempt
from controlplane.gateway.proxy.upstream import UpstreamConnection, UpstreamFailure, UpstreamOrigin
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import EVENT_STREAM, Responder
from controlplane.http.redirects import MAX_REDIRECTS
from controlplane.http.sse import events_end

MAX_ERROR_BYTES: Final = 64 * 1024

_STATUS_FAILURES: Final = {429: AttemptFailure.BUSY, 503: AttemptFailure.UNAVAILABLE}
_KEY_REFUSED: Final = frozenset({401, 403})
"""With these statuses an engine rejects the gateway's key, which is not the client's fault."""


class Attempt:
    """One attempt; the caller has already taken ``slot`` for it."""

    __slots__ = (
        "_connection", "_context", "_meter_reading", "_on_released", "_origin", "_timeouts", "_watched",
        "content_type", "data", "ended", "ids_added", "load", "slot", "status", "streaming", "upstream",
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
        status = await self._post(path, body)
        if status >= 500 or status == 429 or status in _KEY_REFUSED:
            response = await self.read_all(MAX_ERROR_BYTES)
            kind = _STATUS_FAILURES.get(status, AttemptFailure.SERVER_ERROR)
            reason = (
                "the engine does not accept the gateway's key"
                if status in _KEY_REFUSED
                else error_text(response)
            )
            raise UpstreamFailure(kind, f"{status}: {reason}", status=status if status >= 500 else None)

    async def _post(self, path: str, body: bytes) -> int:
        """Send the request and return the status of the response.

        A keep-alive connection that turns out to be closed is replaced once, because the engine did not fail.
        """
        origin = self.upstream.origin
        request = origin.request("POST", path, self._context.identity, body)
        status = await self._exchange(origin, request)
        if 300 <= status < 400:
            status = await self._follow_redirects(path, body)
        self.status = status
        for name, value in self.connection.headers:
            if name == b"content-type":
                self.content_type = value
                self.streaming = value.startswith(EVENT_STREAM) and status < 400
        return status

    async def _exchange(self, origin: UpstreamOrigin, request: bytes) -> int:
        """Send the request over a connection of ``origin`` and return the status of the response."""
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

    async def _head(self, origin: UpstreamOrigin, connection: UpstreamConnection, request: bytes) -> int:
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

    async def first_event(self) -> None:
        """Read into :attr:`data` until the stream's first event is complete."""
        data = await self.connection.read()
        while data and not events_end(data):
            more = await self.connection.read()
            if not more:
                break
            data += more
        if not data:
            raise UpstreamFailure(AttemptFailure.TRUNCATED, "the stream ended before its first event")
        self.data = data

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body. Raises :class:`UpstreamFailure` if it is larger than ``limit_bytes``."""
        connection = self.connection
        data = await connection.read()
        if connection.complete and not connection.pending:
            return data
        parts = [data]
        size = len(data)
        while data:
            data = await connection.read()
            parts.append(data)
            size += len(data)
            if size > limit_bytes:
                raise UpstreamFailure(
                    AttemptFailure.SERVER_ERROR, f"the engine's response is over {limit_bytes} bytes"
                )
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


def error_text(response: bytes) -> str:
    """The beginning of an engine's error response, for messages."""
    return response[:300].decode("utf-8", "replace").strip()
