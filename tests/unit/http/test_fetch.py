"""GETs of servers that behave and of servers that don't."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.http.fetch import fetch


async def serve_once(response: bytes, hold: bool = False) -> asyncio.Server:
    """A server that sends these bytes on each connection."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()
        if hold:
            await reader.read()
        writer.close()

    return await asyncio.start_server(client, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("response", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, "hi"),
        (b"HTTP/1.1 503 No\r\n\r\nlater", 503, "later"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n3\r\n ho\r\n0\r\n\r\n",
            200,
            "hi ho",
        ),
    ],
)
async def test_every_kind_of_body_is_read(response: bytes, status: int, body: str) -> None:
    server = await serve_once(response)
    async with server:
        port = server.sockets[0].getsockname()[1]
        page = await fetch(f"http://127.0.0.1:{port}/x", secret="key", timeout_s=5)
    assert (page.status, page.text, page.ok) == (status, body, status == 200)


@pytest.mark.parametrize(
    ("location", "status"), [("/there", 200), ("http://127.0.0.2/there", 307), ("", 307), ("/again", 0)]
)
async def test_redirects_are_followed_within_the_host(location: str, status: int) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /there "):
            assert b"Authorization: Bearer key" in head
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        else:
            writer.write(b"HTTP/1.1 307 X\r\nContent-Length: 0\r\nConnection: close\r\n")
            writer.write(f"Location: {location}\r\n\r\n".encode() if location else b"\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        page = await fetch(f"http://127.0.0.1:{port}/x", secret="key", timeout_s=5)
    assert page.status == status
    assert bool(page.error) == (status == 0)


@pytest.mark.parametrize(
    ("response", "hold", "expected"),
    [
        (b"", True, "no response within 0.2 s"),
        (b"", False, "ServerDisconnectedError"),
        (b"nonsense\r\n\r\n", False, "ClientResponseError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", False, "ClientPayloadError"),
    ],
)
async def test_errors_are_returned_and_not_raised(response: bytes, hold: bool, expected: str) -> None:
    server = await serve_once(response, hold)
    async with server:
        port = server.sockets[0].getsockname()[1]
        page = await fetch(f"http://127.0.0.1:{port}/x", timeout_s=0.2)
    assert page.status == 0
    assert expected in str(page)
    assert str(await fetch(f"http://127.0.0.1:{port}/x", timeout_s=1)) == "connection refused"
