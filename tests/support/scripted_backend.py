"""An engine whose answers a test scripts: it sees each request's body and gives the response's bytes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from controlplane.core.domain.endpoint import Capabilities, Endpoint, EndpointState
from tests.support.gateway import Rig

Answer = bytes | Iterable[bytes]
"""A whole response, or pieces of it that are sent one after the other; then the connection is closed. With an
empty piece the engine waits for :data:`PAUSE_S`."""
Script = Callable[[dict[str, Any]], Answer]

PAUSE_S = 0.35
PLAIN = Capabilities(responses=True, messages=True)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def response(status: int, body: bytes, *lines: bytes, content_type: bytes = b"application/json") -> bytes:
    """A whole response with more header lines."""
    head = [
        b"HTTP/1.1 %d X" % status,
        b"content-type: " + content_type,
        b"content-length: %d" % len(body),
        b"connection: close",
        *lines,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunk(text: str = "", finish_reason: str | None = None, **more: Any) -> bytes:
    """One event of a chat; without text and reason, it only names the role."""
    delta = {"content": text} if text else {"role": "assistant", "content": ""}
    choice = {"index": 0, "delta": {} if finish_reason else delta, "finish_reason": finish_reason}
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps({**value, **more}).encode() + b"\n\n"


ROLE = chunk()
STOP = chunk(finish_reason="stop")


def good(request: dict[str, Any]) -> Answer:
    """What a healthy engine answers to any chat: ``fine``."""
    if request.get("stream"):
        return [STREAM_HEAD, ROLE, chunk("fine"), STOP, DONE]
    message = {"role": "assistant", "content": "fine"}
    value = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
    return response(200, json.dumps({**value, "choices": choices, "usage": usage}).encode())


class ScriptedBackend:
    """A running scripted engine."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[dict[str, Any]] = []
        """The bodies of the requests, in order."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
            self.seen.append(body)
            answer = self.script(body)
            for piece in [answer] if isinstance(answer, bytes) else answer:
                if not piece:
                    await asyncio.sleep(PAUSE_S)
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.003)  # so that pieces arrive one by one
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def backend(
    rig: Rig,
    name: str,
    script: Script,
    tier: str = "balanced",
    capabilities: Capabilities = PLAIN,
) -> AsyncIterator[ScriptedBackend]:
    """A scripted engine that is published as an endpoint of a tier."""
    scripted = ScriptedBackend(script)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    rig.endpoints[name] = Endpoint(
        endpoint_id=name,
        tier=tier,
        model=f"model-{tier}",
        engine="endpoint",
        base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        state=EndpointState.READY,
        concurrency_limit=64,
        generation=1,
        capabilities=capabilities,
    )
    rig.publish()
    try:
        yield scripted
    finally:
        server.close()
        await server.wait_closed()
