"""What a handler sees of HTTP: a request that is whole, and somewhere to answer to.

Handlers are the same on the gateway's own port (:mod:`controlplane.http.server`) and on Serve's
ingress (:mod:`controlplane.http.asgi`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from controlplane.errors import RequestError

Headers = list[tuple[bytes, bytes]]

JSON_TYPE = b"application/json"
EVENT_STREAM = b"text/event-stream"

_encode = msgspec.json.Encoder().encode


class Request:
    """One whole request. ``headers`` has lower-case names; of a repeated header the last one counts."""

    __slots__ = ("body", "headers", "method", "path", "query")

    def __init__(
        self, method: str, path: str, query: str, headers: Mapping[bytes, bytes], body: bytes
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body

    def header(self, name: bytes) -> str:
        """A header's value, or ``""``."""
        value = self.headers.get(name)
        return value.decode("latin-1") if value else ""


class Responder(Protocol):
    """Where an answer goes. Nothing is sent before :meth:`start` or :meth:`send`."""

    @property
    def started(self) -> bool:
        """The status line was sent: the answer can't be changed any more."""
        ...

    @property
    def gone(self) -> bool:
        """The client left; what is written goes nowhere."""
        ...

    @property
    def congested(self) -> bool:
        """The client takes less than it is sent: :meth:`drain` would wait."""
        ...

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer at once."""
        ...

    def start(self, status: int, headers: Headers) -> None:
        """Begin an answer whose length is not known."""
        ...

    def write(self, data: bytes) -> None:
        """A piece of the body."""
        ...

    async def drain(self) -> None:
        """Wait while the client takes less than it is sent."""
        ...

    def finish(self) -> None:
        """The body is whole."""
        ...

    def abort(self) -> None:
        """Break the answer off so that the client can see it is not whole."""
        ...


Handler = Callable[[Request, Responder], Awaitable[None]]


def json_bytes(value: Any) -> bytes:
    """A value as JSON."""
    return _encode(value)


def send_json(responder: Responder, value: Any, status: int = 200, headers: Headers | None = None) -> None:
    """Answer with a value as JSON."""
    responder.send(status, [(b"content-type", JSON_TYPE), *(headers or ())], json_bytes(value))


def error_value(error: RequestError) -> dict[str, Any]:
    """The OpenAI-shaped JSON of an error."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def error_headers(error: RequestError) -> Headers:
    """The headers that an error brings: ``Retry-After`` in whole seconds, rounded up, at least 1."""
    if error.retry_after_s is None:
        return []
    return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]


def send_error(responder: Responder, error: RequestError, headers: Headers | None = None) -> None:
    """Answer with an error."""
    send_json(responder, error_value(error), error.status, [*error_headers(error), *(headers or ())])
