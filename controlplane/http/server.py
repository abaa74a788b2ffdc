"""The HTTP/1.1 server behind the gateway's own port and the simulated engine.

It is small because the relay's speed depends on it: a request is read completely (up to a size limit) before
its handler runs, each write of a handler becomes one write to the socket, and when a client disconnects, its
handler is cancelled. The parser is llhttp (through httptools). TLS and HTTP/2 are left to a load balancer in
front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from time import monotonic
from typing import Final, cast

import httptools

from controlplane.errors import BadRequest, RequestError
from controlplane.http.messages import (
    JSON_TYPE,
    Headers,
    Request,
    error_headers,
    error_value,
    json_bytes,
    payload_too_large,
)

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_PIPELINED: Final = 16
READ_TIMEOUT_S: Final = 30.0
"""A connection is dropped if no byte of a request that has begun arrives for this long."""
IDLE_TIMEOUT_S: Final = 120.0
"""A connection without a request is dropped after this long."""
STALL_TIMEOUT_S: Final = 60.0
"""A client that reads nothing of its response for this long is dropped."""
LINGER_S: Final = 2.0
"""How long the connection of a rejected request stays open, so that a client that is still sending can read
the error."""
FIRST_BYTE_S: Final = 0.25
"""While the server drains: how long a new connection may take to send its first byte before it is closed."""
BODY_OVERHEAD: Final = 8
"""Upper bound of the bytes on the wire per byte of a chunked body: a chunk of one byte takes six."""
SWEEP_S: Final = 5.0
"""How often connections are checked against these timeouts."""
BACKLOG: Final = 2048

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_UPGRADE: Final = frozenset({b"connection", b"upgrade", b"http2-settings", b"expect"})
_SHORT_CHUNK_BYTES: Final = 4096
_CHUNK_SIZE_LINES: Final = [b"%x\r\n" % size for size in range(_SHORT_CHUNK_BYTES)]


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Unknown\r\n".encode()


class HttpResponder:
    """The :class:`~controlplane.http.messages.Responder` of one request on this server."""

    __slots__ = ("_chunked", "_connection", "_head_only", "_keep_alive", "finished", "started")

    def __init__(
        self, connection: _ClientConnection, *, keep_alive: bool, head_only: bool, chunked: bool
    ) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self._head_only = head_only
        self._chunked = chunked
        self.started = False
        self.finished = False

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected; then writes are discarded."""
        return self._connection.closed

    def _head(self, status: int, headers: Headers) -> list[bytes]:
        parts = [_status_line(status)]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        return parts

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a complete response."""
        self.started = True
        parts = self._head(status, headers)
        parts.append(b"content-length: %d\r\n\r\n" % len(body))
        if not self._head_only:
            parts.append(body)
        self._connection.write(b"".join(parts))
        self._end()

    def start(self, status: int, headers: Headers) -> None:
        """Begins a response of unknown length."""
        self.started = True
        if not self._chunked:
            self._keep_alive = False  # an HTTP/1.0 client reads the body until the connection ends
        parts = self._head(status, headers)
        parts.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._connection.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        """Sends a piece of the body."""
        if not data or self._head_only:
            return
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def write_chunks(self, pieces: Iterable[bytes], *, finish: bool = False) -> None:
        """Sends several pieces of the body, none of them empty, in one write; each is one HTTP chunk.

        With ``finish``, the body is complete.
        """
        if not self._chunked or self._head_only:
            self.write(b"".join(pieces))
            if finish:
                self.finish()
            return
        lines, short = _CHUNK_SIZE_LINES, _SHORT_CHUNK_BYTES
        chunks = [
            (lines[size] if (size := len(piece)) < short else b"%x\r\n" % size) + piece for piece in pieces
        ]
        chunks.append(b"0\r\n\r\n" if finish else b"")
        self._connection.write(b"\r\n".join(chunks))
        if finish:
            self._end()

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than data is written."""
        return self._connection.congested

    async def drain(self) -> None:
        """Waits until the client has read enough for more to be written."""
        await self._connection.drain()

    def finish(self) -> None:
        """Marks the body as complete."""
        if self.finished:
            return
        if self._chunked and not self._head_only:
            self._connection.write(b"0\r\n\r\n")
        self._end()

    def abort(self) -> None:
        """Aborts the response at once; the client sees that it is incomplete."""
        self.finished = True
        self._connection.abort()

    def truncate(self) -> None:
        """Sends what was written, then closes the connection without marking the body as complete."""
        self.finished = True
        self._connection.close()

    def owns(self, connection: _ClientConnection) -> bool:
        """Whether this response goes out on that connection."""
        return self._connection is connection

    def _end(self) -> None:
        self.finished = True
        if not self._keep_alive:
            self._connection.close()


