"""An HTTP/1.1 server of our own: straight from the event loop to the handlers.

This is the fast way in. It does what the relay needs and no more: requests are read whole (bounded),
answers go out in as few writes as they come in, a client that leaves cancels its handler. Parsing is
llhttp's (through httptools). TLS and HTTP/2 are a load balancer's job in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from http import HTTPStatus
from time import monotonic
from typing import Any, Final

import httptools

from controlplane.errors import BadRequest, PayloadTooLarge, RequestError
from controlplane.http.messages import (
    JSON_TYPE,
    Handler,
    Headers,
    Request,
    error_headers,
    error_value,
    json_bytes,
)

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_PIPELINED: Final = 16
READ_TIMEOUT_S: Final = 30.0
"""A request that has begun must be whole after this long without a byte."""
IDLE_TIMEOUT_S: Final = 120.0
STALL_TIMEOUT_S: Final = 60.0
"""A client that takes nothing of its answer for this long is dropped."""
LINGER_S: Final = 2.0
"""How long a client whose request was refused may go on sending, so that it gets to read why."""
FIRST_BYTE_S: Final = 0.25
"""How long a connection on which nothing came yet is kept open by a server that drains."""
BODY_OVERHEAD: Final = 8
"""Bytes on the wire per byte of a chunked body: one-byte chunks have six."""
SWEEP_S: Final = 5.0
BACKLOG: Final = 2048

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_UPGRADE: Final = frozenset({b"connection", b"upgrade", b"http2-settings", b"expect"})


def _status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Unknown\r\n".encode()


class _HttpResponder:
    """The :class:`~controlplane.http.messages.Responder` of one request on this port."""

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
        return self._connection.closed

    def _head(self, status: int, headers: Headers) -> list[bytes]:
        parts = [_status_line(status)]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        return parts

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.started = True
        parts = self._head(status, headers)
        parts.append(b"content-length: %d\r\n\r\n" % len(body))
        if not self._head_only:
            parts.append(body)
        self._connection.write(b"".join(parts))
        self._end()

    def start(self, status: int, headers: Headers) -> None:
        self.started = True
        if not self._chunked:
            self._keep_alive = False  # an HTTP/1.0 client learns the end from the connection's end
        parts = self._head(status, headers)
        parts.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._connection.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        if not data or self._head_only:
            return
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    @property
    def congested(self) -> bool:
        return self._connection.congested

    async def drain(self) -> None:
        await self._connection.drain()

    def finish(self) -> None:
        if self.finished:
            return
        if self._chunked and not self._head_only:
            self._connection.write(b"0\r\n\r\n")
        self._end()

    def abort(self) -> None:
        self.finished = True
        self._connection.abort()

    def _end(self) -> None:
        self.finished = True
        if not self._keep_alive:
            self._connection.close()


class _ClientConnection(asyncio.Protocol):
    """One client's connection: requests one after the other, each handled in a task of its own."""

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
        self._ready: list[tuple[Request, _HttpResponder]] = []
        self._task: asyncio.Task[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._refusal: RequestError | None = None
        self._reading_paused = False
        self._written_bytes = 0
        self._taken_bytes = 0
        self._taken_s = 0.0
        self.in_request = False
        self.closed = False
        self.last_byte_s = monotonic()

    # -- asyncio's side --------------------------------------------------------------------------

    def idle(self, now_s: float) -> bool:
        """Nothing is asked, and nothing is likely to be on its way: a client that has just connected is about
        to ask."""
        just = self._raw_bytes == 0 and now_s - self.last_byte_s < FIRST_BYTE_S
        return not (self.busy or self.in_request or just)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # TCP transports are asyncio.Transport
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._server.connections.discard(self)
        self._resume_writer()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self.last_byte_s = monotonic()
        if self._refusal is not None:
            return
        self._raw_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._refuse(BadRequest(f"not an HTTP/1.1 request: {error}"))
        if self.in_request and self._raw_bytes > MAX_HEAD_BYTES + BODY_OVERHEAD * self._body_bytes:
            self._refuse(BadRequest(f"the request's headers are over {MAX_HEAD_BYTES} bytes"))

    def _decline_upgrade(self, rest: bytes) -> None:
        """An upgrade is an offer that may be passed over. The parser has stopped behind the head as if it
        had been taken up, so the request is read once more without it."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(BadRequest("this port is no proxy"))
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
        self._resume_writer()

    def _resume_writer(self) -> None:
        waiter, self._can_write = self._can_write, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- llhttp's side ---------------------------------------------------------------------------

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
        elif self._refusal is None:
            self._chunks.append(data)

    def on_message_complete(self) -> None:
        self.in_request = False
        self._raw_bytes = 0
        parser = self._parser
        if self._refusal is not None or parser.should_upgrade():
            return
        try:
            url = httptools.parse_url(self._url)
        except httptools.HttpParserInvalidURLError:
            self._refuse(BadRequest("the request's address can't be parsed"))
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
        answer = _HttpResponder(
            self,
            keep_alive=parser.should_keep_alive() and not self._server.draining,
            head_only=method == "HEAD",
            chunked=parser.get_http_version() != "1.0",
        )
        self._ready.append((request, answer))
        if self._task is None:
            self._task = self._loop.create_task(self._work())
        elif len(self._ready) >= MAX_PIPELINED and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    # -- the handlers' side ----------------------------------------------------------------------

    async def _work(self) -> None:
        """Answer what has come, in order; ends when nothing is left, so that an idle connection costs
        no task."""
        try:
            while self._ready and not self.closed:
                request, answer = self._ready.pop(0)
                await self._server.handler(request, answer)
                if not answer.finished:
                    answer.abort()
                if self.congested:
                    await self.drain()
                if self._reading_paused and self._transport is not None and not self.closed:
                    self._reading_paused = False
                    self._transport.resume_reading()
        except Exception:
            self.abort()  # nobody answers any more
            raise
        finally:
            self._task = None
        if self._refusal is not None:
            self._send_refusal(self._refusal)

    @property
    def congested(self) -> bool:
        return self._can_write is not None

    def stalled(self, now_s: float) -> bool:
        """The client has taken nothing for long of what it is sent."""
        unsent_bytes = self._transport.get_write_buffer_size() if self._transport is not None else 0
        taken_bytes = self._written_bytes - unsent_bytes
        if not unsent_bytes or taken_bytes != self._taken_bytes or not self._taken_s:
            self._taken_bytes, self._taken_s = taken_bytes, now_s
            self.last_byte_s = max(self.last_byte_s, now_s if unsent_bytes else 0.0)
        return now_s - self._taken_s > STALL_TIMEOUT_S

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
        """Not all that was written has gone out."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def close(self) -> None:
        """Close once what was written has gone out."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _too_large(self) -> None:
        limit = self._server.max_body_bytes
        self._refuse(PayloadTooLarge(f"the body is over {limit} bytes (gateway.max_body_bytes)"))

    def _refuse(self, error: RequestError) -> None:
        """Answer a request that can't be taken, after those before it, and close: what follows can't be
        told apart from it."""
        if self._refusal is None:
            self._refusal = error
            self._chunks = []
            if not self.busy:
                self._send_refusal(error)

    def _send_refusal(self, error: RequestError) -> None:
        """A connection that is closed while the client sends is reset, and the answer lost: so close our
        side only, and take what comes for a while."""
        transport = self._transport
        if transport is None or self.closed or transport.is_closing():
            return
        answer = _HttpResponder(self, keep_alive=True, head_only=False, chunked=True)
        headers = [(b"content-type", JSON_TYPE), (b"connection", b"close"), *error_headers(error)]
        answer.send(error.status, headers, json_bytes(error_value(error)))
        transport.write_eof()
        self._loop.call_later(LINGER_S, self.abort)


class HttpServer:
    """Listens on one address in the running event loop and hands requests to ``handler``."""

    def __init__(self, handler: Handler, *, max_body_bytes: int) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.connections: set[_ClientConnection] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._on_empty: Callable[[], Any] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; gives the port. Raises OSError if the address can't be had."""
        self._listener = listener = _listener(host, port)
        self._server = await self.loop.create_server(
            lambda: _ClientConnection(self), sock=listener, backlog=BACKLOG
        )
        self._sweeper = self.loop.create_task(self._sweep())
        return int(listener.getsockname()[1])

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections, let running requests end (up to ``timeout_s``), then close."""
        self.draining = True
        if self._server is not None:
            await self._take_waiting()
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
        for connection in list(self.connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def _take_waiting(self) -> None:
        """Accept what the kernel has connected to this listener already: closing it would reset those
        clients, though another replica listens on the same port."""
        listener = self._listener
        while listener is not None:
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, OSError):
                return
            accepted.setblocking(False)
            await self.loop.connect_accepted_socket(lambda: _ClientConnection(self), accepted)

    async def _sweep(self) -> None:
        """Close connections that stopped in the middle of a request or idle for long."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = monotonic()
            for connection in list(self.connections):
                limit_s = READ_TIMEOUT_S if connection.in_request else IDLE_TIMEOUT_S
                stalled = connection.stalled(now_s)
                if stalled or (not connection.busy and now_s - connection.last_byte_s > limit_s):
                    connection.abort()


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket that other gateway replicas of this node may share (SO_REUSEPORT)."""
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
