"""``POST /chat`` and ``POST /batch``: a message in, a response out, for agents that don't use OpenAI's API.

The messages become chat completions and go through routing, admission and the relay like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec

from controlplane.errors import BadRequest, RequestError
from controlplane.http.messages import (
    Headers,
    Request,
    Responder,
    error_headers,
    error_value,
    json_bytes,
    send_json,
)

_T = TypeVar("_T")

MAX_BATCH: Final = 1000
BATCH_CONCURRENCY: Final = 32


class ChatRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /chat``. Only ``message`` is required."""

    message: str
    agent_type: str | None = None
    complexity: str | None = None
    model: str | None = None
    """A tier, a model id or ``auto``."""
    priority: str | None = None
    timeout: float | None = None
    """The deadline, in seconds from the request's arrival."""
    session_id: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    id: str | int | None = None
    """Repeated in the response; ``/batch`` numbers items without one."""


class _BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[msgspec.Raw]


class CapturedResponse:
    """A :class:`~controlplane.http.messages.Responder` that stores the response in memory."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.started = False
        self.gone = False
        self.congested = False

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Store a whole response."""
        self.start(status, headers)
        self.body = body

    def start(self, status: int, headers: Headers) -> None:
        """Store the head."""
        self.started = True
        self.status = status
        self.headers = dict(headers)

    def write(self, data: bytes) -> None:
        """Store a piece of the body."""
        self.body += data

    async def drain(self) -> None:
        """Return at once: there is no client to wait for."""

    def finish(self) -> None:
        """Do nothing: the body is complete."""

    def abort(self) -> None:
        """Mark the response as incomplete."""
        self.gone = True


Complete = Callable[[Request, Responder], Awaitable[None]]
"""Handles ``POST /v1/chat/completions``; errors become responses."""


async def chat(complete: Complete, now_s: Callable[[], float], request: Request, out: Responder) -> None:
    """Handle ``POST /chat``: ``{message, …}`` → ``{response, agent_used, processing_time, …}``."""
    chat_request = _decode(request.body, ChatRequest)
    status, value, headers = await _complete(complete, now_s, request, chat_request)
    send_json(out, value, status, headers)


async def batch(complete: Complete, now_s: Callable[[], float], request: Request, out: Responder) -> None:
    """Handle ``POST /batch``: a list of ``/chat`` bodies, or ``{"requests": [...]}``.

    Every item gets a result with ``status`` ``ok`` or ``error``, in the order of the request. An item that
    fails or is malformed does not affect the others.
    """
    items = _batch_items(request.body)
    slots = asyncio.Semaphore(BATCH_CONCURRENCY)
    started_s = now_s()

    async def one(position: int, raw: msgspec.Raw) -> dict[str, Any]:
        try:
            chat_request = msgspec.json.decode(raw, type=ChatRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            invalid = BadRequest(f"item {position}: {error}")
            return {
                "id": _id_of(raw, position),
                "status": "error",
                "processing_time": 0.0,
                **error_value(invalid),
            }
        async with slots:
            status, value, _ = await _complete(complete, now_s, request, chat_request)
        value["id"] = chat_request.id if chat_request.id is not None else position
        value["status"] = "ok" if status < 400 else "error"
        return value

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(position, raw)) for position, raw in enumerate(items)]
    results = [task.result() for task in tasks]
    failed = sum(1 for result in results if result["status"] != "ok")
    send_json(
        out,
        {
            "results": results,
            "total": len(results),
            "succeeded": len(results) - failed,
            "failed": failed,
            "processing_time": round(now_s() - started_s, 6),
        },
    )


async def _complete(
    complete: Complete, now_s: Callable[[], float], request: Request, chat_request: ChatRequest
) -> tuple[int, dict[str, Any], Headers]:
    started_s = now_s()
    captured = CapturedResponse()
    await complete(_completion(request, chat_request), captured)
    value: dict[str, Any] = {}
    if chat_request.id is not None:
        value["id"] = chat_request.id
    value["request_id"] = captured.headers.get(b"x-request-id", b"").decode()
    value["agent_used"] = captured.headers.get(b"x-tier", b"").decode() or None
    value["processing_time"] = round(now_s() - started_s, 6)
    try:
        response = msgspec.json.decode(captured.body)
        if captured.status < 400:
            message = response["choices"][0]["message"]
            value["response"] = message.get("content")
            value["model"] = response.get("model")
            value["usage"] = response.get("usage")
            value["finish_reason"] = response["choices"][0].get("finish_reason")
        else:
            value["error"] = response.get("error", response)
    except (msgspec.DecodeError, LookupError, AttributeError, TypeError):
        invalid = RequestError("the engine's response can't be parsed")
        return 502, {**value, **error_value(invalid)}, error_headers(invalid)
    passed_on: Headers = [(name, captured.headers[name]) for name in _PASSED_ON if name in captured.headers]
    return captured.status, value, passed_on


_PASSED_ON: Final = (b"retry-after", b"x-request-id", b"x-tier", b"x-tier-reason", b"x-attempts")


def _completion(request: Request, chat_request: ChatRequest) -> Request:
    messages = [{"role": "user", "content": chat_request.message}]
    if chat_request.system:
        messages.insert(0, {"role": "system", "content": chat_request.system})
    body: dict[str, Any] = {"model": chat_request.model or "auto", "messages": messages}
    body |= _given(chat_request, "max_tokens", "temperature")
    metadata = _given(chat_request, "complexity", "agent_type", "priority", "timeout", "session_id")
    if metadata:
        body["metadata"] = metadata
    headers = {
        name: value
        for name, value in request.headers.items()
        if name != b"x-request-id" or chat_request.id is None
    }
    return Request("POST", "/v1/chat/completions", "", headers, json_bytes(body))


def _given(chat_request: ChatRequest, *names: str) -> dict[str, Any]:
    """Those of the named fields that the client set."""
    return {name: value for name in names if (value := getattr(chat_request, name)) is not None}


def _batch_items(body: bytes) -> list[msgspec.Raw]:
    start = body.lstrip()[:1]
    items = _decode(body, _BatchRequest).requests if start == b"{" else _decode(body, list[msgspec.Raw])
    if len(items) > MAX_BATCH:
        raise BadRequest(
            f"a batch may have {MAX_BATCH} items, this one has {len(items)}: split it into several"
        )
    return items


def _decode(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is invalid: {error}") from None


def _id_of(raw: msgspec.Raw, position: int) -> Any:
    """The id of a malformed item if it can be read, else its position."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return position
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str | int) else position
