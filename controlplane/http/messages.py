"""A handler's view of HTTP: a complete request, and a responder to write the response to.

The same handlers run on the gateway's own port (:mod:`controlplane.http.server`) and behind Serve's ingress
(:mod:`controlplane.http.asgi`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol

import msgspec

from controlplane.core.access.principal import Principal
from controlplane.errors import PayloadTooLarge, RequestError

Headers = list[tuple[bytes, bytes]]

JSON_TYPE = b"application/json"
EVENT_STREAM = b"text/event-stream"

ANTHROPIC_PATH: Final = "/v1/messages"
"""Paths that begin so belong to Anthropic's API."""
SERVER_ERROR: Final = 500
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_encode = msgspec.json.Encoder().encode
_CONTROLS: Final = bytes([*range(32), 127])
"""Characters that end a header or make it unreadable."""
_BLANKS: Final = bytes(32 if i in _CONTROLS else i for i in range(256))


class Request:
    """One complete request. ``path`` is without percent-encoding. Names in ``headers`` are in lower case,
    values without blanks around them; a repeated header has its last value. ``principal`` is who it comes
    from; None until that was verified."""

    __slots__ = ("body", "headers", "method", "path", "principal", "query")

    def __init__(
        self, method: str, path: str, query: str, headers: Mapping[bytes, bytes], body: bytes
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.principal: Principal | None = None

    def derived(self, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Request:
        """A ``POST`` that is made on behalf of this request."""
        made = Request("POST", path, "", headers, body)
        made.principal = self.principal
        return made

    def header(self, name: bytes) -> str:
        """A header's value, or ``""``."""
        value = self.headers.get(name)
        return value.decode("latin-1") if value else ""


class Responder(Protocol):
    """Writes the response to one request: :meth:`send`, or :meth:`start`, :meth:`write` …, :meth:`finish`."""

    @property
    def started(self) -> bool:
        """Whether the status line was sent, so that no other response is possible."""
        ...

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected; then writes are discarded."""
        ...

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than data is written, so that :meth:`drain` would wait."""
        ...

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a complete response."""
        ...

    def start(self, status: int, headers: Headers) -> None:
        """Begins a response of unknown length."""
        ...

    def write(self, data: bytes) -> None:
        """Sends a piece of the body."""
        ...

    async def drain(self) -> None:
        """Waits until the client has read enough for more to be written."""
        ...

    def finish(self) -> None:
        """Marks the body as complete."""
        ...

    def abort(self) -> None:
        """Aborts the response in a way that shows the client that it is incomplete."""
        ...


Handler = Callable[[Request, Responder], Awaitable[None]]


def header_lines(headers: Headers) -> bytes:
    """Headers as they are sent. Control characters, with which a name or value from elsewhere could begin a
    header of its own, become blanks."""
    parts: list[bytes] = []
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    lines = b"".join(parts)
    if len(lines.translate(None, _CONTROLS)) != len(lines) - 2 * len(headers):
        return b"".join(b"%b: %b\r\n" % (name, value) for name, value in clean_headers(headers))
    return lines


def clean_headers(headers: Headers) -> Headers:
    """Headers whose control characters are blanks."""
    return [(name.translate(_BLANKS), value.translate(_BLANKS)) for name, value in headers]


def payload_too_large(limit_bytes: int, setting: str) -> PayloadTooLarge:
    """The error for a body over ``limit_bytes``; ``setting`` names the limit's setting, if there is one."""
    return PayloadTooLarge(f"the body is over {limit_bytes} bytes" + (f" ({setting})" if setting else ""))


def json_bytes(value: Any) -> bytes:
    """A value as JSON."""
    return _encode(value)


def send_json(responder: Responder, value: Any, status: int = 200, headers: Headers | None = None) -> None:
    """Responds with a value as JSON."""
    responder.send(status, [(b"content-type", JSON_TYPE), *(headers or ())], json_bytes(value))


def error_value(error: RequestError, path: str = "", request_id: str = "") -> dict[str, Any]:
    """The JSON of an error: Anthropic-shaped under ``/v1/messages``, else OpenAI-shaped."""
    if not path.startswith(ANTHROPIC_PATH):
        openai = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
        return {"error": openai}
    value: dict[str, Any] = {
        "type": "error",
        "error": {"type": anthropic_type(error.status), "message": error.message},
    }
    if request_id:
        value["request_id"] = request_id
    return value


def anthropic_type(status: int) -> str:
    """What Anthropic's API calls an error of this status."""
    default = "invalid_request_error" if status < SERVER_ERROR else "api_error"
    return _ANTHROPIC_TYPES.get(status, default)


def error_headers(error: RequestError) -> Headers:
    """The headers of an error response: ``Retry-After`` in whole seconds, rounded up, at least 1;
    ``x-should-retry: false``, which the SDKs of OpenAI and Anthropic obey, if trying again would not help."""
    final = error.final or error.status == HTTPStatus.REQUEST_TIMEOUT
    headers: Headers = [(b"x-should-retry", b"false")] if final else []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    return headers


def send_error(
    responder: Responder, error: RequestError, headers: Headers | None = None, path: str = ""
) -> None:
    """Responds with an error, in the shape of the API that ``path`` belongs to."""
    ident = next((value.decode("latin-1") for name, value in headers or () if name == b"x-request-id"), "")
    value = error_value(error, path, ident)
    send_json(responder, value, error.status, [*error_headers(error), *(headers or ())])
