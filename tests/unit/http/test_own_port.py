"""Ordinary requests on a port of this server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.http.limits import MAX_HEAD_BYTES
from controlplane.http.server import HttpServer
from tests.support.http_server import echo, serving, talk
from tests.support.waiting import until_async

CLOSE = b"connection: close\r\n\r\n"


@pytest.fixture
async def served() -> Any:
    async with serving(echo, body_limit_setting="gateway.max_body_bytes") as started:
        yield started


async def test_a_request_in_pieces_and_its_answer(served: Any) -> None:
    _, port = served
    data = await talk(
        port, b"POST /x?a=b HTTP/1.1\r\nhost: h\r\ncontent-le", b"ngth: 4\r\n", CLOSE, b"bo", b"dy"
    )
    assert data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-query: a=b\r\n" in data
    assert data.endswith(b"\r\n\r\nbody")


async def test_pipelined_requests_are_answered_in_order(served: Any) -> None:
    _, port = served
    one = b"GET /%d HTTP/1.1\r\nhost: h\r\n\r\n"
    data = await talk(port, one % 1 + one % 2, b"GET /3 HTTP/1.1\r\nhost: h\r\n" + CLOSE)
    assert data.index(b"/1") < data.index(b"/2") < data.index(b"/3")
    assert data.count(b"HTTP/1.1 200") == 3


async def test_a_stream_is_chunked_and_ends_with_the_connection_for_http_1_0(served: Any) -> None:
    _, port = served
    data = await talk(port, b"GET /stream HTTP/1.1\r\nhost: h\r\n" + CLOSE)
    assert data.endswith(b"4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n")
    data = await talk(port, b"GET /stream HTTP/1.0\r\nhost: h\r\n\r\n")
    assert data.endswith(b"\r\n\r\none two three")


async def test_a_chunked_request_body_is_taken_whole(served: Any) -> None:
    _, port = served
    head = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n" + CLOSE
    assert (await talk(port, head, b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")).endswith(b"abcde")


async def test_expect_continue_and_head(served: Any) -> None:
    _, port = served
    head = b"POST / HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n" + CLOSE
    assert (await talk(port, head, b"ok")).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    data = await talk(port, b"HEAD /abc HTTP/1.1\r\nhost: h\r\n" + CLOSE)
    assert b"content-length: 4\r\n" in data
    assert data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("sent", "status", "expected"),
    [
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3000\r\n\r\n", 413, b"gateway.max_body_bytes"),
        (b"nonsense\r\n\r\n", 400, b"not an HTTP/1.1 request"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_BYTES + 10), 400, b"headers are over"),
    ],
)
async def test_an_invalid_request_gets_an_error_and_the_connection_is_closed(
    served: Any, sent: bytes, status: int, expected: bytes
) -> None:
    _, port = served
    data = await talk(port, sent)
    assert data.startswith(b"HTTP/1.1 %d" % status)
    assert expected in data
    assert b"connection: close" in data


async def test_a_response_that_breaks_off_is_visibly_incomplete(served: Any) -> None:
    _, port = served
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /break HTTP/1.1\r\nhost: h\r\n\r\n")
    data = b""
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        data = await reader.readuntil(b"0\r\n\r\n")
    assert not data.endswith(b"0\r\n\r\n")
    writer.close()


async def test_a_drain_waits_for_what_runs_and_then_ends_it() -> None:
    server = HttpServer(echo, max_body_bytes=100)
    port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n")
    await until_async(lambda: any(connection.busy for connection in server.connections))
    started_s = asyncio.get_running_loop().time()
    await server.drain(0.2)
    assert asyncio.get_running_loop().time() - started_s >= 0.15
    assert await reader.read() == b""
    writer.close()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port)
