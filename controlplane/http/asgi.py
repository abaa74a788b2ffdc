"""Handlers as an ASGI application, for Serve's ingress.

HAProxy and uvicorn are in front of it: they parse, and limit a connection's headers and time. The
checks of a request are the same as on the gateway's own port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from controlplane.errors import BadRequest, RequestError, RequestTooSlow
from controlplane.http.access import AccessRules
from controlplane.http.intake import Intake
from controlplane.http.limits import ReceivingBudget, ServerLimits
from controlplane.http.messages import (
    JSON_TYPE,
    Handler,
    Headers,
    Request,
    Responder,
    clean_headers,
    error_value,
    json_bytes,
    send_error,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HIGH_WATER_BYTES: Final = 64 * 1024
"""Bytes of a response that wait for a slow client before its handler has to wait, too."""
HIGH_WATER_MESSAGES: Final = 64
REQUEST_ID: Final = b"x-request-id"
_CLOSE: Final[Headers] = [(b"connection", b"close")]
_NO_WEBSOCKETS: Final = BadRequest("there are no websockets here")


class _AsgiResponder:
    """The :class:`~controlplane.http.messages.Responder` of one ASGI request.

    A handler writes without waiting. :meth:`deliver`, in a separate task, passes the messages on in order;
    ``drain`` waits for a slow client.
    """

    def __init__(self, send: Send, extra: Headers) -> None:
        self._send = send
        self._extra = extra
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._waiting_bytes = 0
        self._below_high_water = asyncio.Event()
        self._below_high_water.set()
        self.started = False
        self.finished = False
        self.gone = False

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.started = self.finished = True
        length = (b"content-length", str(len(body)).encode())
        self._put(
            {"type": "http.response.start", "status": status, "headers": [*self._head(headers), length]}
        )
        self._put({"type": "http.response.body", "body": body, "more_body": False})
        self._put(None)

    def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self._put({"type": "http.response.start", "status": status, "headers": self._head(headers)})

    def write(self, data: bytes) -> None:
        if data:
            self._put({"type": "http.response.body", "body": data, "more_body": True})

    @property
    def congested(self) -> bool:
        return not self._below_high_water.is_set()

    async def drain(self) -> None:
        await self._below_high_water.wait()

    def finish(self) -> None:
        if not self.finished:
            self.finished = True
            self._put({"type": "http.response.body", "body": b"", "more_body": False})
            self._put(None)

    def abort(self) -> None:
        self.finished = True
        self.gone = True
        self._put(None)

    def _head(self, headers: Headers) -> Headers:
        """Serve adds the request's id itself; clients would read two as one, joined by a comma."""
        return clean_headers([*(header for header in headers if header[0] != REQUEST_ID), *self._extra])

    def _put(self, message: Message | None) -> None:
        self._messages.put_nowait(message)
        if message is not None:
            self._waiting_bytes += len(message.get("body", b""))
        if self._messages.qsize() >= HIGH_WATER_MESSAGES or self._waiting_bytes >= HIGH_WATER_BYTES:
            self._below_high_water.clear()

    async def deliver(self) -> None:
        """Passes messages on until the response is complete or aborted."""
        while (message := await self._messages.get()) is not None:
            await self._send(message)
            self._waiting_bytes -= len(message.get("body", b""))
            if self._messages.qsize() < HIGH_WATER_MESSAGES and self._waiting_bytes < HIGH_WATER_BYTES:
                self._below_high_water.set()


class _Disconnected(Exception):
    """The client disconnected before its request was complete."""


class _UnfinishedBody:
    """The body of a request that is being received."""

    def __init__(self) -> None:
        self.refused: asyncio.Future[RequestError] = asyncio.get_running_loop().create_future()
        self.size_bytes = 0
        self.chunks: list[bytes] = []

    def drop(self, error: RequestError) -> None:
        """Forgets what has arrived and refuses the request."""
        self.chunks = []
        if not self.refused.done():
            self.refused.set_result(error)


