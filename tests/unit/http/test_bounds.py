"""What clients can't make grow: connections, bytes, requests in waiting, time."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Awaitable
from typing import Any

import pytest

from controlplane.errors import RequestError
from controlplane.http.asgi import HIGH_WATER_BYTES, AsgiApp
from controlplane.http.limits import ReceivingBudget, ServerLimits
from controlplane.http.messages import Request, Responder
from controlplane.http.server import HttpResponder
from tests.support.http_server import echo, serving, talk
from tests.support.waiting import forever, loop_turns, until_async

QUICK = ServerLimits(sweep_s=0.02, head_s=0.2, body_s=0.2, body_bytes_per_s=10**6, idle_s=0.3)
GET = b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n"


async def drip(port: int, start: bytes, byte: bytes) -> bytes:
    """What a client gets that sends ``start``, and then a byte now and then, without end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start)

    async def send() -> None:
        while True:
            await asyncio.sleep(0.02)
            writer.write(byte)

    sending = asyncio.ensure_future(send())
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""
    finally:
        sending.cancel()
        writer.transport.abort()


@pytest.mark.parametrize(
    ("start", "byte", "message"),
    [
        (b"GET / HTTP/1.1\r\nhost: h\r\nx: ", b"a", b"headers did not arrive"),
        (b"G", b"E", b"not an HTTP/1.1 request"),
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1900\r\n\r\n", b"a", b"body arrived too slowly"),
        (
            b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ",
            b"a",
            b"body arrived too slowly",
        ),
    ],
    ids=["head", "method", "body", "trailer"],
)
async def test_a_request_has_a_deadline_however_slowly_its_bytes_come(
    start: bytes, byte: bytes, message: bytes
) -> None:
    async with serving(echo, limits=QUICK) as (_server, port):
        data = await drip(port, start, byte)
        assert message in data
        assert b"connection: close" in data
        if b"slow" in message:
            assert data.startswith(b"HTTP/1.1 408")
            assert b"request_too_slow" in data


async def test_a_body_has_more_time_the_more_of_it_has_arrived() -> None:
    limits = ServerLimits(body_s=30, body_bytes_per_s=10)
    async with serving(echo, limits=limits) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n" + b"x" * 100)
        await until_async(lambda: any(c.received_bytes == 100 for c in server.connections))
        (connection,) = server.connections
        began_s = connection.last_byte_s
        connection.enforce(began_s + 39)
        writer.write(b"x" * 200)
        await until_async(lambda: connection.received_bytes == 300)
        connection.enforce(began_s + 59)
        assert connection.received_bytes == 300
        connection.enforce(began_s + 61)
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_line_ends_do_not_keep_an_idle_connection() -> None:
    async with serving(echo, limits=QUICK) as (_server, port):
        assert await drip(port, b"", b"\r\n") == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"/x")
        writer.close()


