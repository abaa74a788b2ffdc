"""The headers and error events that the gateway adds to an engine's response."""

from __future__ import annotations

from typing import Any, Final

from controlplane.core.routing.tier_table import Api
from controlplane.errors import RequestError
from controlplane.gateway.proxy.resume import sse_event
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import ANTHROPIC_PATH, Headers, error_value

STREAM_HEADERS: Final[Headers] = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


def response_headers(context: RequestContext) -> Headers:
    """The headers of every response: the request's id, the tier that served it (if one did) with the reason,
    and the number of attempts if there was more than one."""
    headers = [(b"x-request-id", context.request_id.encode("latin-1"))]
    if context.decision is not None and context.decision.tier:
        headers.append((b"x-tier", context.decision.tier.encode()))
        headers.append((b"x-tier-reason", context.decision.reason.encode("latin-1", "replace")))
    if context.attempts > 1:
        headers.append((b"x-attempts", str(context.attempts).encode()))
    return headers


def error_event(error: RequestError, api: Api) -> bytes:
    """The event that ends an incomplete stream.

    No ``[DONE]`` follows, so that a client which ignores the error doesn't take the stream for complete.
    """
    if api is Api.MESSAGES:
        return b"event: error\n" + sse_event(error_value(error, ANTHROPIC_PATH))
    if api is Api.RESPONSES:
        event: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\n" + sse_event(event)
    return sse_event(error_value(error))