class AsgiApp:
    """An ASGI application around ``handler``; the other arguments are those of
    :class:`~controlplane.http.intake.Intake`."""

    def __init__(
        self,
        handler: Handler,
        *,
        max_body_bytes: int,
        body_limit_setting: str = "",
        access: AccessRules | None = None,
        receiving: ReceivingBudget | None = None,
        on_refused: Callable[[RequestError], None] | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self._intake: Intake[Responder] = Intake(
            handler,
            max_body_bytes=max_body_bytes,
            body_limit_setting=body_limit_setting,
            access=access,
            receiving=receiving,
            on_refused=on_refused,
        )
        self._limits = limits or ServerLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point. Raises RuntimeError to make the ASGI server abort the response."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, send)
            return
        headers, hosts = _headers(scope["headers"])
        if not hosts and scope.get("http_version") == "1.0":
            hosts = 1
        response = _AsgiResponder(send, self._intake.response_headers(headers))
        error = self._intake.refusal(scope["method"], headers, hosts)
        body = b""
        if error is None:
            try:
                body = await self._body(receive)
            except _Disconnected:
                return
            except RequestError as refused:
                error = refused
        if error is not None:
            self._intake.refused(error)
            headers_of_close = _CLOSE if isinstance(error, RequestTooSlow) else None
            send_error(response, error, headers_of_close, scope["path"])
            await response.deliver()
            return
        root = scope.get("root_path", "")
        path = scope["path"]
        request = Request(
            scope["method"],
            path[len(root) :] if root and path.startswith(root) else path,
            scope.get("query_string", b"").decode("latin-1"),
            headers,
            body,
        )
        handling = asyncio.ensure_future(self._handle(request, response))
        watching = asyncio.ensure_future(_disconnected(receive))
        delivering = asyncio.ensure_future(response.deliver())
        try:
            done, _ = await asyncio.wait((delivering, watching), return_when=asyncio.FIRST_COMPLETED)
            if delivering in done:
                await delivering
                if not response.finished or response.gone:
                    raise RuntimeError("the response was broken off")
            else:
                response.gone = True
        finally:
            tasks = (handling, watching, delivering)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, request: Request, response: _AsgiResponder) -> None:
        try:
            rest = self._intake.handle(request, response)
            if rest is not None:
                await rest
        finally:
            if not response.finished:
                response.abort()

    async def _body(self, receive: Receive) -> bytes:
        """The whole body. Raises :class:`RequestError` if it is too long, too slow or too much together with
        others that are being received."""
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            whole: bytes = message.get("body", b"")
            if len(whole) > self._intake.max_body_bytes:
                raise self._intake.too_large()
            return whole
        body = _UnfinishedBody()
        try:
            return await self._pieces(body, message, receive)
        finally:
            if self._intake.receiving is not None:
                self._intake.receiving.release(body)

    async def _pieces(self, body: _UnfinishedBody, message: Message, receive: Receive) -> bytes:
        loop = asyncio.get_running_loop()
        limits, receiving = self._limits, self._intake.receiving
        began_s = loop.time()
        while True:
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunk = message.get("body", b"")
            body.size_bytes += len(chunk)
            if body.size_bytes > self._intake.max_body_bytes:
                raise self._intake.too_large()
            body.chunks.append(chunk)
            if receiving is not None:
                receiving.hold(body, body.size_bytes)
            if body.refused.done():
                raise body.refused.result()
            if not message.get("more_body", False):
                return b"".join(body.chunks)
            left_s = began_s + limits.body_s + body.size_bytes / limits.body_bytes_per_s - loop.time()
            message = await _next_message(receive, body, left_s)


async def _next_message(receive: Receive, body: _UnfinishedBody, timeout_s: float) -> Message:
    receiving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait(
            (receiving, body.refused), timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED
        )
        if body.refused.done():
            raise body.refused.result()
        if not receiving.done():
            raise RequestTooSlow("the body arrived too slowly")
        return receiving.result()
    finally:
        receiving.cancel()


def _headers(lines: Iterable[tuple[bytes, bytes]]) -> tuple[dict[bytes, bytes], int]:
    """A request's headers by name, without blanks around their values, and how many of them are ``Host``."""
    headers: dict[bytes, bytes] = {}
    hosts = 0
    for name, value in lines:
        if name == b"host":
            hosts += 1
        headers[name] = value.strip(b" \t")
    return headers, hosts


async def _refuse_websocket(scope: Scope, send: Send) -> None:
    """Answers a websocket's opening request with 404, as the own port does, or 403 if the ASGI server has
    only that."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1000})
        return
    head = [(b"content-type", JSON_TYPE)]
    await send({"type": "websocket.http.response.start", "status": 404, "headers": head})
    body = json_bytes(error_value(_NO_WEBSOCKETS))
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    """Returns once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
