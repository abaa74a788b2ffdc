from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from controlplane.errors import NoEndpoint, TooManyRequests
from controlplane.gateway.api.agents import MAX_BATCH
from controlplane.gateway.proxy.body import parse, rewrite
from controlplane.gateway.telemetry.metrics import merge_expositions
from controlplane.http.asgi import AsgiApp
from controlplane.http.messages import Request, Responder, error_headers, error_value
from controlplane.http.server import MAX_HEAD_BYTES, HttpServer
from tests.support.gateway import CHAT, chat_body, plane, running
from tests.support.http_server import serving, talk
from tests.support.waiting import forever, until_async


async def echo(request: Request, out: Responder) -> None:
    """Answers with what it was sent; ``/stream`` in pieces, ``/break`` breaks off, ``/slow`` waits."""
    if request.path == "/stream":
        out.start(200, [(b"content-type", b"text/plain")])
        for piece in (b"one ", b"two ", b"three"):
            out.write(piece)
            await out.drain()
        out.finish()
    elif request.path == "/break":
        out.start(200, [])
        out.write(b"half")
        out.abort()
    elif request.path == "/slow":
        await forever()
    else:
        out.send(200, [(b"x-query", request.query.encode())], request.body or request.path.encode())


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
    ("sent", "status", "says"),
    [
        (b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3000\r\n\r\n", 413, b"gateway.max_body_bytes"),
        (b"nonsense\r\n\r\n", 400, b"not an HTTP/1.1 request"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_BYTES + 10), 400, b"headers are over"),
    ],
)
async def test_what_can_not_be_taken_is_answered_and_the_connection_closed(
    served: Any, sent: bytes, status: int, says: bytes
) -> None:
    _, port = served
    data = await talk(port, sent)
    assert data.startswith(b"HTTP/1.1 %d" % status)
    assert says in data
    assert b"connection: close" in data


async def test_an_answer_that_breaks_off_is_seen_to_be_broken(served: Any) -> None:
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


# -- ASGI: what Serve's ingress calls -----------------------------------------------------------------


async def asgi(app: AsgiApp, path: str, body: bytes = b"", *, leave: bool = False) -> list[dict[str, Any]]:
    inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": body[:2], "more_body": True})
    inbox.put_nowait({"type": "http.request", "body": body[2:], "more_body": False})
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
        "root_path": "",
    }
    if leave:
        asyncio.get_running_loop().call_later(0.05, inbox.put_nowait, {"type": "http.disconnect"})
    await asyncio.wait_for(app(scope, inbox.get, send), 5)
    return sent


async def test_asgi_answers_like_the_own_port() -> None:
    app = AsgiApp(echo, max_body_bytes=10, body_limit_setting="gateway.max_body_bytes")
    sent = await asgi(app, "/x", b"body")
    assert sent[0]["status"] == 200
    assert sent[1]["body"] == b"body"
    sent = await asgi(app, "/stream")
    assert b"".join(message.get("body", b"") for message in sent) == b"one two three"
    assert sent[-1]["more_body"] is False
    assert (await asgi(app, "/x", b"b" * 11))[0]["status"] == 413


async def test_asgi_breaks_off_and_cancels_when_the_client_leaves() -> None:
    app = AsgiApp(echo, max_body_bytes=10, body_limit_setting="gateway.max_body_bytes")
    with pytest.raises(RuntimeError, match="broken off"):
        await asgi(app, "/break")
    started_s = asyncio.get_running_loop().time()
    assert await asgi(app, "/slow", leave=True) == []
    assert asyncio.get_running_loop().time() - started_s < 2


# -- bodies, errors, metrics ---------------------------------------------------------------------------


def test_a_rewrite_leaves_other_members_as_they_stand() -> None:
    body = b'{"model":"auto","temperature":0.10,"models":["a"],"nested":{"model":"auto","a" : 1}}'
    changed = rewrite(body, model="x")
    assert changed == b'{"model":"x","temperature":0.10,"nested":{"model":"auto","a" : 1}}'


def test_one_conversation_has_one_affinity_key() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    first = parse(json.dumps({"messages": messages}).encode())
    longer = parse(json.dumps({"messages": [*messages, {"role": "assistant", "content": "a"}]}).encode())
    other = parse(json.dumps({"messages": [messages[0], {"role": "user", "content": "v"}]}).encode())
    assert first.affinity_key() == longer.affinity_key() != other.affinity_key()


def test_errors_are_openai_shaped() -> None:
    value = error_value(NoEndpoint("none"))
    assert value == {
        "error": {"message": "none", "type": "server_error", "param": None, "code": "no_endpoint"}
    }
    assert error_headers(TooManyRequests("full", retry_after_s=1.2)) == [(b"retry-after", b"2")]


def test_expositions_of_several_gateways_become_one() -> None:
    text = (
        '# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n# HELP b B.\n# TYPE b gauge\nb{t="x"} 2.0\n'
    )
    merged = merge_expositions([("g1", text), ("g2", text)])
    assert merged.count("# TYPE a_total counter") == 1
    lines = merged.splitlines()
    assert lines[2:4] == ['a_total{gateway="g1"} 1.0', 'a_total{gateway="g2"} 1.0']
    assert 'b{gateway="g2",t="x"} 2.0' in lines


# -- /chat and /batch ------------------------------------------------------------------------------------


async def test_chat_gives_an_answer_to_a_message() -> None:
    async with running(plane({"name": "balanced"}, {"name": "technical_support"})) as rig:
        await rig.engine("a")
        await rig.engine("b", "technical_support")
        status, _, value = await rig.post("/chat", {"message": "hello", "max_tokens": 3})
        assert status == 200
        assert value["agent_used"] == "balanced"
        assert value["response"]
        assert value["processing_time"] > 0
        _, _, value = await rig.post("/chat", {"message": "hello", "agent_type": "technical"})
        assert value["agent_used"] == "technical_support"


@pytest.mark.parametrize(
    ("body", "status"),
    [({}, 400), ({"message": "x", "nonsense": 1}, 400), ({"message": "x", "model": "none"}, 404)],
)
async def test_a_wrong_chat_is_told_so(body: dict[str, Any], status: int) -> None:
    async with running() as rig:
        await rig.engine("a")
        answered, _, value = await rig.post("/chat", body)
        assert answered == status
        assert value["error"]["message"]


async def test_one_failure_in_a_batch_fails_alone() -> None:
    async with running() as rig:
        await rig.engine("a", ttft_ms=400)
        items = [
            {"id": "one", "message": "hello", "complexity": "simple"},
            {"id": "two", "message": "hello", "complexity": "impossible"},
            {"id": "three"},
            {"message": "hello", "timeout": 0.1},
            {"message": "hello"},
        ]
        status, _, value = await rig.post("/batch", items)
        assert status == 200
        results = value["results"]
        assert [result["id"] for result in results] == ["one", "two", "three", 3, 4]
        assert [result["status"] for result in results] == ["ok", "error", "error", "error", "ok"]
        assert results[3]["error"]["code"] == "deadline_exceeded"
        assert (value["succeeded"], value["failed"]) == (2, 3)
        assert (await rig.post("/batch", [{"message": "x"}] * (MAX_BATCH + 1)))[0] == 400


async def test_a_gateway_drains_what_runs() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=10)
        running_one = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=30)))
        await until_async(lambda: rig.gateway.info().in_flight)
        await rig.gateway.drain(5)
        status, headers, _ = await running_one
        assert status == 200
        assert headers["x-tier"] == "balanced"
