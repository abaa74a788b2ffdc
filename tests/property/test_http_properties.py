"""The HTTP server, whatever bytes come: requests in any pieces mean the same, and nothing makes it fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.errors import RequestError
from controlplane.http.access import AccessRules
from controlplane.http.connection import ClientConnection
from controlplane.http.limits import ReceivingBudget
from controlplane.http.messages import Request
from controlplane.http.responder import HttpResponder
from controlplane.http.server import HttpServer

REQUESTS = (
    b"GET /a?b=c HTTP/1.1\r\nHost: h\r\nX-Priority:  high \t\r\n\r\n",
    b"POST /b HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\n\r\nhello",
    b"POST /c HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
    b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nhost: evil.example\r\nx-priority: low\r\n\r\n",
    b"POST /d HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 3\r\n\r\nabc",
    b"\r\nHEAD /e HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\nx",
    b"OPTIONS /f HTTP/1.1\r\nhost: h\r\naccept: */*\r\n\r\n",
)
LAST = b"GET /last HTTP/1.0\r\n\r\n"


class Wire:
    """A transport that remembers what was written, and how it ended."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = write_eof = pause_reading = resume_reading = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0


class Reading(Wire):
    """A transport whose reading may pause."""

    def pause_reading(self) -> None:
        """Nothing more comes meanwhile in these tests: everything is given at once."""

    resume_reading = pause_reading


Seen = list[tuple[str, str, str, tuple[tuple[bytes, bytes], ...], bytes]]


def serve(pieces: Iterable[bytes]) -> tuple[Seen, Wire, list[RequestError], ReceivingBudget]:
    """What a server understands of bytes that come in these pieces, and what it writes."""
    seen: Seen = []
    wire = Reading()
    refused: list[RequestError] = []
    receiving = ReceivingBudget(100_000, "limit")

    def handler(request: Request, out: HttpResponder) -> None:
        headers = tuple(sorted(request.headers.items()))
        seen.append((request.method, request.path, request.query, headers, request.body))
        out.send(200, [], b"ok")

    async def run() -> None:
        server = HttpServer(
            handler,
            max_body_bytes=10_000,
            access=AccessRules(loopback_only=True),
            receiving=receiving,
            on_refused=refused.append,
        )
        connection = ClientConnection(server)
        connection.connection_made(cast(Any, wire))
        for piece in pieces:
            if wire.closed:
                break
            connection.data_received(piece)
            await asyncio.sleep(0)
        connection.connection_lost(None)

    asyncio.run(run())
    return seen, wire, refused, receiving


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The data in pieces."""
    ends = sorted({place % len(data) for place in places} | {0, len(data)})
    return [data[i:j] for i, j in pairwise(ends)]


def test_a_request_cut_at_each_byte_means_the_same() -> None:
    for request in REQUESTS:
        whole, _, _, _ = serve([request + LAST])
        assert len(whole) == 2
        for place in range(1, len(request)):
            assert serve([request[:place], request[place:] + LAST])[0] == whole
        assert serve([bytes([byte]) for byte in request + LAST])[0] == whole


def test_nothing_of_a_trailer_or_an_upgrade_is_seen() -> None:
    for request in REQUESTS:
        ((_, path, _, headers, body), _) = serve([request + LAST])[0]
        assert b"evil.example" not in repr(headers).encode()
        assert b"upgrade" not in dict(headers)
        assert body == {"/b": b"hello", "/c": b"abcde", "/d": b"abc", "/e": b"x"}.get(path, b"")
        assert dict(headers).get(b"x-priority") == (b"high" if path == "/a" else None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=30),
    st.lists(st.integers(min_value=1, max_value=5000), max_size=20),
)
def test_pipelined_requests_in_any_pieces_are_answered_in_order(
    requests: list[bytes], places: list[int]
) -> None:
    data = b"".join(requests) + LAST
    seen, wire, refused, receiving = serve(cut(data, places))
    assert [request[1] for request in seen] == [f"/{'abcdef'[REQUESTS.index(r)]}" for r in requests] + [
        "/last"
    ]
    assert wire.written.count(b"HTTP/1.1 200 OK") == len(requests) + 1
    assert not refused
    assert receiving.total_bytes == 0


PIECES = st.sampled_from(
    [
        *REQUESTS,
        b"GET / HTTP/1.1\r\n",
        b"host: h\r\n",
        b"\r\n",
        b"\n",
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"content-length: 3\r\n",
        b"content-length: +3\r\n",
        b"content-length: 99999999999999999999\r\n",
        b"0\r\n\r\n",
        b"3\r\nabc\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
        b"connection: close\r\n",
        b"content-encoding: gzip\r\n",
        b"expect: 100-continue\r\n",
        b"origin: https://evil.example\r\n",
        b"x: " + b"y" * 20_000 + b"\r\n",
        b" folded\r\n",
        b"POST http://h/x HTTP/1.1\r\n",
        b"CONNECT h:1 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0",
        b"\xff\xfe",
        b"\x16\x03\x01\x02",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES | st.binary(max_size=40), max_size=25))
def test_no_bytes_make_the_server_fail(pieces: list[bytes]) -> None:
    seen, wire, refused, receiving = serve(pieces)
    assert receiving.total_bytes == 0
    assert len(refused) <= 1
    if refused:
        assert 400 <= refused[0].status < 600
        assert b"connection: close\r\n" in wire.written
    for _, _, _, headers, body in seen:
        assert len(body) <= 10_000
        assert dict(headers).get(b"host", b"h") == b"h"


# Two ways to say how long a body is, or an end that another server would see elsewhere: a proxy before this
# server would take a part of one client's body for another's request.
SMUGGLING = [
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nX",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n0\r\n\r\nX",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\ntransfer-encoding: x\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\n transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1, 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: -1\r\n\r\nab",
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 0x2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n2\nab\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\nab\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\nx: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nx: a\r\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nx: a\0b\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nx y: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\n: a\r\n\r\n",
    b"GET / x HTTP/1.1\r\nhost: h\r\n\r\n",
    b"GET / HTTP/1.1 \r\nhost: h\r\n\r\n",
]


def test_no_smuggled_request_is_seen() -> None:
    hidden = b"GET /hidden HTTP/1.1\r\nhost: h\r\n\r\n"
    for shape in SMUGGLING:
        seen, wire, refused, _ = serve([shape + hidden])
        assert [request[1] for request in seen] == [], shape
        assert len(refused) == 1, shape
        assert wire.written.startswith(b"HTTP/1.1 4"), shape
