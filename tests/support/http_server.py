"""An HTTP server of ours, and a client of it that sends bytes as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from controlplane.http.messages import Request, Responder
from controlplane.http.server import HttpResponder, HttpServer
from tests.support.waiting import forever, loop_turns


@asynccontextmanager
async def serving(
    handler: Callable[[Request, HttpResponder], Awaitable[None] | None], **settings: Any
) -> AsyncIterator[tuple[HttpServer, int]]:
    """A server with this handler, and its port."""
    server = HttpServer(handler, **{"max_body_bytes": 2000, **settings})
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.drain(0.2)


async def talk(port: int, *pieces: bytes) -> bytes:
    """All that the server sends until it closes the connection; each piece reaches it by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await loop_turns()
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return data


async def echo(request: Request, out: Responder) -> None:
    """Sends back the body or else the path; ``/stream`` in pieces, ``/break`` breaks off, ``/slow`` waits."""
    if request.path == "/stream":
        out.start(200, [(b"content-type", b"text/plain")])
        for piece in (b"one ", b"two ", b"three"):
            out.write(piece)
            await out.drain()
        out.finish()
    elif request.path == "/break":
        out.start(200, [])
        out.write(b"half")
        out.abort()
    elif request.path == "/slow":
        await forever()
    else:
        out.send(200, [(b"x-query", request.query.encode())], request.body or request.path.encode())
