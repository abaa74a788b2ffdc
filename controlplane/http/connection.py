"""One client's connection to the HTTP server: parses its requests and handles them in order."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import deque
from collections.abc import Awaitable
from functools import lru_cache
from time import monotonic
from typing import Final, Protocol, cast
from urllib.parse import unquote

import httptools

from controlplane.errors import BadRequest, GatewayExhausted, RequestError, RequestTooSlow, UnknownMethod
from controlplane.http.intake import Intake
from controlplane.http.limits import LARGE_BODY_BYTES, RETRY_AFTER_S, UNSENT_HIGH_BYTES, ServerLimits
from controlplane.http.messages import JSON_TYPE, Request, error_headers, error_value, json_bytes
from controlplane.http.responder import HttpResponder

FIRST_BYTE_S: Final = 0.25
"""While the server drains: how long a new connection may take to send its first byte before it is closed."""
_FEED_BYTES: Final = 16 * 1024
"""So much is parsed at once, outside of a body: it bounds how many pipelined requests are parsed at once."""
_HALF_CLOSED_CHECK_S: Final = 0.05
_TCP_CLOSE: Final = b"\7"
_DECLINED: Final = frozenset({b"connection", b"upgrade", b"http2-settings", b"expect"})
_OF_AN_UPGRADE: Final = frozenset({b"upgrade", b"http2-settings"})
_VERSIONS: Final = ("1.1", "1.0")
_SHORT_TARGET: Final = 128
_REQUEST_LINE: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S+ HTTP/1\.[01]\r\n")


def _target(url: bytes) -> tuple[str, str]:
    """The path, without percent-encoding, and the query of a request's address. Raises
    :class:`httptools.HttpParserInvalidURLError`."""
    parts = httptools.parse_url(url)
    path = (parts.path or b"/").decode("latin-1")
    return unquote(path) if "%" in path else path, (parts.query or b"").decode("latin-1")


_known_target: Final = lru_cache(maxsize=256)(_target)
""":func:`_target` for short addresses: nearly all requests have one of a few."""


class Listening(Protocol):
    """The server that accepts connections."""

    intake: Intake[HttpResponder]
    limits: ServerLimits
    loop: asyncio.AbstractEventLoop
    draining: bool

    def opened(self, connection: ClientConnection) -> None:
        """Takes a new connection in."""
        ...

    def closed(self, connection: ClientConnection) -> None:
        """Forgets a connection."""
        ...


class ClientConnection(asyncio.Protocol):
    """One client's connection. Its requests are handled in order, one at a time."""

    def __init__(self, server: Listening) -> None:
        self._server = server
        self._intake = server.intake
        self._limits = server.limits
        self._loop = server.loop
        self._transport: asyncio.Transport | None = None
        self._handshake: asyncio.Task[None] | None = None
        self._with_tls = False
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._method = ""
        self._version = ""
        self._headers: dict[bytes, bytes] = {}
        self._hosts = 0
        self._head_complete = False
        self._quiet_bytes = 0
        """Bytes since the request began or since the last byte of its body."""
        self._body: bytes | bytearray = b""
        self._body_bytes = 0
        self._length_bytes = 0
        """The length of the body, if the client has stated it."""
        self._held = False
        self._unparsed = b""
        self._ready: deque[tuple[Request, HttpResponder]] = deque()
        self._response: HttpResponder | None = None
        self._task: asyncio.Task[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._rejection: RequestError | None = None
        self._reading_paused = False
        self._half_closed = False
        self._written_bytes = 0
        self._read_bytes = 0
        self._read_s = 0.0
        self.in_request = False
        self.closed = False
        self.last_byte_s = monotonic()
        self._since_s = self.last_byte_s
        """Since when the connection waits for the client: it was opened, the last response ended, or the
        request began that is arriving."""

    # -- called by the listener with TLS ---------------------------------------------------------

    def begin_handshake(self, task: asyncio.Task[None]) -> None:
        """A client has connected, and ``task`` runs its TLS handshake."""
        self._handshake = task
        self._with_tls = True
        self._server.opened(self)

    def end_handshake(self) -> None:
        """The handshake has ended; without success, this was the connection's end, too."""
        self._handshake = None
        if self._transport is None:
            self.closed = True
            self._server.closed(self)

    # -- called by asyncio -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has all methods but not the class
        if self._with_tls:
            self._transport.set_write_buffer_limits(UNSENT_HIGH_BYTES)
        else:
            self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: its handler is cancelled."""
        self.closed = True
        self._server.closed(self)
        self._release()
        self.resume_writing()
        if self._task is not None:
            # Not before its first step: asyncio reports a coroutine that never begins as never awaited.
            self._loop.call_soon(self._task.cancel)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self.last_byte_s = monotonic()
        if self._reading_paused:
            self._unparsed += data
        elif self._rejection is None:
            self._parse(data)

    def eof_received(self) -> bool:
        """The client has closed its sending direction. Directly after a request it may still read the
        response; whether it does shows only when something is sent. Once a response has begun, it counts as
        gone."""
        response = self._response
        if (
            not self.busy
            or self.closed
            or self._rejection is not None
            or response is None
            or response.started
            or self._with_tls  # TLS has no half-closed connections
        ):
            return False
        self._half_closed = True
        if response.chunked:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # a client that is gone answers with a reset
        self._loop.call_later(_HALF_CLOSED_CHECK_S, self.check_half_closed)
        return True

    def pause_writing(self) -> None:
        """The transport holds as many unsent bytes as it should."""
        if self._can_write is None:
            self._can_write = self._loop.create_future()

    def resume_writing(self) -> None:
        """The transport holds few unsent bytes again."""
        waiter, self._can_write = self._can_write, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- parsing ---------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        if len(data) <= _FEED_BYTES:
            self._quiet_bytes += len(data)
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserUpgrade, httptools.HttpParserError) as stopped:
                self._on_stopped(stopped, data)
        else:
            self._feed_in_pieces(data)
        if self._task is not None and self._transport is not None and self._much_is_waiting():
            self._reading_paused = True
            self._transport.pause_reading()
        if self.in_request and self._rejection is None:
            if self._quiet_bytes > self._limits.head_bytes:
                self._reject(BadRequest(f"the request's headers are over {self._limits.head_bytes} bytes"))
            elif self._intake.receiving is not None:
                self._held = True
                self._intake.receiving.hold(self, self._body_bytes + self._quiet_bytes)

    def _much_is_waiting(self) -> bool:
        """Whether the requests behind the one that is being handled have reached their limit."""
        return len(self._ready) >= self._limits.pipelined or self._waiting_bytes() > LARGE_BODY_BYTES

    def _waiting_bytes(self) -> int:
        return self._body_bytes * self.in_request + sum(len(request.body) for request, _ in self._ready)

    def _feed_in_pieces(self, data: bytes) -> None:
        view = memoryview(data)
        start = 0
        while start < len(data) and self._rejection is None:
            if self._task is not None and self._much_is_waiting():
                self._unparsed = bytes(view[start:])
                return
            in_body = self.in_request and self._head_complete
            missing_bytes = self._length_bytes - self._body_bytes if in_body else 0
            end = start + max(_FEED_BYTES, missing_bytes)
            self._feed(view[start:end])
            start = end

    def _feed(self, data: bytes | memoryview) -> None:
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserUpgrade, httptools.HttpParserError) as stopped:
            self._on_stopped(stopped, data)

    def _on_stopped(self, stopped: Exception, data: bytes | memoryview) -> None:
        """The parser has stopped in ``data``, at an offer to upgrade or at an error."""
        while isinstance(stopped, httptools.HttpParserUpgrade):
            if self._rejection is not None:
                return
            self._decline_upgrade()
            data = data[stopped.args[0] :]
            try:
                self._parser.feed_data(data)
                return
            except (httptools.HttpParserUpgrade, httptools.HttpParserError) as error:
                stopped = error
        if isinstance(stopped, httptools.HttpParserCallbackError):
            raise stopped  # a defect of this server, not of the request
        if isinstance(stopped, httptools.HttpParserInvalidMethodError) and _REQUEST_LINE.match(data):
            self._reject(UnknownMethod("this server does not know the request's method"))
        else:
            self._reject(BadRequest(f"not an HTTP/1.1 request: {stopped}"))

    def _decline_upgrade(self) -> None:
        """Ignores an offer to upgrade the protocol. The parser has stopped after the headers as if the offer
        had been accepted, so a new parser reads them again without the offer."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._reject(BadRequest("CONNECT is not supported: this server is not a proxy"))
            return
        lines = [b"%b %b HTTP/%b" % (method, self._url, self._parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, self._headers[name]) for name in self._headers if name not in _DECLINED]
        options = [part.strip() for part in self._headers.get(b"connection", b"").lower().split(b",")]
        kept = b", ".join(option for option in options if option not in _OF_AN_UPGRADE)
        if kept:
            lines.append(b"connection: " + kept)
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    # -- called by llhttp ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self.in_request = True
        self._since_s = self.last_byte_s
        self._url = b""
        self._headers = {}
        self._hosts = 0
        self._head_complete = False
        self._body = b""
        self._body_bytes = self._length_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of its target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or, behind a chunked body, a trailer. Trailers are ignored: nothing that came before
        them may depend on them."""
        if self._head_complete:
            return
        name = name.lower()
        if name == b"host":
            self._hosts += 1
        self._headers[name] = value.rstrip(b" \t")

    def on_headers_complete(self) -> None:
        """The headers are complete, the body follows."""
        self._head_complete = True
        headers, parser = self._headers, self._parser
        self._method = method = parser.get_method().decode("latin-1")
        self._version = version = parser.get_http_version()
        error: RequestError | None = None
        if version not in _VERSIONS:
            error = BadRequest(f"this server speaks HTTP/1.1, not HTTP/{version}")
        elif len(headers) > self._limits.headers:
            error = BadRequest(f"the request has over {self._limits.headers} headers")
        else:
            error = self._intake.refusal(method, headers, self._hosts or version == "1.0")
        if error is not None:
            self._reject(error)
        elif b"content-length" in headers:
            self._length_bytes = int(headers[b"content-length"])  # llhttp takes nothing but digits
        if b"expect" in headers and version == "1.1" and not self.busy:
            self._expect(headers[b"expect"])

    def _expect(self, value: bytes) -> None:
        if value.lower() == b"100-continue" and self._rejection is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._quiet_bytes = 0
        self._body_bytes += len(data)
        if self._rejection is not None:
            return
        if self._body_bytes > self._intake.max_body_bytes:
            self._reject(self._intake.too_large())
        elif not self._body:
            self._body = data
        else:
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += data

    def on_message_complete(self) -> None:
        """The request is complete."""
        self.in_request = False
        self._quiet_bytes = 0
        if self._held:
            self._release()
        parser = self._parser
        if self._rejection is not None or parser.should_upgrade():
            return
        url = self._url
        try:
            path, query = _known_target(url) if len(url) <= _SHORT_TARGET else _target(url)
        except httptools.HttpParserInvalidURLError:
            self._reject(BadRequest("the request's address can't be parsed"))
            return
        headers, body, method = self._headers, self._body, self._method
        request = Request(method, path, query, headers, body if body.__class__ is bytes else bytes(body))
        self._body = b""
        response = HttpResponder(
            self,
            parser.should_keep_alive() and not self._server.draining,
            method == "HEAD",
            self._version != "1.0",
            self._intake.response_headers(headers) if b"origin" in headers else None,
        )
        if self._task is not None:
            self._ready.append((request, response))
            return
        if method == "OPTIONS" or b"content-encoding" in headers or self._body_bytes > LARGE_BODY_BYTES:
            rest = self._intake.handle(request, response)
        else:
            rest = self._intake.handler(request, response)  # all that ``handle`` does with other requests
        if rest is not None or self._can_write is not None:
            self._response = response
            self._task = self._loop.create_task(self._work(response, rest))
        else:
            self._since_s = self.last_byte_s

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
                if self._reading_paused and not self._much_is_waiting():
                    self._resume_reading()
                if self.closed or not self._ready:
                    break
                request, response = self._ready.popleft()
                self._response = response
                rest = self._intake.handle(request, response)
        except Exception:
            self.abort()  # no later request on this connection would get a response
            raise
        finally:
            self._task = None
            self._since_s = monotonic()
        if self._rejection is not None:
            self._send_rejection(self._rejection)
        elif self._reading_paused and not self.closed:
            self._resume_reading()
        elif self._half_closed:
            self.close()

    def _resume_reading(self) -> None:
        self._reading_paused = False
        data, self._unparsed = self._unparsed, b""
        if data:
            self._parse(data)
        if not self._reading_paused and not self.closed and self._transport is not None:
            self._transport.resume_reading()

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than data is written."""
        return self._can_write is not None

    @property
    def busy(self) -> bool:
        """Whether a request is being handled."""
        return self._task is not None

    def write(self, data: bytes) -> None:
        """Sends bytes."""
        if self._transport is not None and not self.closed:
            self._written_bytes += len(data)
            self._transport.write(data)

    async def drain(self) -> None:
        """Waits until the client has read enough for more to be written."""
        if self._can_write is not None:
            await self._can_write

    def close(self) -> None:
        """Closes the connection once everything written has been sent."""
        if self._transport is not None:
            self._transport.close()
        elif self._handshake is not None:
            self._handshake.cancel()

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        elif self._handshake is not None:
            self._handshake.cancel()

    # -- for the server --------------------------------------------------------------------------

    @property
    def unsent_bytes(self) -> int:
        """Bytes that were written and not sent yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def received_bytes(self) -> int:
        """Bytes of the body that is being received."""
        return len(self._body)

    @property
    def waiting_requests(self) -> int:
        """Complete requests that wait for the one before them."""
        return len(self._ready)

    def idle(self, now_s: float) -> bool:
        """Whether no request is being handled or about to arrive: a client that has just connected will send
        one."""
        just_connected = self._url == b"" and now_s - self.last_byte_s < FIRST_BYTE_S
        return not (self.busy or self.in_request or just_connected)

    def waiting_s(self, now_s: float) -> float:
        """How long the connection has waited for its client; below 0 while a request is handled."""
        return -1.0 if self.busy or self.unsent_bytes else now_s - self._since_s

    def enforce(self, now_s: float) -> None:
        """Ends what has exceeded a limit of time."""
        limits = self._limits
        if self._stalled(now_s):
            self.abort()
        elif self.busy:
            self.check_half_closed()
        elif self._rejection is not None:
            return
        elif not self.in_request:
            if now_s - self._since_s > limits.idle_s and not self.unsent_bytes:
                self.close()
        elif not self._head_complete:
            if now_s - self._since_s > limits.head_s:
                self._reject(RequestTooSlow(f"the headers did not arrive within {limits.head_s:g} s"))
        elif now_s - self._since_s > limits.body_s + self._body_bytes / limits.body_bytes_per_s:
            rate = f"{limits.body_s:g} s and then {limits.body_bytes_per_s} bytes a second"
            self._reject(RequestTooSlow(f"the body arrived too slowly: it has {rate}"))

    def check_half_closed(self) -> None:
        """Ends the connection if its client has closed both directions."""
        if not self._half_closed or self.closed or self._transport is None:
            return
        client = self._transport.get_extra_info("socket")
        if client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _TCP_CLOSE:
            self.abort()

    def make_room(self, limit: int) -> None:
        """Ends the connection because there are ``limit`` of them and a new one needs the room."""
        if self.in_request and self._rejection is None:
            self.refuse_for_want_of_room(limit)
        self.close()

    def refuse_for_want_of_room(self, limit: int) -> None:
        """Answers with 503 because there are ``limit`` connections already."""
        if self._transport is None:
            self.abort()
            return
        message = f"the gateway has {limit} connections already, as many as its file descriptors allow"
        self._reject(GatewayExhausted(message, retry_after_s=RETRY_AFTER_S))

    def drop(self, error: RequestError) -> None:
        """Forgets what has arrived of a request and refuses it."""
        self._held = False
        self._reject(error)

    def _stalled(self, now_s: float) -> bool:
        """Whether the client has read too little for too long although there is data for it."""
        unsent_bytes = self.unsent_bytes
        read_bytes = self._written_bytes - unsent_bytes
        if not unsent_bytes or read_bytes - self._read_bytes >= self._limits.stall_bytes or not self._read_s:
            self._read_bytes, self._read_s = read_bytes, now_s
        return now_s - self._read_s > self._limits.stall_s

    def _release(self) -> None:
        if self._held and self._intake.receiving is not None:
            self._held = False
            self._intake.receiving.release(self)

    def _reject(self, error: RequestError) -> None:
        """Responds with an error, after the responses to earlier requests, and closes the connection: it is
        unknown where a malformed request ends and the next one begins."""
        if self._rejection is None:
            self._rejection = error
            self._body = b""
            self._release()
            self._intake.refused(error)
            if not self.busy:
                self._send_rejection(error)

    def _send_rejection(self, error: RequestError) -> None:
        """Closing a connection while its client is sending would reset it, and the response would be lost. So
        this closes only the sending direction (which TLS can't), and discards what arrives for a while."""
        transport = self._transport
        if transport is None or self.closed or transport.is_closing():
            return
        extra = self._intake.response_headers(self._headers)
        response = HttpResponder(self, keep_alive=True, extra=extra)
        headers = [(b"content-type", JSON_TYPE), (b"connection", b"close"), *error_headers(error)]
        response.send(error.status, headers, json_bytes(error_value(error, self._url.decode("latin-1"))))
        if not self._with_tls:
            transport.write_eof()
        self._loop.call_later(self._limits.linger_s, self.abort)