class _ClientConnection(asyncio.Protocol):
    """One client's connection. Its requests are handled in order, one at a time."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = server.loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._raw_bytes = 0
        self._chunks: list[bytes] = []
        self._body_bytes = 0
        self._ready: list[tuple[Request, HttpResponder]] = []
        self._task: asyncio.Task[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._rejection: RequestError | None = None
        self._reading_paused = False
        self._written_bytes = 0
        self._read_bytes = 0
        self._read_s = 0.0
        self.in_request = False
        self.closed = False
        self.last_byte_s = monotonic()

    # -- called by asyncio -----------------------------------------------------------------------

    def idle(self, now_s: float) -> bool:
        """Whether no request is being handled or about to arrive: a client that has just connected will send
        one."""
        just_connected = self._raw_bytes == 0 and now_s - self.last_byte_s < FIRST_BYTE_S
        return not (self.busy or self.in_request or just_connected)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has all methods but not the class
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._server.connections.discard(self)
        self.resume_writing()
        if self._task is not None:
            # Only after its first step: a coroutine that never begins is reported as never awaited.
            self._loop.call_soon(self._task.cancel)

    def data_received(self, data: bytes) -> None:
        self.last_byte_s = monotonic()
        if self._rejection is not None:
            return
        self._raw_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserCallbackError:
            raise  # a defect of this server, not of the request
        except httptools.HttpParserError as error:
            self._reject(BadRequest(f"not an HTTP/1.1 request: {error}"))
        if self.in_request and self._raw_bytes > MAX_HEAD_BYTES + BODY_OVERHEAD * self._body_bytes:
            self._reject(BadRequest(f"the request's headers are over {MAX_HEAD_BYTES} bytes"))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Ignores an offer to upgrade the protocol. The parser has stopped after the headers as if the offer
        had been accepted, so a new parser reads the request again without the offer."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._reject(BadRequest("CONNECT is not supported: this server is not a proxy"))
            return
        lines = [b"%b %b HTTP/1.1" % (method, self._url)]
        lines += [b"%b: %b" % (name, self._headers[name]) for name in self._headers if name not in _UPGRADE]
        if b"close" in self._headers.get(b"connection", b"").lower():
            lines.append(b"connection: close")
        self._parser = httptools.HttpRequestParser(self)
        self._raw_bytes = 0
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def pause_writing(self) -> None:
        if self._can_write is None:
            self._can_write = self._loop.create_future()

    def resume_writing(self) -> None:
        waiter, self._can_write = self._can_write, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- called by llhttp ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.in_request = True
        self._url = b""
        self._headers = {}
        self._chunks = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        length = self._headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._server.max_body_bytes:
            self._too_large()
        elif self._headers.get(b"expect", b"").lower() == b"100-continue" and not self.busy:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._server.max_body_bytes:
            self._too_large()
        elif self._rejection is None:
            self._chunks.append(data)

    def on_message_complete(self) -> None:
        self.in_request = False
        self._raw_bytes = 0
        parser = self._parser
        if self._rejection is not None or parser.should_upgrade():
            return
        try:
            url = httptools.parse_url(self._url)
        except httptools.HttpParserInvalidURLError:
            self._reject(BadRequest("the request's address can't be parsed"))
            return
        method = parser.get_method().decode("latin-1")
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        request = Request(
            method,
            (url.path or b"/").decode("latin-1"),
            (url.query or b"").decode("latin-1"),
            self._headers,
            body,
        )
        response = HttpResponder(
            self,
            keep_alive=parser.should_keep_alive() and not self._server.draining,
            head_only=method == "HEAD",
            chunked=parser.get_http_version() != "1.0",
        )
        if self._task is None:
            rest = self._server.handler(request, response)
            if rest is not None or self.congested:
                self._task = self._loop.create_task(self._work(response, rest))
            return
        self._ready.append((request, response))
        if len(self._ready) >= MAX_PIPELINED and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    # -- for handlers ----------------------------------------------------------------------------

    async def _work(self, response: HttpResponder, rest: Awaitable[None] | None) -> None:
        """Finishes a response, then handles in order the requests that have arrived meanwhile. Returns when
        none is left, because an idle connection needs no task."""
        try:
            while True:
                if rest is not None:
                    await rest
                if not response.finished:
                    response.abort()
                if self.congested:
                    await self.drain()
                if self._reading_paused and self._transport is not None and not self.closed:
                    self._reading_paused = False
                    self._transport.resume_reading()
                if self.closed or not self._ready:
                    break
                request, response = self._ready.pop(0)
                rest = self._server.handler(request, response)
        except Exception:
            self.abort()  # no later request on this connection would get a response
            raise
        finally:
            self._task = None
        if self._rejection is not None:
            self._send_rejection(self._rejection)

    @property
    def congested(self) -> bool:
        return self._can_write is not None

    def stalled(self, now_s: float) -> bool:
        """Whether the client has read nothing for too long although there is data for it."""
        unsent_bytes = self._transport.get_write_buffer_size() if self._transport is not None else 0
        read_bytes = self._written_bytes - unsent_bytes
        if not unsent_bytes or read_bytes != self._read_bytes or not self._read_s:
            self._read_bytes, self._read_s = read_bytes, now_s
            self.last_byte_s = max(self.last_byte_s, now_s if unsent_bytes else 0.0)
        return now_s - self._read_s > STALL_TIMEOUT_S

    @property
    def busy(self) -> bool:
        return self._task is not None

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self.closed:
            self._written_bytes += len(data)
            self._transport.write(data)

    async def drain(self) -> None:
        if self._can_write is not None:
            await self._can_write

    @property
    def unsent(self) -> bool:
        """Whether some written data has not been sent yet."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def close(self) -> None:
        """Closes the connection once everything written has been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _too_large(self) -> None:
        server = self._server
        self._reject(payload_too_large(server.max_body_bytes, server.body_limit_setting))

    def _reject(self, error: RequestError) -> None:
        """Responds with an error, after the responses to earlier requests, and closes the connection: it is
        unknown where a malformed request ends and the next one begins."""
        if self._rejection is None:
            self._rejection = error
            self._chunks = []
            if not self.busy:
                self._send_rejection(error)

    def _send_rejection(self, error: RequestError) -> None:
        """Closing a connection while its client is sending would reset it, and the response would be lost. So
        this closes only the sending direction, and discards what arrives for a while."""
        transport = self._transport
        if transport is None or self.closed or transport.is_closing():
            return
        response = HttpResponder(self, keep_alive=True, head_only=False, chunked=True)
        headers = [(b"content-type", JSON_TYPE), (b"connection", b"close"), *error_headers(error)]
        response.send(error.status, headers, json_bytes(error_value(error, self._url.decode("latin-1"))))
        transport.write_eof()
        self._loop.call_later(LINGER_S, self.abort)


class HttpServer:
    """Listens on one address in the running event loop and calls ``handler`` with each request.

    ``handler`` returns None if it has sent the response, otherwise an awaitable that sends the rest, which
    runs in a task. A body over ``max_body_bytes`` is rejected with 413; ``body_limit_setting`` names that
    limit's setting, if it has one. With ``share_port``, other processes of the same user may also listen on
    the port.
    """

    def __init__(
        self,
        handler: Callable[[Request, HttpResponder], Awaitable[None] | None],
        *,
        max_body_bytes: int,
        body_limit_setting: str = "",
        share_port: bool = True,
    ) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.body_limit_setting = body_limit_setting
        self._share_port = share_port
        self.connections: set[_ClientConnection] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Starts listening and returns the port. Raises OSError if the address is not available."""
        self._listener = listener = _listener(host, port, share_port=self._share_port)
        self._server = await self.loop.create_server(
            lambda: _ClientConnection(self), sock=listener, backlog=BACKLOG
        )
        if self._sweeper is None:
            self._sweeper = self.loop.create_task(self._sweep())
        return int(listener.getsockname()[1])

    def stop_listening(self) -> None:
        """Refuses new connections from now on; :meth:`start` accepts them again."""
        if self._server is not None:
            self._server.close()

    def abort_connections(self, spare: HttpResponder | None = None) -> None:
        """Resets all connections, except the one on which ``spare`` goes out."""
        for connection in list(self.connections):
            if spare is None or not spare.owns(connection):
                connection.abort()

    async def drain(self, timeout_s: float) -> None:
        """Accepts no new connections, lets running requests finish (up to ``timeout_s``), then closes all
        connections."""
        self.draining = True
        if self._server is not None:
            await self._accept_backlog()
            self._server.close()
        now_s = monotonic()
        deadline_s = now_s + timeout_s
        while now_s < deadline_s:
            for connection in list(self.connections):
                if connection.idle(now_s):
                    connection.close()
            if all(connection.idle(now_s) and not connection.unsent for connection in self.connections):
                break
            await asyncio.sleep(0.05)
            now_s = monotonic()
        self.abort_connections()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def _accept_backlog(self) -> None:
        """Accepts the connections that the kernel has already queued for this listener. Closing the listener
        would reset them, even while another replica listens on the same port."""
        listener = self._listener
        while listener is not None:
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, OSError):
                return
            accepted.setblocking(False)
            await self.loop.connect_accepted_socket(lambda: _ClientConnection(self), accepted)

    async def _sweep(self) -> None:
        """Drops the connections that have exceeded a timeout."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = monotonic()
            for connection in list(self.connections):
                limit_s = READ_TIMEOUT_S if connection.in_request else IDLE_TIMEOUT_S
                stalled = connection.stalled(now_s)
                if stalled or (not connection.busy and now_s - connection.last_byte_s > limit_s):
                    connection.abort()


def _listener(host: str, port: int, *, share_port: bool) -> socket.socket:
    """A bound socket. ``share_port`` lets other replicas on this node bind the same port (SO_REUSEPORT)."""
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
