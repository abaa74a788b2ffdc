"""Requests as HTTP allows them, though few clients write them so; and some that it forbids."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from controlplane.http.asgi import AsgiApp
from controlplane.http.messages import Request, Responder
from controlplane.http.server import HttpResponder
from tests.support.http_server import serving, talk
from tests.support.waiting import forever, until_async

CLOSE = b"connection: close\r\n\r\n"


async def show(request: Request, out: Responder) -> None:
    """Sends back the method, path, headers and body."""
    lines = [request.method.encode(), request.path.encode()]
    lines += [name + b"=" + value for name, value in sorted(request.headers.items())]
    out.send(200, [], b"|".join([*lines, request.body]))


@pytest.mark.parametrize("cut", [0, 40, 120, 150])
async def test_trailers_are_no_headers(cut: int) -> None:
    head = b"POST /x HTTP/1.1\r\nhost: h\r\nx-priority: low\r\ntransfer-encoding: chunked\r\n" + CLOSE
    whole = head + b"2\r\nok\r\n0\r\nX-Priority: high\r\nX-New: 1\r\nhost: evil.example\r\n\r\n"
    async with serving(show) as (_, port):
        data = await talk(port, *([whole[:cut], whole[cut:]] if cut else [whole]))
    assert data.startswith(b"HTTP/1.1 200")
    assert b"x-priority=low" in data
    assert b"x-new" not in data
    assert b"host=h|" in data


async def test_a_request_behind_trailers_has_its_own_headers() -> None:
    first = b"POST /1 HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-new: 1\r\n\r\n"
    async with serving(show) as (_, port):
        data = await talk(port, first + b"GET /2 HTTP/1.1\r\nhost: h\r\nx-own: 2\r\n" + CLOSE)
    assert b"x-new" not in data
    assert b"x-own=2" in data


@pytest.mark.parametrize("value", [b"high ", b"high\t", b" high \t "])
async def test_blanks_around_a_headers_value_are_not_part_of_it(value: bytes) -> None:
    async with serving(show) as (_, port):
        data = await talk(port, b"GET /x HTTP/1.1\r\nhost: h\r\nx-priority:" + value + b"\r\n" + CLOSE)
    assert b"|x-priority=high|" in data


async def test_an_expectation_of_http_1_0_is_ignored() -> None:
    head = b"POST /x HTTP/1.%d\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n" + CLOSE
    async with serving(show) as (_, port):
        assert (await talk(port, head % 0 + b"ok")).startswith(b"HTTP/1.1 200")
        assert (await talk(port, head % 1 + b"ok")).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


async def test_very_many_pipelined_offers_to_upgrade_are_all_answered() -> None:
    one = b"GET /x HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    async with serving(show) as (_, port):
        data = await talk(port, one * 2000 + b"GET /last HTTP/1.1\r\nhost: h\r\n" + CLOSE)
    assert data.count(b"HTTP/1.1 200") == 2001


async def test_http_1_0_with_an_upgrade_gets_no_chunks_and_its_own_version() -> None:
    async def stream(request: Request, out: Responder) -> None:
        out.start(200, [])
        out.write(b"text")
        out.finish()

    async with serving(stream) as (_, port):
        head = b"GET /x HTTP/1.0\r\nconnection: upgrade, keep-alive\r\nupgrade: h2c\r\n\r\n"
        assert (await talk(port, head)).endswith(b"\r\n\r\ntext")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + CLOSE, 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n" + CLOSE, 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n" + CLOSE, 400),
        (b"GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n" + CLOSE, 400),
        (b"GET / HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/2.0\r\nhost: h\r\n" + CLOSE, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"BREW / HTTP/1.1\r\nhost: h\r\n" + CLOSE, 501),
        (b"CONNECT h:1 HTTP/1.1\r\nhost: h\r\n" + CLOSE, 400),
    ],
)
async def test_one_host_a_known_version_and_a_known_method_are_needed(head: bytes, status: int) -> None:
    async with serving(show) as (_, port):
        data = await talk(port, head)
    assert data.startswith(b"HTTP/1.1 %d " % status)
    assert data.count(b"content-length: ") == 1


@pytest.mark.parametrize(("hosts", "version", "status"), [(0, "1.1", 400), (2, "1.1", 400), (0, "1.0", 200)])
async def test_the_ingress_needs_one_host_too(hosts: int, version: str, status: int) -> None:
    sent: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = [{"type": "http.request"}]

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await forever()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "http_version": version,
        "headers": [(b"host", b"h")] * hosts,
    }
    await AsgiApp(show, max_body_bytes=10)(scope, receive, send)
    assert sent[0]["status"] == status


async def test_a_path_is_without_percent_encoding() -> None:
    async with serving(show) as (_, port):
        data = await talk(port, b"GET /v1/models/a%2Fb HTTP/1.1\r\nhost: h\r\n" + CLOSE)
    assert b"GET|/v1/models/a/b|" in data


async def test_a_header_can_not_be_split_by_a_value_from_elsewhere() -> None:
    async def split(request: Request, out: Responder) -> None:
        headers = [(b"x-tier", b"a\r\nset-cookie: b\0"), (b"x-\nname", b"c")]
        out.send(200, headers, b"") if request.path == "/send" else out.start(200, headers)
        out.finish()

    async with serving(split) as (_, port):
        for path in (b"/send", b"/start"):
            data = await talk(port, b"GET " + path + b" HTTP/1.1\r\nhost: h\r\n" + CLOSE)
            assert b"x-tier: a  set-cookie: b \r\n" in data
            assert b"x- name: c\r\n" in data


# A client that closes its sending direction has not left.


async def half_closed(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    writer.write_eof()
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return data


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("path", [b"/whole", b"/stream"])
async def test_a_client_that_half_closes_gets_its_answer(version: bytes, path: bytes) -> None:
    async def later(request: Request, out: Responder) -> None:
        for _ in range(5):
            await asyncio.sleep(0.02)
        if request.path == "/whole":
            out.send(200, [], b"answer")
        else:
            out.start(200, [])
            for piece in (b"an", b"sw", b"er"):
                await asyncio.sleep(0.02)
                out.write(piece)
            out.finish()

    async with serving(later) as (_, port):
        data = await half_closed(port, b"GET " + path + b" HTTP/" + version + b"\r\nhost: h\r\n\r\n")
    chunked = path == b"/stream" and version == b"1.1"
    end = b"2\r\nan\r\n2\r\nsw\r\n2\r\ner\r\n0\r\n\r\n" if chunked else b"answer"
    assert data.endswith(b"\r\n\r\n" + end)


async def test_a_client_that_has_left_is_noticed_although_it_looks_half_closed() -> None:
    ended: list[str] = []

    def handle(request: Request, out: HttpResponder) -> Awaitable[None]:
        async def wait() -> None:
            try:
                await forever()
            finally:
                ended.append(request.path)

        return wait()

    async with serving(handle) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /left HTTP/1.1\r\nhost: h\r\n\r\n")
        await until_async(lambda: any(connection.busy for connection in server.connections))
        writer.close()
        await until_async(lambda: ended == ["/left"])
        await until_async(lambda: not server.connections)


async def test_a_client_that_leaves_a_silent_stream_is_noticed() -> None:
    ended: list[str] = []

    async def stream(request: Request, out: Responder) -> None:
        out.start(200, [])
        out.write(b"first")
        try:
            await forever()
        finally:
            ended.append(request.path)

    async with serving(stream) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /stream HTTP/1.1\r\nhost: h\r\n\r\n")
        await reader.readuntil(b"first\r\n")
        writer.close()
        await until_async(lambda: ended == ["/stream"])
