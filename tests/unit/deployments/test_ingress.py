"""Behind Serve's ingress: uvicorn with the gateway's ASGI application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http import auto

from controlplane.http.asgi import AsgiApp
from controlplane.http.messages import Request, Responder
from deployments.ingress import ignore_trailers
from tests.support.http_server import talk
from tests.support.waiting import until_async


@asynccontextmanager
async def ingress(app: AsgiApp) -> AsyncIterator[int]:
    """The port of a server like the one that Serve starts in a gateway replica."""
    ignore_trailers()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await until_async(lambda: server.started)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        listener.close()


def _no_signals() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.fixture(autouse=True)
def _uvicorn_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)


async def show_headers(request: Request, out: Responder) -> None:
    """Sends back the headers."""
    lines = [name + b"=" + value for name, value in sorted(request.headers.items())]
    out.send(200, [(b"x-request-id", b"ours"), (b"x-tier", b"a")], b"\n".join(lines))


@pytest.mark.parametrize("pieces", [1, 2, 3])
async def test_trailers_are_no_headers_however_they_arrive(pieces: int) -> None:
    app = AsgiApp(show_headers, max_body_bytes=100)
    head = b"POST / HTTP/1.1\r\nhost: h\r\nx-priority: low\r\nconnection: close\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    parts = [head, b"2\r\nok\r\n0\r\n", b"x-priority: high\r\nx-new: 1\r\n\r\n"]
    sent = {1: [b"".join(parts)], 2: [parts[0] + parts[1], parts[2]], 3: parts}[pieces]
    async with ingress(app) as port:
        data = await talk(port, *sent)
    assert b"x-priority=low" in data
    assert b"x-new" not in data


async def test_a_response_has_one_request_id_because_serve_adds_it() -> None:
    async with ingress(AsgiApp(show_headers, max_body_bytes=100)) as port:
        data = await talk(port, b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
    assert b"x-request-id" not in data.partition(b"\r\n\r\n")[0]
    assert b"x-tier: a" in data


async def test_a_websocket_is_answered_with_404() -> None:
    up = b"GET /v1/realtime HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    up += b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    async with ingress(AsgiApp(show_headers, max_body_bytes=100)) as port:
        data = await talk(port, up)
    assert data.startswith(b"HTTP/1.1 404"), data
