"""``POST /chat`` and ``POST /batch``: a message in, a response out, for agents that don't use OpenAI's API.

The messages become chat completions and go through routing, admission and the relay like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from controlplane.errors import BadRequest, EngineFailed, PayloadTooLarge, RequestError
from controlplane.gateway.request_body import without_mark
from controlplane.http.json_reader import InvalidJson, reader, utf8
from controlplane.http.messages import (
    Headers,
    Request,
    Responder,
    error_headers,
    error_value,
    json_bytes,
    send_json,
)

MAX_BATCH: Final = 1000
BATCH_CONCURRENCY: Final = 32
MAX_BATCH_BYTES: Final = 64 * 1024 * 1024
"""The most that the responses of one batch may have, all together."""
CLIENT_ERROR: Final = 400
NULL: Final = msgspec.Raw(b"null")


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


class CapturedResponse:
    """A :class:`~controlplane.http.messages.Responder` that stores the response in memory."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._size_bytes = 0
        self.started = False
        self.gone = False
        self.congested = False

    @property
    def body(self) -> bytes:
        """What was stored of the body."""
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Store a whole response."""
        self.start(status, headers)
        self._parts = [body]

    def start(self, status: int, headers: Headers) -> None:
        """Store the head."""
        self.started = True
        self.status = status
        self.headers = dict(headers)

    def write(self, data: bytes) -> None:
        """Store a piece of the body; what is over :data:`MAX_BATCH_BYTES` is dropped."""
        self._size_bytes += len(data)
        if self._size_bytes <= MAX_BATCH_BYTES:
            self._parts.append(data)

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
    try:
        chat_request = _chat_request(without_mark(request.body))
    except InvalidJson as error:
        raise BadRequest(f"the request body {error}", param=error.member) from None
    status, value, headers = await _complete(complete, now_s, request, chat_request)
    send_json(out, value, status, headers)


async def batch(complete: Complete, now_s: Callable[[], float], request: Request, out: Responder) -> None:
    """Handle ``POST /batch``: a list of ``/chat`` bodies, or ``{"requests": [...]}``.

    Every item gets a result with ``status`` ``ok`` or ``error``, in the order of the request. An item that
    fails or is malformed does not affect the others.
    """
    items = _batch_items(request)
    room = _Room(MAX_BATCH_BYTES)
    slots = asyncio.Semaphore(BATCH_CONCURRENCY)
    started_s = now_s()

    async def one(position: int, raw: msgspec.Raw) -> dict[str, Any]:
        try:
            chat_request = _chat_request(raw)
        except InvalidJson as error:
            refused = BadRequest(f"item {position} {error}", param=error.member)
            return _failed(_id_of(raw, position), refused)
        async with slots:
            if room.used_up:
                return _failed(chat_request.id if chat_request.id is not None else position, room.error())
            status, value, _ = await _complete(complete, now_s, request, chat_request, room)
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


def _failed(ident: str | int, error: RequestError) -> dict[str, Any]:
    """The result of an item that was not sent."""
    return {"id": ident, "status": "error", "processing_time": 0.0, **error_value(error)}


class _Room:
    """What the responses of one batch may take, so that a batch of long ones does not fill the memory."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = self._left_bytes = limit_bytes

    @property
    def used_up(self) -> bool:
        return self._left_bytes < 0

    def take(self, size_bytes: int) -> bool:
        """Whether there is room for another response."""
        self._left_bytes -= size_bytes
        return not self.used_up

    def error(self) -> RequestError:
        return PayloadTooLarge(
            f"the responses of this batch are over {self._limit_bytes} bytes: split it into several"
        )


async def _complete(
    complete: Complete,
    now_s: Callable[[], float],
    request: Request,
    chat_request: ChatRequest,
    room: _Room | None = None,
) -> tuple[int, dict[str, Any], Headers]:
    started_s = now_s()
    captured = CapturedResponse()
    await complete(_completion(request, chat_request), captured)
    value: dict[str, Any] = {}
    if chat_request.id is not None:
        value["id"] = chat_request.id
    value["request_id"] = captured.headers.get(b"x-request-id", b"").decode("latin-1")
    value["agent_used"] = captured.headers.get(b"x-tier", b"").decode("latin-1") or None
    value["processing_time"] = round(now_s() - started_s, 6)
    if room is not None and not room.take(len(captured.body)):
        error = room.error()
        return error.status, {**value, **error_value(error)}, []
    failed = captured.status >= CLIENT_ERROR
    try:
        utf8(captured.body)  # parts of it are repeated as they are
        if failed:
            value["error"] = _refused(captured.body).error or msgspec.Raw(captured.body)
        else:
            response = _completed(captured.body)
            choice = response.choices.first
            value["response"] = choice.message.content
            value["model"] = response.model
            value["usage"] = response.usage
            value["finish_reason"] = choice.finish_reason
    except InvalidJson as reason:
        status = captured.status if failed else EngineFailed.status
        unreadable = EngineFailed(f"the engine's response {reason}", status=status)
        return status, {**value, **error_value(unreadable)}, error_headers(unreadable)
    passed_on: Headers = [(name, captured.headers[name]) for name in _PASSED_ON if name in captured.headers]
    return captured.status, value, passed_on


class _Message(msgspec.Struct, gc=False):
    content: msgspec.Raw = NULL


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: msgspec.Raw = NULL


class _FirstChoice(msgspec.Struct, array_like=True, gc=False):
    """A list whose first item is read and whose others are skipped."""

    first: _Choice


class _Completion(msgspec.Struct, gc=False):
    """What is read of an engine's response; values that are passed on stay as they came."""

    choices: _FirstChoice
    model: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL


class _Refusal(msgspec.Struct, gc=False):
    error: msgspec.Raw = msgspec.Raw()


class _Identified(msgspec.Struct, gc=False):
    id: str | int | None = None


_completed = reader(_Completion)
_refused = reader(_Refusal)
_identified = reader(_Identified)
_chat_request = reader(ChatRequest)
_Items = msgspec.defstruct(
    "_Items",
    [(f"item_{position}", msgspec.Raw, msgspec.Raw()) for position in range(MAX_BATCH + 1)],
    array_like=True,
    gc=False,
)
"""A list of which no more than this many items are read, whatever its length."""


class _BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    requests: msgspec.Raw


_list_of_items = reader(_Items)
_object_of_items = reader(_BatchRequest)

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
    return request.derived("/v1/chat/completions", headers, json_bytes(body))


def _given(chat_request: ChatRequest, *names: str) -> dict[str, Any]:
    """Those of the named fields that the client set."""
    return {name: value for name in names if (value := getattr(chat_request, name)) is not None}


def _batch_items(request: Request) -> list[msgspec.Raw]:
    body = without_mark(request.body)
    in_object = body.lstrip()[:1] == b"{"
    try:
        found = _list_of_items(_object_of_items(body).requests if in_object else body)
    except InvalidJson as error:
        raise BadRequest(f"the request body {error}", param=error.member) from None
    items = [item for item in msgspec.structs.astuple(found) if item]
    if len(items) > MAX_BATCH:
        raise BadRequest(f"a batch may have {MAX_BATCH} items: split it into several")
    return items


def _id_of(raw: msgspec.Raw, position: int) -> Any:
    """The id of a malformed item if it can be read, else its position."""
    try:
        found = _identified(raw).id
    except InvalidJson:
        return position
    return position if found is None else found
