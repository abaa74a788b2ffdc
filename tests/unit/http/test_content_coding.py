"""Compressed bodies of requests, on both ways in."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import zstandard

from controlplane.errors import BadRequest, PayloadTooLarge, UnsupportedEncoding
from controlplane.http.asgi import AsgiApp
from controlplane.http.content_coding import coding_of, decode
from controlplane.http.intake import Intake
from controlplane.http.limits import ReceivingBudget
from controlplane.http.messages import Request, Responder
from tests.support.gateway import CHAT, chat_body, running
from tests.support.http_server import echo, serving, talk
from tests.support.waiting import forever, until_async

LIMIT = 3_000_000


def raw_deflate(data: bytes) -> bytes:
    """As some clients send ``deflate``."""
    compress = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compress.compress(data) + compress.flush()


def in_two(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Two members one after the other."""
    return lambda data: compress(data[:7]) + compress(data[7:])


CODERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("gzip", in_two(gzip.compress)),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("zstd", zstandard.compress),
    ("zstd", in_two(zstandard.compress)),
    ("zstd", lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data)),
]


async def decoded(name: str, body: bytes, limit: int = LIMIT) -> bytes:
    return await decode(coding_of(name), body, limit, "a.limit", nullcontext())


@pytest.mark.parametrize(("name", "compress"), CODERS)
@pytest.mark.parametrize("size", [0, 30, 300_000, LIMIT])
async def test_what_was_compressed_comes_out(
    name: str, compress: Callable[[bytes], bytes], size: int
) -> None:
    data = (b'{"model": "auto", "text": "abc"}' * (size // 30 + 1))[:size]
    assert await decoded(name, compress(data)) == data


@pytest.mark.parametrize(("name", "compress"), CODERS)
async def test_a_bomb_ends_at_the_limit(name: str, compress: Callable[[bytes], bytes]) -> None:
    with pytest.raises(PayloadTooLarge, match=r"over 3000000 bytes \(a\.limit\)"):
        await decoded(name, compress(bytes(20 * LIMIT)))
    with pytest.raises(PayloadTooLarge):
        await decoded(name, compress(bytes(101)), limit=100)
    assert await decoded(name, compress(bytes(100)), limit=100) == bytes(100)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("gzip", b"{}"),
        ("gzip", gzip.compress(b"x" * 1000, mtime=0)[:-4]),
        ("gzip", gzip.compress(b"x" * 1000, mtime=0)[:-8] + b"12345678"),
        ("gzip", gzip.compress(b"x", mtime=0) + b"more"),
        ("deflate", zlib.compress(b"x" * 1000)[:-3]),
        ("deflate", b"{}"),
        ("zstd", b"{}"),
        ("zstd", gzip.compress(b"{}", mtime=0)),
    ],
)
async def test_wrong_data_is_the_clients_mistake(name: str, body: bytes) -> None:
    with pytest.raises(BadRequest, match=f"not valid {name}"):
        await decoded(name, body)


async def test_a_window_that_takes_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(BadRequest):
        await decoded("zstd", stream.compress(bytes(100)) + stream.flush())


@pytest.mark.parametrize("name", ["br", "compress", "gzip, gzip", "gzip, zstd", "aes128gcm", "x" * 5000])
def test_other_codings_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(
        UnsupportedEncoding, match="Content-Encoding must be one of gzip, deflate, zstd"
    ) as error:
        coding_of(name)
    assert len(error.value.message) < 200


@pytest.mark.parametrize("name", ["", "identity", " , identity"])
def test_identity_is_no_coding(name: str) -> None:
    assert coding_of(name) == ""


REQUEST = (
    b"POST / HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n%b"
)


async def test_the_own_port_decodes_and_refuses() -> None:
    async with serving(echo, body_limit_setting="a.limit") as (_, port):
        body = gzip.compress(b"x" * 1500)
        assert (await talk(port, REQUEST % (b"gzip", len(body), body))).endswith(b"x" * 1500)
        data = await talk(port, REQUEST % (b"br", 2, b"ok"))
        assert data.startswith(b"HTTP/1.1 415")
        assert b"accept-encoding: gzip, deflate, zstd\r\n" in data
        body = gzip.compress(b"x" * 2001)
        assert (await talk(port, REQUEST % (b"gzip", len(body), body))).startswith(b"HTTP/1.1 413")
        assert (await talk(port, REQUEST % (b"gzip", 2, b"ok"))).startswith(b"HTTP/1.1 400")


