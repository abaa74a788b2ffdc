"""What a client gets from the gateway itself besides the engine's bytes: headers and error events."""

from __future__ import annotations

from typing import Any, Final

from controlplane.core.routing.tier_table import Api
from controlplane.errors import RequestError
from controlplane.gateway.proxy.resume import sse_event
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import Headers, error_value

STREAM_HEADERS: Final[Headers] = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


def response_headers(context: RequestContext) -> Headers:
    """The headers of every response: the request's id, which tier served it and why, attempts over one."""
    headers = [(b"x-request-id", context.request_id.encode("latin-1"))]
    if context.decision is not None:
        headers.append((b"x-tier", context.decision.tier.encode()))
        headers.append((b"x-tier-reason", context.decision.reason.encode("latin-1", "replace")))
    if context.attempts > 1:
        headers.append((b"x-attempts", str(context.attempts).encode()))
    return headers


def error_event(error: RequestError, api: Api) -> bytes:
    """The event that tells a client that its stream ends here incomplete.

    No ``[DONE]`` follows: a client that overlooks the error must not take the stream for complete.
    """
    if api is Api.MESSAGES:
        value = {"type": "error", "error": {"type": "api_error", "message": error.message}}
        return b"event: error\n" + sse_event(value)
    if api is Api.RESPONSES:
        event: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\n" + sse_event(event)
    return sse_event(error_value(error))
