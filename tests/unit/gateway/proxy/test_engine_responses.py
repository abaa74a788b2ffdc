"""Responses of engines as the protocol allows them, and as it doesn't."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from controlplane.gateway.proxy.upstream import MAX_HEAD_BYTES
from tests.support.gateway import CHAT, chat_body, plane, running
from tests.support.raw_engine import STREAM_HEAD, Received, attach, raw_engine, response, stream
from tests.support.waiting import until_async

WHOLE = {
    "id": "c", "object": "chat.completion", "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}  # fmt: skip
CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}\n\n'
)
LAST = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
BODY = json.dumps(WHOLE).encode()
OK = b"HTTP/1.1 200 OK\r\n"
PLANE = plane(retry={"max_attempts": 1})


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


# -- redirects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [b"307 Temporary Redirect", b"308 Permanent Redirect"])
@pytest.mark.parametrize("absolute", [True, False])
async def test_a_redirect_within_the_host_is_followed_with_body_and_key(
    status: bytes, absolute: bool
) -> None:
    def answer(request: Received) -> bytes:
        if request.line.startswith("POST /v1/chat/completions/ "):
            return response(BODY)
        base = engine.url.encode() if absolute else b""
        return response(b"", b"Location: " + base + b"/v1/chat/completions/", status=status)

    async with running(PLANE) as rig, raw_engine(answer) as engine:
        await attach(rig, engine, secret="key-of-the-tier")
        code, _, value = await rig.post(CHAT, chat_body())
        assert code == 200 and value["choices"][0]["message"]["content"] == "hello"
        first, second = engine.received
        assert first.body == second.body
        assert b"authorization: Bearer key-of-the-tier\r\n" in second.head


@pytest.mark.parametrize(
    ("status", "location", "said"),
    [
        (b"307 X", b"http://user:hunter2@elsewhere.example/v1?key=hunter3", "redirect (307) to http://elsewhere.example/v1,"),
        (b"302 Found", b"/v1/chat/completions/", "redirect (302) to /v1/chat/completions/,"),
        (b"301 Moved", b"https://127.0.0.1/v1/chat/completions", "redirect (301)"),
        (b"303 See Other", b"/x", "redirect (303)"),
        (b"304 Not Modified", b"", "redirect (304) to nowhere"),
        (b"307 X", b"", "redirect (307) to nowhere"),
        (b"308 X", b"http://127.0.0.1:1/v1", "redirect (308)"),
        (b"308 X", b"http://[", "redirect (308) to an invalid address"),
        (b"307 X", b"ftp://127.0.0.1/v1", "redirect (307)"),
        (b"307 X", b"/again", "over 3 redirects"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [True, False])
async def test_other_redirects_are_failures_that_say_so(
    status: bytes, location: bytes, said: str, streaming: bool
) -> None:
    headers = [b"location: " + location] if location else []
    async with running(PLANE) as rig, raw_engine(lambda _: response(b"", *headers, status=status)) as engine:
        await attach(rig, engine, secret="key-of-the-tier")
        code, _, value = await rig.post(CHAT, chat_body(stream=streaming))
        assert code == 502
        assert said in value["error"]["message"], value
        assert "hunter" not in json.dumps(value)
        assert 'outcome="ok"' not in rig.gateway.metrics.text()


# -- compression ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        (b"gzip", gzip.compress),
        (b"X-GZip", gzip.compress),
        (b"gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        (b"deflate", zlib.compress),
        (b"deflate", _raw_deflate),
        (b"identity", bytes),
    ],
)
async def test_compressed_responses_are_decoded(coding: bytes, pack: Any) -> None:
    async with running(PLANE) as rig, raw_engine(lambda _: sent) as engine:
        await attach(rig, engine)
        sent = response(pack(BODY), b"content-encoding: " + coding)
        code, headers, value = await rig.post(CHAT, chat_body())
        assert (code, value) == (200, WHOLE)
        assert "content-encoding" not in headers
        assert b"accept-encoding: identity\r\n" in engine.received[0].head
        packed = pack(CHUNK % b"hel" + CHUNK % b"lo" + LAST)
        pieces = [packed[at : at + 5] for at in range(0, len(packed), 5)]
        sent = stream(*pieces).replace(b"\r\n\r\n", b"\r\ncontent-encoding: " + coding + b"\r\n\r\n", 1)
        seen = await rig.stream(chat_body())
        assert seen.done and seen.text == "hello"
        sent = response(
            pack(b'{"error":{"message":"no such thing"}}'), b"content-encoding: " + coding, status=b"404 X"
        )
        code, _, value = await rig.post(CHAT, chat_body())
        assert code == 404 and value["error"]["message"] == "no such thing"


async def test_a_compressed_stream_is_relayed_as_it_comes() -> None:
    packer = zlib.compressobj(wbits=31)
    piece = packer.compress(CHUNK % b"hel") + packer.flush(zlib.Z_SYNC_FLUSH)
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    async with (
        running(PLANE) as rig,
        raw_engine(lambda _: head + b"%x\r\n%b\r\n" % (len(piece), piece)) as engine,
    ):
        await attach(rig, engine)
        async with rig.client.post(rig.base + CHAT, json=chat_body(stream=True)) as answer:
            assert b'"hel"' in await answer.content.readany()


@pytest.mark.parametrize(
    ("body", "header", "said"),
    [
        (b"br", b"content-encoding: br", "content-encoding 'br'"),
        (b"zstd", b"content-encoding: zstd", "content-encoding 'zstd'"),
        (gzip.compress(gzip.compress(BODY)), b"content-encoding: gzip, gzip", "'gzip, gzip'"),
        (gzip.compress(BODY)[:-9], b"content-encoding: gzip", "the compressed response is cut off"),
        (b"not gzip at all", b"content-encoding: gzip", "can't be decoded: not gzip"),
        (gzip.compress(BODY) + b"more", b"content-encoding: gzip", "can't be decoded: not gzip"),
        (zlib.compress(BODY) + b"more", b"content-encoding: deflate", "can't be decoded: more bytes"),
        (b"bomb", b"content-encoding: gzip", "over 268435456 bytes"),
    ],
    ids=["br", "zstd", "twice", "cut", "plain", "gzip-more", "deflate-more", "bomb"],
)  # fmt: skip
async def test_a_response_that_can_not_be_decoded_is_a_failure(body: bytes, header: bytes, said: str) -> None:
    if body == b"bomb":  # made here, because it takes a second
        body = gzip.compress(bytes(300 * 1024 * 1024), 1)
    async with running(PLANE) as rig, raw_engine(lambda _: response(body, header)) as engine:
        await attach(rig, engine)
        code, _, value = await rig.post(CHAT, chat_body())
        assert code == 502 and said in value["error"]["message"], value


# -- framing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behind",
    [b"XXXX", response(b'{"second":1}'), b"\r\n\r\nmore", OK + b"content-length: 1\r\n\r\nX"],
)
@pytest.mark.parametrize("streaming", [True, False])
async def test_bytes_behind_a_whole_response_are_never_sent_on(behind: bytes, streaming: bool) -> None:
    whole = stream(CHUNK % b"hello", LAST) if streaming else response(BODY)
    async with running(PLANE) as rig, raw_engine(lambda _: whole + behind) as engine:
        await attach(rig, engine)
        for _ in range(2):
            async with rig.client.post(rig.base + CHAT, json=chat_body(stream=streaming)) as answer:
                got = await answer.read()
                assert answer.status == 200
                assert got == (CHUNK % b"hello" + LAST if streaming else BODY)
        assert engine.connections == 2
        await until_async(lambda: not rig.gateway.info().in_flight)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"nonsense\r\n\r\n", "not HTTP"),
        (OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", "not HTTP"),
        (OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}", "not HTTP"),
        (OK + b"content-length: -2\r\n\r\n{}", "not HTTP"),
        (OK + b"x: a\r\n folded\r\ncontent-length: 2\r\n\r\n{}", "not HTTP"),
        (OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", "not HTTP"),
        (OK + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "transfer-encoding"),
        (OK + b"x: " + b"y" * 2 * MAX_HEAD_BYTES, "headers are too large"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, "headers are too large"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", ""),
        (b"HTTP/1.1 099 Odd\r\ncontent-length: 2\r\n\r\n{}", "status 99"),
        (OK + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 200_000, "trailers"),
        (OK + b"transfer-encoding: chunked\r\n\r\n2;" + b"x" * 1_000_000, "chunk extensions"),
    ],
)  # fmt: skip
async def test_a_response_that_breaks_the_protocol_fails_the_attempt(sent: bytes, said: str) -> None:
    async with running(PLANE) as rig, raw_engine(lambda _: sent) as engine:
        await attach(rig, engine)
        code, _, value = await rig.post(CHAT, chat_body())
        assert code == 502 and said in value["error"]["message"], value
        await until_async(lambda: not rig.gateway.info().in_flight)


async def test_trailers_change_no_header() -> None:
    sent = STREAM_HEAD.replace(b"text/event-stream", b"application/json") + b"%x\r\n%b\r\n" % (
        len(BODY),
        BODY,
    )
    async with running(PLANE) as rig, raw_engine(
        lambda _: sent + b"0\r\ncontent-type: text/event-stream\r\ncontent-encoding: br\r\n\r\n"
    ) as engine:  # fmt: skip
        await attach(rig, engine)
        for _ in range(2):
            code, headers, value = await rig.post(CHAT, chat_body())
            assert (code, headers["content-type"], value) == (200, "application/json", WHOLE)
        assert engine.connections == 1
