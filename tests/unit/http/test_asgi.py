"""Handlers behind Serve's ingress."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.http.asgi import AsgiApp
from controlplane.http.messages import Request, Responder
from tests.support.http_server import echo
from tests.support.waiting import forever


async def asgi(app: AsgiApp, path: str, body: bytes = b"", *, leave: bool = False) -> list[dict[str, Any]]:
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": body[:2], "more_body": True})
    inbox.put_nowait({"type": "http.request", "body": body[2:], "more_body": False})
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"h")],
        "root_path": "",
    }
    if leave:
        asyncio.get_running_loop().call_later(0.05, inbox.put_nowait, {"type": "http.disconnect"})
    await asyncio.wait_for(app(scope, inbox.get, send), 5)
    return sent


async def test_asgi_responds_like_the_own_port() -> None:
    app = AsgiApp(echo, max_body_bytes=10, body_limit_setting="gateway.max_body_bytes")
    sent = await asgi(app, "/x", b"body")
    assert sent[0]["status"] == 200
    assert sent[1]["body"] == b"body"
    sent = await asgi(app, "/stream")
    assert b"".join(message.get("body", b"") for message in sent) == b"one two three"
    assert sent[-1]["more_body"] is False
    assert (await asgi(app, "/x", b"b" * 11))[0]["status"] == 413


async def test_asgi_breaks_off_and_cancels_when_the_client_leaves() -> None:
    app = AsgiApp(echo, max_body_bytes=10, body_limit_setting="gateway.max_body_bytes")
    with pytest.raises(RuntimeError, match="broken off"):
        await asgi(app, "/break")
    started_s = asyncio.get_running_loop().time()
    assert await asgi(app, "/slow", leave=True) == []
    assert asyncio.get_running_loop().time() - started_s < 2


async def test_asgi_hands_nothing_on_of_a_request_that_broke_off() -> None:
    handled: list[Request] = []

    async def remember(request: Request, out: Responder) -> None:
        handled.append(request)
        out.send(200, [], b"")

    messages: list[dict[str, object]] = [{"type": "http.request", "body": b"half", "more_body": True}]

    async def receive() -> dict[str, object]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(_: object) -> None:
        raise AssertionError("the client has disconnected")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/x",
        "headers": [(b"host", b"h")],
        "query_string": b"",
    }
    await AsgiApp(remember, max_body_bytes=10, body_limit_setting="limit")(scope, receive, send)
    assert not handled


async def test_asgi_leaves_no_task_behind_when_it_is_cancelled() -> None:
    async def slow(_: Request, out: Responder) -> None:
        out.start(200, [])
        await forever()

    async def receive() -> dict[str, object]:
        if first:
            return first.pop()
        await forever()

    async def send(_: object) -> None:
        sending.set()
        await forever()

    sending = asyncio.Event()
    first: list[dict[str, object]] = [{"type": "http.request", "body": b"", "more_body": False}]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/x",
        "headers": [(b"host", b"h")],
        "query_string": b"",
    }
    before = asyncio.all_tasks()
    running = asyncio.ensure_future(
        AsgiApp(slow, max_body_bytes=10, body_limit_setting="limit")(scope, receive, send)
    )
    await asyncio.wait_for(sending.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() - before == set()