async def test_at_the_limit_of_connections_the_one_that_waited_longest_is_closed() -> None:
    refused: list[RequestError] = []
    limits = ServerLimits(connections=20)
    async with serving(echo, limits=limits, on_refused=refused.append) as (server, port):
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in slow:
            writer.write(b"GET / HTTP/1.1\r\nhost: h\r\nx: ")
        await until_async(lambda: sum(connection.in_request for connection in server.connections) == 20)
        data = await talk(port, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert data.startswith(b"HTTP/1.1 200")
        assert (await asyncio.wait_for(slow[0][0].read(), 5)).startswith(b"HTTP/1.1 503")
        await until_async(lambda: len(server.connections) == 19)
        assert [error.code for error in refused] == ["gateway_exhausted"]
        for _, writer in slow:
            writer.transport.abort()


async def test_an_idle_connection_makes_room_without_an_error() -> None:
    async with serving(echo, limits=ServerLimits(connections=3)) as (_server, port):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for reader, writer in idle:
            writer.write(GET)
            await reader.readuntil(b"/x")
        data = await talk(port, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert data.startswith(b"HTTP/1.1 200")
        assert await asyncio.wait_for(idle[0][0].read(), 5) == b""
        for _, writer in idle:
            writer.close()


async def test_if_every_connection_is_busy_a_new_one_is_refused() -> None:
    async with serving(echo, limits=ServerLimits(connections=2)) as (server, port):
        busy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in busy:
            writer.write(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n")
        await until_async(lambda: sum(connection.busy for connection in server.connections) == 2)
        data = await talk(port, GET)
        assert data.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in data
        for _, writer in busy:
            writer.transport.abort()


async def test_a_lower_limit_of_file_descriptors_holds_for_open_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(echo, limits=ServerLimits(sweep_s=0.02)) as (server, port):
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        await until_async(lambda: len(server.connections) == 100)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
            assert ServerLimits().most_connections() == 86
            await until_async(lambda: len(server.connections) <= 86)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for _, writer in clients:
            writer.close()


async def test_many_large_unfinished_bodies_are_bounded_together_and_small_ones_get_in() -> None:
    refused: list[RequestError] = []
    receiving = ReceivingBudget(1_000_000, "gateway.max_receiving_bytes")
    settings: dict[str, Any] = {"max_body_bytes": 400_000, "receiving": receiving}
    async with serving(echo, on_refused=refused.append, **settings) as (_server, port):
        clients = []
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 390000\r\n\r\n" + b"x" * 300_000)
            clients.append((reader, writer))
        await until_async(lambda: len(refused) >= 5)
        assert receiving.total_bytes <= 1_000_000
        small = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\nconnection: close\r\n\r\n"
        assert (await talk(port, small, b"ok")).endswith(b"ok")
        for _, writer in clients:
            writer.transport.abort()
        await until_async(lambda: receiving.total_bytes == 0)
        assert {error.code for error in refused} == {"gateway_exhausted"}


async def test_one_refused_body_gets_503_with_the_setting() -> None:
    receiving = ReceivingBudget(1000, "gateway.max_receiving_bytes")
    async with serving(echo, receiving=receiving) as (_, port):
        data = await talk(port, b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1900\r\n\r\n" + b"x" * 1500)
        assert data.startswith(b"HTTP/1.1 503")
        assert b"gateway.max_receiving_bytes" in data
        assert b"retry-after: 1" in data


def test_the_budget_drops_the_largest_first() -> None:
    class Body:
        def __init__(self) -> None:
            self.error: RequestError | None = None

        def drop(self, error: RequestError) -> None:
            self.error = error

    budget = ReceivingBudget(800, "s")
    bodies = [Body() for _ in range(4)]
    for body, size in zip(bodies, (100, 300, 250, 100), strict=True):
        budget.hold(body, size)
    assert not any(body.error for body in bodies)
    budget.hold(bodies[0], 160)
    assert [body.error is not None for body in bodies] == [False, True, False, False]
    assert budget.total_bytes == 510
    for body in bodies:
        budget.release(body)
    assert budget.total_bytes == 0


async def test_small_pieces_of_a_body_take_no_more_memory_than_the_body() -> None:
    async with serving(echo, max_body_bytes=2000) as (server, port):
        head = b"POST / HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"2\r\nab\r\n" * 900)
        await until_async(lambda: any(c.received_bytes == 1800 for c in server.connections))
        writer.write(b"0\r\n\r\n")
        assert (await reader.read()).endswith(b"ab" * 900)
        writer.close()


async def test_waiting_requests_of_one_connection_are_bounded() -> None:
    release = asyncio.Event()
    handled: list[str] = []

    def handle(request: Request, out: HttpResponder) -> Awaitable[None]:
        async def answer() -> None:
            handled.append(request.path)
            await release.wait()
            out.send(200, [], b"")

        return answer()

    async with serving(handle) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        count = 5000
        writer.write(GET * count)
        await until_async(lambda: any(c.waiting_requests >= 16 for c in server.connections))
        await loop_turns()
        assert max(connection.waiting_requests for connection in server.connections) < 16 + 16 * 1024 / len(
            GET
        )
        release.set()
        for _ in range(count):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert len(handled) == count
        writer.close()


async def test_a_client_that_reads_a_little_now_and_then_is_dropped() -> None:
    async def much(request: Request, out: Responder) -> None:
        out.send(200, [], b"x" * 16 * 1024 * 1024)

    limits = ServerLimits(sweep_s=0.02, stall_s=0.3)
    async with serving(much, limits=limits) as (server, port):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, GET)
        await until_async(lambda: len(server.connections) == 1)

        async def read() -> None:
            while True:
                await loop.sock_recv(client, 64)
                await asyncio.sleep(0.05)

        reading = asyncio.ensure_future(read())
        await until_async(lambda: not server.connections)
        reading.cancel()
        client.close()


async def test_a_handler_waits_for_a_client_that_does_not_read() -> None:
    written: list[int] = []

    async def endless(request: Request, out: Responder) -> None:
        out.start(200, [])
        while True:
            out.write(b"x" * 10_000)
            written.append(10_000)
            await out.drain()
            await asyncio.sleep(0)

    async with serving(endless) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(GET)
        await until_async(lambda: any(connection.congested for connection in server.connections))
        before = len(written)
        await loop_turns()
        assert len(written) <= before + 1
        assert max(connection.unsent_bytes for connection in server.connections) < 200_000
        writer.transport.abort()
        await until_async(lambda: not server.connections)


# The same behind Serve's ingress.

SCOPE = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"host", b"h")], "query_string": b""}


async def through_asgi(app: AsgiApp, *pieces: bytes, end: bool = False) -> list[dict[str, Any]]:
    """What is sent for a request whose body comes in pieces, without an end unless ``end``."""
    sent: list[dict[str, Any]] = []
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if not left:
            await forever()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not end}

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(dict(SCOPE), receive, send), 5)
    return sent


async def test_the_ingress_has_a_deadline_for_bodies() -> None:
    app = AsgiApp(echo, max_body_bytes=100, limits=ServerLimits(body_s=0.05, body_bytes_per_s=1000))
    sent = await through_asgi(app, b"half")
    assert sent[0]["status"] == 408


async def test_the_ingress_shares_the_bound_of_bodies() -> None:
    receiving = ReceivingBudget(1000, "gateway.max_receiving_bytes")
    refused: list[RequestError] = []
    app = AsgiApp(echo, max_body_bytes=900, receiving=receiving, on_refused=refused.append)
    first = asyncio.ensure_future(through_asgi(app, b"x" * 800))
    await until_async(lambda: receiving.total_bytes == 800)
    second = await through_asgi(app, b"x" * 300, b"y" * 10, end=True)
    assert second[0]["status"] == 200
    assert (await first)[0]["status"] == 503
    assert receiving.total_bytes == 0
    assert [error.code for error in refused] == ["gateway_exhausted"]


async def test_a_response_on_the_ingress_waits_for_a_client_that_does_not_read() -> None:
    written: list[int] = []

    async def endless(request: Request, out: Responder) -> None:
        out.start(200, [])
        while True:
            out.write(b"x" * 10_000)
            written.append(10_000)
            await out.drain()

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await forever()

    async def send(_: Any) -> None:
        await forever()

    messages: list[dict[str, Any]] = [{"type": "http.request"}]
    running = asyncio.ensure_future(AsgiApp(endless, max_body_bytes=10)(dict(SCOPE), receive, send))
    await until_async(lambda: bool(written))
    await loop_turns()
    assert sum(written) <= HIGH_WATER_BYTES + 20_000
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
