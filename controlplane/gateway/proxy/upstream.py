"""A minimal HTTP/1.1 client for engines: keep-alive connections that carry one request at a time.

A general HTTP client takes longer per request than the rest of the relay. This one supports only what engines
need (``POST`` with a response of JSON or a stream of events). llhttp parses the responses (through
httptools)."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from collections import deque
from math import inf
from time import monotonic
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from controlplane.core.routing.retry import AttemptFailure
from controlplane.errors import EngineError
from controlplane.gateway.proxy.engine_errors import EngineErrorReport
from controlplane.http.decoding import Decoder, is_decodable
from controlplane.http.redirects import redirect_target, shown_location

HIGH_WATER_BYTES: Final = 256 * 1024
"""Unread bytes of one response at which reading from the engine pauses."""
MAX_HEAD_BYTES: Final = 64 * 1024
"""The largest status line and headers of a response, interim responses included; and the largest part of a
response, once its body has begun, that is not body (chunk extensions, trailers)."""
MAX_IDLE_PER_ENDPOINT: Final = 256
JOINED_BYTES: Final = 64 * 1024
"""A request with a longer body is sent in two pieces, so that the body is not copied."""
_OWN_ERRORS: Final = frozenset({
    errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM,
})  # fmt: skip
"""Why no socket could be made or bound: the gateway's own trouble, not the engine's."""
_OWN_LOOKUP_ERRORS: Final = frozenset({socket.EAI_MEMORY, socket.EAI_SYSTEM})


_CODINGS: Final = frozenset({b"content-encoding", b"transfer-encoding"})


WireRequest = bytes | tuple[bytes, bytes]
"""The bytes of a whole request, in one piece or as head and body."""


class UpstreamFailure(EngineError):
    """A request to an engine failed: its response was incomplete, or had a status that counts as a failure.

    ``kind`` is None if only the request's deadline passed. ``stale`` means that a keep-alive connection
    turned out to be closed, which says nothing about the engine. ``status`` is the status for the client,
    None if the engine gave none. ``report`` is the error that the engine reported, if the request itself may
    be to blame for it; ``retry_after_s`` says when the engine wants to be asked again, if it did say."""

    def __init__(
        self,
        kind: AttemptFailure | None,
        detail: str,
        *,
        stale: bool = False,
        status: int | None = None,
        report: EngineErrorReport | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{kind or 'deadline'}: {detail}")
        self.kind = kind
        self.detail = detail
        self.stale = stale
        self.status = status
        self.report = report
        self.retry_after_s = retry_after_s


class UpstreamConnection(asyncio.Protocol):
    """One TCP connection to an engine; carries one request at a time.

    For each request: :meth:`send`, ``await`` :meth:`head`, ``await`` :meth:`read` until it returns ``b""``.
    After that, the connection can carry another request if it is :attr:`reusable`.
    """

    __slots__ = (
        "_body", "_buffered_bytes", "_complete", "_decoder", "_failure", "_head_bytes", "_head_done",
        "_keep_alive", "_other_bytes", "_parser", "_paused", "_transport", "_unsupported", "_waiter",
        "closed", "headers", "last_byte_s", "loop", "requests_sent", "status",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.closed = False
        self.requests_sent = 0
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.last_byte_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._body: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._head_bytes = 0
        self._other_bytes = 0
        self._head_done = False
        self._complete = False
        self._decoder: Decoder | None = None
        self._unsupported = ""
        self._keep_alive = False
        self._paused = False
        self._failure: UpstreamFailure | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- the relay's side ------------------------------------------------------------------------

    def send(self, request: WireRequest) -> None:
        """Send the bytes of a whole request."""
        transport = self._transport
        if transport is None or self.closed:
            raise UpstreamFailure(AttemptFailure.RESET, "the connection is closed", stale=True)
        self.requests_sent += 1
        self.status = 0
        self.headers = []
        self._body.clear()
        self._buffered_bytes = self._head_bytes = self._other_bytes = 0
        self._head_done = self._complete = False
        self._decoder = None
        self._unsupported = ""
        self._failure = None
        self._parser = httptools.HttpResponseParser(self)
        if isinstance(request, tuple):
            transport.writelines(request)
        else:
            transport.write(request)

    async def head(self) -> int:
        """Wait for the response's status and headers; returns the status."""
        while not self._head_done:
            if self._failure is not None:
                raise self._failure
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """All body bytes received since the last call, decoded; waits if there are none. ``b""`` once the
        response is complete."""
        decoder = self._decoder
        while True:
            if decoder is not None and decoder.pending:
                await asyncio.sleep(0)
                if data := self._decoded(decoder, b""):
                    return data
                continue
            while not self._body:
                if self._failure is not None:
                    raise self._failure
                if self._complete:
                    if decoder is not None and not decoder.complete:
                        raise UpstreamFailure(AttemptFailure.TRUNCATED, "the compressed response is cut off")
                    return b""
                await self._wait()
            body = self._body
            data = body.popleft() if len(body) == 1 else b"".join(body)
            body.clear()
            self._buffered_bytes = 0
            if self._paused and self._transport is not None:
                self._paused = False
                self._transport.resume_reading()
            if decoder is None or (data := self._decoded(decoder, data)):
                return data

    def unread(self, data: bytes) -> None:
        """Make :meth:`read` return a complete body once more."""
        self._decoder = None
        if data:
            self._body.append(data)

    def _decoded(self, decoder: Decoder, data: bytes) -> bytes:
        try:
            return decoder.feed(data)
        except ValueError as error:
            self.close()
            detail = f"the engine's compressed response can't be decoded: {error}"
            raise UpstreamFailure(AttemptFailure.SERVER_ERROR, detail) from None

    def fail(self, kind: AttemptFailure | None, detail: str) -> None:
        """End the request from outside (a time-out) and close the connection."""
        if self._failure is None and not self._complete:
            self._failure = UpstreamFailure(kind, detail)
        self.close()
        self._wake()

    @property
    def complete(self) -> bool:
        """The whole response was received."""
        return self._complete

    @property
    def pending(self) -> bool:
        """:meth:`read` still has something to return: body bytes, or that a compressed body is cut off."""
        return bool(self._body) or (self._decoder is not None and not self._decoder.complete)

    @property
    def reusable(self) -> bool:
        """The last response is complete, its bytes were read, and the engine keeps the connection open."""
        return self._complete and self._keep_alive and not self.closed and not self._paused

    def close(self) -> None:
        """Close the connection; the engine aborts a request that is running on it."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        waiter = self._waiter = self.loop.create_future()
        try:
            await waiter
        finally:
            # A cancelled exchange may unwind after the connection has begun the next one.
            if self._waiter is waiter:
                self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- asyncio's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        # uvloop's transports have asyncio.Transport's methods without being subclasses of it.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self.last_byte_s = monotonic()
        parser = self._parser
        if parser is None or self._complete:
            self.close()  # unsolicited bytes: the connection can't be trusted
            return
        in_head = not self._head_done
        body_bytes = self._buffered_bytes
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._broken("the engine wants another protocol")
            return
        except httptools.HttpParserError as error:
            self._broken(f"the engine's response is not HTTP: {error}")
            return
        if in_head:
            self._head_bytes += len(data)
            if not self._head_done:
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._broken("the engine's headers are too large")
                return
            if self._unsupported:
                self._complete = False
                self._body.clear()
                self.fail(AttemptFailure.SERVER_ERROR, self._unsupported)
                return
        elif self._buffered_bytes == body_bytes and not self._complete:
            self._other_bytes += len(data)
            if self._other_bytes > MAX_HEAD_BYTES:
                self._broken("the engine's trailers or chunk extensions are too large")
                return
        if self._buffered_bytes > HIGH_WATER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def _broken(self, detail: str) -> None:
        self.fail(AttemptFailure.TRUNCATED if self._head_done else AttemptFailure.RESET, detail)

    def eof_received(self) -> bool:
        """Called by the event loop: the engine closed its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        idle = self._parser is None or self._complete
        self.closed = True
        if not idle and self._failure is None:
            if exc is None and self._head_done and not self._keep_alive and not self._framed():
                self._complete = True  # a response without a length ends with the connection
            else:
                reused_unanswered = self.requests_sent > 1 and self._head_bytes == 0
                self._failure = UpstreamFailure(
                    AttemptFailure.TRUNCATED if self._head_done else AttemptFailure.RESET,
                    "the engine closed the connection" if exc is None else str(exc),
                    stale=reused_unanswered,
                )
        self._wake()

    def _framed(self) -> bool:
        return any(
            name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower())
            for name, value in self.headers
        )

    # -- llhttp's side ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._complete:  # bytes behind the response: the connection can't be trusted
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for trailers as well, which are ignored."""
        if self._head_done:
            return
        name = name.lower()
        self.headers.append((name, value))
        if name in _CODINGS:
            self._on_coding(name, value.strip().decode("latin-1").lower())

    def _on_coding(self, name: bytes, coding: str) -> None:
        if coding in ("", "identity") or (name == b"transfer-encoding" and coding == "chunked"):
            return
        if name == b"content-encoding" and is_decodable(coding) and self._decoder is None:
            self._decoder = Decoder(coding)
        else:
            self._unsupported = (
                f"the engine sent its response with {name.decode()} {coding[:40]!r}, which was not asked for "
                "and is not supported"
            )

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        parser = self._parser
        if parser is None or self._head_done:
            return
        status = parser.get_status_code()
        if status < 200:
            self.headers = []
            self._decoder = None
            self._unsupported = "" if status >= 100 else f"the engine answered with status {status}"
            self._head_done = status < 100
            return
        self.status = status
        self._keep_alive = parser.should_keep_alive()
        self._head_done = True

    def on_body(self, data: bytes) -> None:
        """Called by the parser, once per chunk."""
        if not self._complete:
            self._body.append(data)
            self._buffered_bytes += len(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._head_done:
            self._complete = True


class UpstreamOrigin:
    """The address of one engine process: its idle connections and the fixed part of every request to it."""

    __slots__ = (
        "_base", "_closed", "_connect_timeout_s", "_host", "_idle", "_loop", "_port", "_prefix", "_secret",
        "_secure", "_secure_origin", "_tail",
    )  # fmt: skip

    def __init__(
        self, base_url: str, secret: str, *, connect_timeout_s: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        parts = urlsplit(base_url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/")
        authority = parts.netloc.rsplit("@", 1)[-1]
        key = f"authorization: Bearer {secret}\r\n" if secret else ""
        self._tail = (
            f" HTTP/1.1\r\nhost: {authority}\r\n{key}accept-encoding: identity\r\n"
            "content-type: application/json\r\n"
        ).encode()
        self._base = f"{parts.scheme}://{authority}"
        self._secret = secret
        self._secure_origin: UpstreamOrigin | None = None
        """The same host with https, if a redirect led there."""
        self._connect_timeout_s = connect_timeout_s
        self._loop = loop
        self._idle: list[UpstreamConnection] = []
        self._closed = False

    def request(self, method: str, path: str, identity: str, body: bytes) -> WireRequest:
        """The bytes of a request; ``identity`` is :attr:`RequestContext.identity`, or any request id."""
        return self._request_to(f"{method} {self._prefix}{path}", identity, body)

    def _request_to(self, start: str, identity: str, body: bytes) -> WireRequest:
        lengths = f"x-request-id: {identity}\r\ncontent-length: {len(body)}\r\n\r\n".encode("latin-1")
        if len(body) > JOINED_BYTES:
            return b"".join((start.encode("latin-1"), self._tail, lengths)), body
        return b"".join((start.encode("latin-1"), self._tail, lengths, body))

    def redirected(
        self, path: str, connection: UpstreamConnection, identity: str, body: bytes
    ) -> tuple[UpstreamOrigin, str, WireRequest]:
        """Where the redirect leads that ``connection`` received for a POST to ``path``: the origin, the path
        for the next redirect, and the bytes of the request. Only 307 and 308 keep the method and the body.
        Raises :class:`UpstreamFailure` for a redirect that is not followed."""
        location = next((value for name, value in connection.headers if name == b"location"), b"").decode(
            "latin-1"
        )
        url = redirect_target(self._base + path, location) if connection.status in (307, 308) else None
        if url is None:
            raise UpstreamFailure(
                AttemptFailure.SERVER_ERROR,
                f"the engine answered with a redirect ({connection.status}) to {shown_location(location)}, "
                "which is not followed: set the tier's url to the address that answers",
            )
        parts = urlsplit(url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        origin = self
        if parts.scheme == "https" and not self._secure:
            base = f"https://{parts.netloc}"
            if self._secure_origin is None or self._secure_origin._base != base:
                self._secure_origin = UpstreamOrigin(
                    base, self._secret, connect_timeout_s=self._connect_timeout_s, loop=self._loop
                )
            origin = self._secure_origin
        return origin, target, origin._request_to(f"POST {target}", identity, body)

    def full_path(self, path: str) -> str:
        """The path at the host, for :meth:`redirected`."""
        return self._prefix + path

    async def acquire(self, *, fresh: bool = False, deadline_s: float = inf) -> UpstreamConnection:
        """An open connection: an idle one, or a new one if none is idle or ``fresh`` is true.

        Raises :class:`UpstreamFailure` if no connection can be opened within ``connect_timeout_s`` or before
        ``deadline_s`` (monotonic).
        """
        while self._idle and not fresh:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        try:
            async with asyncio.timeout(min(self._connect_timeout_s, deadline_s - monotonic())):
                _, connection = await self._loop.create_connection(
                    self._new, self._host, self._port, ssl=True if self._secure else None
                )
        except TimeoutError:
            if monotonic() >= deadline_s:
                raise UpstreamFailure(None, "the deadline passed while connecting") from None
            detail = f"no connection after {self._connect_timeout_s:g} s"
            raise UpstreamFailure(AttemptFailure.CONNECT_TIMEOUT, detail) from None
        except OSError as error:
            kind = AttemptFailure.GATEWAY if own_trouble(error) else AttemptFailure.REFUSED
            raise UpstreamFailure(kind, _reason(error)) from None
        return connection

    def release(self, connection: UpstreamConnection) -> None:
        """Return a connection after its request; it stays open if it is reusable."""
        if connection.reusable and not self._closed and len(self._idle) < MAX_IDLE_PER_ENDPOINT:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close idle connections; running requests continue."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        if self._secure_origin is not None:
            self._secure_origin.close()

    def _new(self) -> UpstreamConnection:
        return UpstreamConnection(self._loop)


def _can_open() -> bool:
    try:
        socket.socket().close()
    except OSError:
        return False
    return True


def own_trouble(error: OSError) -> bool:
    """Whether no connection was made because the gateway lacks file descriptors, ports or memory."""
    if isinstance(error, socket.gaierror):
        # without a descriptor the resolver can't read its files, and says that there is no such host
        return error.errno in _OWN_LOOKUP_ERRORS or not _can_open()
    if error.errno is not None:
        return error.errno in _OWN_ERRORS
    # asyncio joins the errors of several addresses in one without a number
    numbers = {int(number) for number in re.findall(r"\[Errno (\d+)\]", str(error))}
    return bool(numbers) and numbers <= _OWN_ERRORS


def _reason(error: OSError) -> str:
    """Why no connection was made; without the address, because clients see this text."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return error.strerror or type(error).__name__
    return os.strerror(error.errno)
