"""Handlers as an ASGI application, for Serve's ingress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from controlplane.http.messages import Handler, Headers, Request, payload_too_large, send_error

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HIGH_WATER_MESSAGES = 64


class _AsgiResponder:
    """The :class:`~controlplane.http.messages.Responder` of one ASGI request.

    A handler writes without waiting. :meth:`deliver`, in a separate task, passes the messages on in order;
    ``drain`` waits for a slow client.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._below_high_water = asyncio.Event()
        self._below_high_water.set()
        self.started = False
        self.finished = False
        self.gone = False

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.started = self.finished = True
        length = (b"content-length", str(len(body)).encode())
        self._put({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        self._put({"type": "http.response.body", "body": body, "more_body": False})
        self._put(None)

    def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self._put({"type": "http.response.start", "status": status, "headers": headers})

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

    def _put(self, message: Message | None) -> None:
        self._messages.put_nowait(message)
        if self._messages.qsize() >= HIGH_WATER_MESSAGES:
            self._below_high_water.clear()

    async def deliver(self) -> None:
        """Passes messages on until the response is complete or aborted."""
        while (message := await self._messages.get()) is not None:
            await self._send(message)
            if self._messages.qsize() < HIGH_WATER_MESSAGES:
                self._below_high_water.set()


class _Disconnected(Exception):
    """The client disconnected before its request was complete."""


class AsgiApp:
    """An ASGI application around ``handler``.

    A body over ``max_body_bytes`` is rejected with 413; ``body_limit_setting`` names the setting that raises
    the limit.
    """

    def __init__(self, handler: Handler, *, max_body_bytes: int, body_limit_setting: str) -> None:
        self._handler = handler
        self._max_body_bytes = max_body_bytes
        self._body_limit_setting = body_limit_setting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point. Raises RuntimeError to make the ASGI server abort the response."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope {scope['type']!r} is not supported")
        response = _AsgiResponder(send)
        try:
            body = await self._body(receive)
        except _Disconnected:
            return
        if body is None:
            error = payload_too_large(self._max_body_bytes, self._body_limit_setting)
            send_error(response, error, path=scope["path"])
            await response.deliver()
            return
        root = scope.get("root_path", "")
        path = scope["path"]
        request = Request(
            scope["method"],
            path[len(root) :] if root and path.startswith(root) else path,
            scope.get("query_string", b"").decode("latin-1"),
            dict(scope["headers"]),
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
            await self._handler(request, response)
        finally:
            if not response.finished:
                response.abort()

    async def _body(self, receive: Receive) -> bytes | None:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


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
