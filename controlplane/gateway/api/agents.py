"""``POST /chat`` and ``POST /batch``: a message in, an answer out, for agents that don't speak OpenAI.

Both become chat completions and take the same way through routing, admission and the relay.
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


class ChatCall(msgspec.Struct, forbid_unknown_fields=True):
    """What ``/chat`` takes. Only ``message`` is required."""

    message: str
    agent_type: str | None = None
    complexity: str | None = None
    model: str | None = None
    """A tier, a model id or ``auto``."""
    priority: str | None = None
    timeout: float | None = None
    """Seconds."""
    session_id: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    id: str | int | None = None
    """Comes back in the answer; ``/batch`` gives one to items without."""


class _BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[msgspec.Raw]


class CapturedResponse:
    """A :class:`~controlplane.http.messages.Responder` that keeps the answer."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.started = False
        self.gone = False
        self.congested = False

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Keep a whole answer."""
        self.start(status, headers)
        self.body = body

    def start(self, status: int, headers: Headers) -> None:
        """Keep the head."""
        self.started = True
        self.status = status
        self.headers = dict(headers)

    def write(self, data: bytes) -> None:
        """Keep a piece."""
        self.body += data

    async def drain(self) -> None:
        """There is no client to wait for."""

    def finish(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The answer is not whole."""
        self.gone = True


Complete = Callable[[Request, Responder], Awaitable[None]]
"""Handles ``POST /v1/chat/completions``; answers errors itself."""


async def chat(complete: Complete, now_s: Callable[[], float], request: Request, out: Responder) -> None:
    """Answer ``POST /chat``: ``{message, …}`` → ``{response, agent_used, processing_time, …}``."""
    call = _decode(request.body, ChatCall)
    status, value, headers = await _answer(complete, now_s, request, call)
    send_json(out, value, status, headers)


async def batch(complete: Complete, now_s: Callable[[], float], request: Request, out: Responder) -> None:
    """Answer ``POST /batch``: a list of ``/chat`` bodies, or ``{"requests": [...]}``.

    Every item gets an answer with ``status`` ``ok`` or ``error``, in the order of the request; one that
    fails, or is malformed, fails alone.
    """
    items = _batch_items(request.body)
    slots = asyncio.Semaphore(BATCH_CONCURRENCY)
    started_s = now_s()

    async def one(position: int, raw: msgspec.Raw) -> dict[str, Any]:
        try:
            call = msgspec.json.decode(raw, type=ChatCall)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            wrong = BadRequest(f"item {position}: {error}")
            return {
                "id": _id_of(raw, position),
                "status": "error",
                "processing_time": 0.0,
                **error_value(wrong),
            }
        async with slots:
            status, value, _ = await _answer(complete, now_s, request, call)
        value["id"] = call.id if call.id is not None else position
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


async def _answer(
    complete: Complete, now_s: Callable[[], float], request: Request, call: ChatCall
) -> tuple[int, dict[str, Any], Headers]:
    started_s = now_s()
    captured = CapturedResponse()
    await complete(_completion(request, call), captured)
    value: dict[str, Any] = {}
    if call.id is not None:
        value["id"] = call.id
    value["request_id"] = captured.headers.get(b"x-request-id", b"").decode()
    value["agent_used"] = captured.headers.get(b"x-tier", b"").decode() or None
    value["processing_time"] = round(now_s() - started_s, 6)
    try:
        answer = msgspec.json.decode(captured.body)
        if captured.status < 400:
            message = answer["choices"][0]["message"]
            value["response"] = message.get("content")
            value["model"] = answer.get("model")
            value["usage"] = answer.get("usage")
            value["finish_reason"] = answer["choices"][0].get("finish_reason")
        else:
            value["error"] = answer.get("error", answer)
    except (msgspec.DecodeError, LookupError, AttributeError, TypeError):
        wrong = RequestError("the engine's answer can't be read")
        return 502, {**value, **error_value(wrong)}, error_headers(wrong)
    kept: Headers = [(name, captured.headers[name]) for name in _PASSED_ON if name in captured.headers]
    return captured.status, value, kept


_PASSED_ON: Final = (b"retry-after", b"x-request-id", b"x-tier", b"x-tier-reason", b"x-attempts")


def _completion(request: Request, call: ChatCall) -> Request:
    messages = [{"role": "user", "content": call.message}]
    if call.system:
        messages.insert(0, {"role": "system", "content": call.system})
    body: dict[str, Any] = {"model": call.model or "auto", "messages": messages}
    if call.max_tokens is not None:
        body["max_tokens"] = call.max_tokens
    if call.temperature is not None:
        body["temperature"] = call.temperature
    hints = {
        "complexity": call.complexity,
        "agent_type": call.agent_type,
        "priority": call.priority,
        "timeout": call.timeout,
        "session_id": call.session_id,
    }
    given = {name: value for name, value in hints.items() if value is not None}
    if given:
        body["metadata"] = given
    headers = {
        name: value for name, value in request.headers.items() if name != b"x-request-id" or call.id is None
    }
    return Request("POST", "/v1/chat/completions", "", headers, json_bytes(body))


def _batch_items(body: bytes) -> list[msgspec.Raw]:
    start = body.lstrip()[:1]
    items = _decode(body, _BatchRequest).requests if start == b"{" else _decode(body, list[msgspec.Raw])
    if len(items) > MAX_BATCH:
        raise BadRequest(f"a batch has at most {MAX_BATCH} items, this one has {len(items)}: send several")
    return items


def _decode(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is wrong: {error}") from None


def _id_of(raw: msgspec.Raw, position: int) -> Any:
    """A malformed item's own id where it can be read."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return position
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str | int) else position
