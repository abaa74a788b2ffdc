"""An engine whose responses a test writes byte by byte."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.support.gateway import Rig

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Received(NamedTuple):
    """One request that the engine received."""

    line: str
    head: bytes
    body: bytes


@dataclass
class RawEngine:
    """The address of the engine, and what it received."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    connections: int = 0


def response(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole response with a length; JSON unless ``headers`` have another type."""
    lines = [b"HTTP/1.1 " + status, b"content-length: %d" % len(body), *headers]
    if not any(header.lower().startswith(b"content-type:") for header in headers):
        lines.append(b"content-type: application/json")
    return b"\r\n".join([*lines, b"", body])


def stream(*pieces: bytes) -> bytes:
    """A stream of events in these chunks."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return STREAM_HEAD + chunks + b"0\r\n\r\n"


@asynccontextmanager
async def raw_engine(answer: Callable[[Received], bytes], *, close: bool = False) -> AsyncIterator[RawEngine]:
    """An engine that answers with the bytes of ``answer``; ``close``: and then closes the connection."""
    engine = RawEngine()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                request = Received(head.split(b"\r\n", 1)[0].decode(), head, body)
                engine.received.append(request)
                writer.write(answer(request))
                await writer.drain()
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()


async def attach(rig: Rig, engine: RawEngine, name: str = "a", **values: Any) -> None:
    """Publish the engine as an endpoint of the rig."""
    await rig.engine(name)
    rig.change(name, **{"base_url": engine.url, "generation": 2, **values})
