"""For tests of the gateway: a gateway on its own port before simulated engines, all in the test's loop.

The engines are the simulated server itself (a timing model, no language model), only not in a process of
their own, so that a test can turn their knobs directly.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from controlplane.config import GatewayConfig, PlaneConfig, QueueConfig, RetryConfig, TierConfig
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.domain.endpoint import Capabilities, Endpoint, EndpointState
from controlplane.engines.simulated.engine import SimulatedSettings
from controlplane.engines.simulated.server import SimulatedServer
from controlplane.gateway.gateway import Gateway

CAPABILITIES = Capabilities(
    resume_by_token_ids=True, embeddings=True, responses=True, messages=True, simulated=True
)
CHAT = "/v1/chat/completions"


def chat_body(text: str = "hello", **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


@dataclass
class Stream:
    """What a client saw of a stream."""

    status: int
    headers: Any
    events: list[dict[str, Any]]
    done: bool
    raw: bytes

    @property
    def text(self) -> str:
        """The text of all events, chat or completion."""
        parts = []
        for event in self.events:
            for choice in event.get("choices", ()):
                parts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
        return "".join(parts)

    @property
    def finish_reason(self) -> str | None:
        """The last finish reason."""
        found = [
            c["finish_reason"] for e in self.events for c in e.get("choices", ()) if c.get("finish_reason")
        ]
        return found[-1] if found else None

    @property
    def usage(self) -> dict[str, Any] | None:
        """The last usage."""
        found = [event["usage"] for event in self.events if event.get("usage")]
        return found[-1] if found else None

    @property
    def error(self) -> dict[str, Any] | None:
        """The error event."""
        return next((event["error"] for event in self.events if "error" in event), None)


class Rig:
    """The gateway, its engines and a client."""

    def __init__(self, config: PlaneConfig) -> None:
        self.config = config
        self.gateway = Gateway(config, "gateway-a")
        self.servers: dict[str, SimulatedServer] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self.version = 0
        self.base = ""
        self.client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))

    async def engine(
        self, name: str, tier: str = "balanced", *, limit: int = 10, **settings: Any
    ) -> SimulatedServer:
        """Start an engine and publish it."""
        known = self.endpoints.get(name)
        server = SimulatedServer(asyncio.get_running_loop(), SimulatedSettings(**settings), f"model-{tier}")
        await server.listen("127.0.0.1", 0)
        self.servers[name] = server
        self.endpoints[name] = Endpoint(
            endpoint_id=name,
            tier=tier,
            model=f"model-{tier}",
            engine="simulated",
            base_url=f"http://127.0.0.1:{server.port}",
            state=EndpointState.READY,
            concurrency_limit=limit,
            generation=known.generation + 1 if known else 1,
            capabilities=CAPABILITIES,
        )
        self.publish()
        return server

    def knobs(self, name: str, **values: Any) -> None:
        """Change an engine's settings."""
        self.servers[name].apply(
            SimulatedSettings.model_validate({**self.servers[name].settings.model_dump(), **values})
        )

    def kill(self, name: str) -> None:
        """An engine is gone at once, with all its connections."""
        server = self.servers[name].http
        server.stop_listening()
        server.abort_connections()

    def served_by(self, name: str) -> int:
        """Requests that the engine is computing."""
        return self.servers[name].scheduler.running

    def change(self, name: str, **values: Any) -> None:
        """Publish an endpoint with other values."""
        self.endpoints[name] = replace(self.endpoints[name], **values)
        self.publish()

    def publish(self, gateways: tuple[GatewayInfo, ...] = ()) -> None:
        """Give the gateway a new snapshot."""
        self.version += 1
        endpoints = tuple(self.endpoints.values())
        self.gateway.apply(ClusterSnapshot("epoch", self.version, time.time(), endpoints, gateways))

    async def post(self, path: str, body: Any, **headers: Any) -> tuple[int, Any, Any]:
        """Status, headers and JSON of a response."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.post(self.base + path, json=body, headers=names) as response:
            return response.status, response.headers, await response.json(content_type=None)

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a response."""
        async with self.client.get(self.base + path) as response:
            return response.status, await response.json(content_type=None)

    async def stream(
        self,
        body: dict[str, Any],
        path: str = CHAT,
        on_event: Callable[[int], Awaitable[None] | None] | None = None,
        **headers: Any,
    ) -> Stream:
        """All of a stream; ``on_event`` is called with the number of events so far."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        events: list[dict[str, Any]] = []
        done = False
        raw = b""
        async with self.client.post(
            self.base + path, json={**body, "stream": True}, headers=names
        ) as response:
            if response.status != 200:
                value = await response.json(content_type=None)
                return Stream(response.status, response.headers, [value], False, b"")
            async for line in response.content:
                raw += line
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    done = True
                    continue
                events.append(json.loads(line[6:]))
                if on_event is not None:
                    waits = on_event(len(events))
                    if waits is not None:
                        await waits
            return Stream(response.status, response.headers, events, done, raw)

    async def close(self) -> None:
        """Stop everything."""
        await self.client.close()
        await self.gateway.drain(1.0)
        for server in self.servers.values():
            await server.http.drain(0.0)


def plane(
    *tiers: dict[str, Any],
    queue: dict[str, Any] | None = None,
    retry: dict[str, Any] | None = None,
    **gateway: Any,
) -> PlaneConfig:
    """A configuration of simulated tiers; one named ``balanced`` if none is given."""
    values = tiers or ({"name": "balanced"},)
    return PlaneConfig(
        tiers=[
            TierConfig(engine="simulated", served_model_name=f"model-{tier['name']}", **tier)
            for tier in values
        ],
        gateway=GatewayConfig(
            queue=QueueConfig(**(queue or {})), retry=RetryConfig(**(retry or {})), **gateway
        ),
    )


@asynccontextmanager
async def running(config: PlaneConfig | None = None) -> AsyncIterator[Rig]:
    """A rig that is stopped at the end."""
    rig = Rig(config or plane())
    try:
        await rig.gateway.start("127.0.0.1", 0)
        rig.base = f"http://127.0.0.1:{rig.gateway.port}"
        yield rig
    finally:
        await rig.close()


@asynccontextmanager
async def scripted_engine(*streams: bytes) -> AsyncIterator[str]:
    """The address of an engine that answers each request with the events of one stream, in turn. All but the
    last are cut off; the last stays open, without the end of its body, until the other side closes it."""
    left = list(streams)

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        events = left.pop(0)
        begin = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(begin + b"%x\r\n%b\r\n" % (len(events), events))
        await writer.drain()
        if not left:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def take(rig: Rig, request: dict[str, Any], until: bytes, path: str = CHAT) -> bytes:
    """What a client has of a stream that hangs up as soon as ``until`` has come, as OpenAI's own does."""
    got = b""
    async with rig.client.post(rig.base + path, json={**request, "stream": True}) as response:
        async for data in response.content.iter_any():
            got += data
            if until in got:
                response.close()
                break
    return got
