"""Large bodies that have arrived whole: how much of them a gateway holds."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from controlplane.errors import RequestError
from controlplane.http.limits import LARGE_BODY_BYTES, ReceivingBudget, ServerLimits
from controlplane.http.messages import Request, Responder
from tests.support.http_server import serving
from tests.support.waiting import loop_turns, until_async

LARGE = 90_000


def post(size: int, path: str = "/x") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % (path.encode(), size) + b"x" * size


def holds(budget: ReceivingBudget, size_bytes: int) -> bool:
    return budget.handled_bytes == size_bytes


async def test_large_bodies_that_are_handled_are_bounded_together() -> None:
    release = asyncio.Event()

    async def wait(request: Request, out: Responder) -> None:
        await release.wait()
        out.send(200, [], b"")

    refused: list[RequestError] = []
    receiving = ReceivingBudget(100_000, "gateway.max_receiving_bytes")
    settings: dict[str, Any] = {
        "max_body_bytes": 100_000,
        "receiving": receiving,
        "on_refused": refused.append,
    }
    async with serving(wait, **settings) as (_, port):
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        for count, (_, writer) in enumerate(clients, 1):
            writer.write(post(LARGE))
            if count <= 4:
                await until_async(partial(holds, receiving, count * LARGE))
        await until_async(lambda: len(refused) == 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(10))
        release.set()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        answers = [await one.readline() for one, _ in clients]
        assert [answer[9:12] for answer in answers] == [b"200"] * 4 + [b"503"] * 2
        assert "4 times gateway.max_receiving_bytes" in refused[0].message
        await until_async(partial(holds, receiving, 0))
        for _, one in [*clients, (reader, writer)]:
            one.close()


async def test_large_bodies_behind_a_request_that_runs_wait_in_the_kernel() -> None:
    release = asyncio.Event()
    seen: list[int] = []

    async def wait(request: Request, out: Responder) -> None:
        if request.path == "/slow":
            await release.wait()
        seen.append(len(request.body))
        out.send(200, [], b"")

    size = 8_000_000
    async with serving(wait, max_body_bytes=size, receiving=ReceivingBudget(size, "s")) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(1, "/slow") + b"".join(post(size) for _ in range(5)) + post(2))
        await until_async(lambda: len(server.connections) == 1)
        (connection,) = server.connections
        await until_async(lambda: connection.received_bytes > LARGE_BODY_BYTES)
        for _ in range(100):
            await loop_turns()
        assert connection.received_bytes < 1_000_000
        assert connection.waiting_requests == 0
        release.set()
        for _ in range(7):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert seen == [1, *[size] * 5, 2]
        writer.close()


async def test_responses_that_no_client_reads_are_bounded_together() -> None:
    async def much(request: Request, out: Responder) -> None:
        out.send(200, [], bytes(12_000_000 if request.path == "/most" else 6_000_000))

    limits = ServerLimits(sweep_s=0.02, unsent_bytes=9_000_000)
    async with serving(much, limits=limits) as (server, port):
        clients = []
        for path in ("/most", "/x"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(post(1, path))
            clients.append((reader, writer))
        await until_async(lambda: len(server.connections) == 1)
        (left,) = server.connections
        assert 0 < left.unsent_bytes <= 6_000_200
        for _, writer in clients:
            writer.transport.abort()
