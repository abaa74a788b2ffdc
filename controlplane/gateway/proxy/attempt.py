"""One attempt of a call at one endpoint: its place there, its connection, its time-outs, its price.

However it ends (:meth:`succeed`, :meth:`fail`, :meth:`abandon`), it ends once and gives everything back.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from controlplane.core.routing.endpoint_table import EndpointLoad, RequestSlot
from controlplane.core.routing.retry import AttemptFailure
from controlplane.gateway.proxy.connections import EndpointConnections
from controlplane.gateway.proxy.request_context import RequestContext
from controlplane.gateway.proxy.timeouts import TimeoutWatcher, WatchedAttempt
from controlplane.gateway.proxy.upstream import UpstreamConnection, UpstreamFailure
from controlplane.http.messages import EVENT_STREAM
from controlplane.http.sse import events_end


class Attempt:
    """Begun when its slot was taken."""

    __slots__ = (
        "_connection",
        "_context",
        "_pump",
        "_reading",
        "_watch",
        "_watcher",
        "content_type",
        "data",
        "ended",
        "ids_added",
        "load",
        "site",
        "slot",
        "status",
        "streaming",
    )

    def __init__(
        self,
        context: RequestContext,
        slot: RequestSlot,
        site: EndpointConnections,
        watcher: TimeoutWatcher,
        pump: Callable[[], None],
    ) -> None:
        self._context = context
        self._pump = pump
        self._watcher = watcher
        self._watch: WatchedAttempt | None = None
        self._connection: UpstreamConnection | None = None
        self._reading = site.meter.start(monotonic())
        self.slot = slot
        self.load: EndpointLoad = slot.load
        self.site = site
        self.status = 0
        self.content_type = b""
        self.streaming = False
        self.data = b""
        """The answer's first events, or all of it."""
        self.ids_added = False
        """The engine was asked for token ids that the client did not ask for."""
        self.ended = False

    @property
    def connection(self) -> UpstreamConnection:
        """The connection, once :meth:`post` was called."""
        if self._connection is None:
            raise RuntimeError("nothing was sent yet")
        return self._connection

    async def post(self, path: str, identity: str, body: bytes) -> int:
        """Send a request and wait for the head of its answer; gives the status.

        A kept-alive connection that turns out to be closed is replaced once, unnoticed.
        """
        origin = self.site.origin
        request = origin.request("POST", path, identity, body)
        deadline_s = self._context.deadline_s
        connection = await origin.acquire(deadline_s=deadline_s)
        try:
            status = await self._head(connection, request)
        except UpstreamFailure as failure:
            if not failure.stale:
                raise
            connection = await origin.acquire(fresh=True, deadline_s=deadline_s)
            status = await self._head(connection, request)
        self.status = status
        for name, value in connection.headers:
            if name == b"content-type":
                self.content_type = value
                self.streaming = value.startswith(EVENT_STREAM) and status < 400
        return status

    async def _head(self, connection: UpstreamConnection, request: bytes) -> int:
        if self._watch is not None:
            self._watcher.discard(self._watch)
        self._connection = connection
        connection.send(request)
        self._watch = WatchedAttempt(
            connection,
            self.slot,
            deadline_s=self._context.deadline_s,
            started_s=monotonic(),
            streaming=self._context.stream,
            attempt=self._context.attempts,
        )
        self._watcher.add(self._watch)
        return await connection.head()

    async def first_event(self) -> None:
        """Wait until the stream's first event is whole."""
        data = await self.connection.read()
        while data and not events_end(data):
            more = await self.connection.read()
            if not more:
                break
            data += more
        if not data:
            raise UpstreamFailure(AttemptFailure.CUT, "the stream ended before its first event")
        self.data = data

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body; an answer over ``limit_bytes`` is a failure."""
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
                raise UpstreamFailure(AttemptFailure.SERVER_ERROR, f"the answer is over {limit_bytes} bytes")
        return b"".join(parts)

    def answered(self) -> None:
        """The first token came."""
        if self._watch is not None and not self._watch.answered:
            self._watch.answered = True
            self.slot.first_token(monotonic())

    def hold(self) -> None:
        """The client takes nothing more for the moment: what the engine does meanwhile says nothing."""
        if self._watch is not None:
            self._watch.held = True

    def go_on(self) -> None:
        """The client takes again."""
        if self._watch is not None:
            self._watch.held = False
            self._watch.started_s = monotonic()

    def succeed(self) -> None:
        """The answer is whole."""
        if not self.ended:
            self.slot.succeed(self._end())
            self._pump()

    def fail(self, weight: int) -> None:
        """The endpoint failed it; ``weight`` as in :meth:`RequestSlot.fail`."""
        if not self.ended:
            self.slot.fail(self._end(), weight)
            self._pump()

    def abandon(self) -> None:
        """The client left, or another exchange was faster."""
        if not self.ended:
            self.slot.abandon(self._end())
            self._pump()

    def _end(self) -> float:
        self.ended = True
        now_s = monotonic()
        self._context.gpu_s += self.site.meter.stop(self._reading, now_s)
        if self._watch is not None:
            self._watcher.discard(self._watch)
        if self._connection is not None:
            self.site.origin.release(self._connection)
        return now_s