async def test_the_ingress_decodes_and_refuses() -> None:
    async def post(coding: bytes, body: bytes) -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await forever()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"h"), (b"content-encoding", coding)]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
        await AsgiApp(echo, max_body_bytes=2000)(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]

    assert await post(b"zstd", zstandard.compress(b"x" * 1500)) == (200, b"x" * 1500)
    assert (await post(b"br", b"ok"))[0] == 415
    assert (await post(b"deflate", zlib.compress(b"x" * 2001)))[0] == 413


async def test_the_handler_sees_a_body_that_was_never_compressed() -> None:
    seen: list[Request] = []

    async def remember(request: Request, out: Responder) -> None:
        seen.append(request)
        out.send(200, [], b"")

    async with serving(remember) as (_, port):
        body = gzip.compress(b"{}")
        await talk(port, REQUEST % (b"gzip", len(body), body))
    assert seen[0].body == b"{}"
    assert set(seen[0].headers) == {b"host", b"connection"}


async def test_decoded_bodies_are_bounded_together() -> None:
    class Out:
        status = 0

        def send(self, status: int, headers: Any, body: bytes) -> None:
            self.status = status

    async def wait(request: Request, out: Any) -> None:
        await release.wait()
        out.send(200, [], b"")

    release = asyncio.Event()
    receiving = ReceivingBudget(250_000, "gateway.max_receiving_bytes")
    intake: Intake[Any] = Intake(wait, max_body_bytes=100_000, receiving=receiving)
    headers = {b"content-encoding": b"gzip"}
    outs = [Out() for _ in range(4)]
    small = gzip.compress(bytes(90_000))
    running = [
        asyncio.ensure_future(
            intake.handle(Request("POST", "/", "", headers, small), out) or asyncio.sleep(0)
        )
        for out in outs
    ]
    await until_async(lambda: [out.status for out in outs].count(503) == 2)
    release.set()
    await asyncio.gather(*running)
    assert sorted(out.status for out in outs) == [200, 200, 503, 503]
    assert receiving.decoded_bytes == 0


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("zstd", zstandard.compress)])
async def test_agents_that_compress_their_requests_get_an_answer(
    coding: str, compress: Callable[[bytes], bytes]
) -> None:
    async with running() as rig:
        await rig.engine("a")
        data = compress(json.dumps(chat_body("hi")).encode())
        headers = {"content-encoding": coding, "content-type": "application/json"}
        async with rig.client.post(rig.base + CHAT, data=data, headers=headers) as response:
            assert response.status == 200
            assert (await response.json())["choices"][0]["message"]["content"]


def flushed_zstd(data: bytes) -> bytes:
    """All of ``data`` in a block that is not the last one."""
    compress = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return (
        compress.compress(data)
        + compress.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        + compress.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)
    )


@pytest.mark.parametrize(
    ("name", "compress"), [*CODERS, ("zstd", flushed_zstd), ("zstd", lambda data: flushed_zstd(data) * 2)]
)
async def test_a_compressed_body_that_is_cut_off_anywhere_is_refused(
    name: str, compress: Callable[[bytes], bytes]
) -> None:
    body = compress(b"{}" * 20)
    assert await decoded(name, body)
    for cut in range(1, len(body)):
        try:
            whole = await decoded(name, body[:cut])
        except BadRequest:
            continue
        assert len(whole) in (7, 40), cut  # cut between two members
    for cut in range(1, 5):
        with pytest.raises(BadRequest, match="is not valid"):
            await decoded(name, body[:-cut])


async def test_a_body_of_many_empty_blocks_is_refused_without_counting_them_all() -> None:
    head = zstandard.ZstdCompressor(write_content_size=False).compress(b"")[:-3]
    with pytest.raises(BadRequest, match="over 20000 blocks"):
        await decoded("zstd", head + bytes(3) * 1_000_000 + b"\1\0\0")
