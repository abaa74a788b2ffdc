"""What counts as an engine's answer, where it begins and when it is whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from controlplane.core.routing.tier_table import Api
from controlplane.gateway.proxy.first_token import has_content
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.scripted_backend import (
    DONE,
    ROLE,
    STOP,
    STREAM_HEAD,
    Answer,
    backend,
    chunk,
    good,
    response,
)
from tests.support.waiting import until_async


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


CREATED = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","error":null}}\n\n'
    b'event: response.in_progress\ndata: {"type":"response.in_progress","response":{"id":"r"}}\n\n'
)
ITEM = event({"type": "response.output_item.added", "item": {"type": "message", "content": []}}) + event(
    {"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}}
)
START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","content":[]}}\n\n'
    b'event: ping\ndata: {"type": "ping"}\n\n'
)
BLOCK = (
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":'
    b'{"type":"text","text":""}}\n\n'
)
COMPLETED = b'event: response.completed\ndata: {"type":"response.completed","response":{"error":null}}\n\n'
MESSAGE_END = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
BOOM = b'data: {"error":{"message":"boom","code":502}}\n\n'
QUOTA = b'event: error\ndata: {"type":"error","code":"insufficient_quota","message":"boom"}\n\n'
FAILED = b'data: {"type":"response.failed","response":{"error":{"code":"server_error","message":"boom"}}}\n\n'
OVERLOADED = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"boom"}}\n\n'

CHATS: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
BODIES = {
    CHAT: CHATS,
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {**CHATS, "max_tokens": 5},
    "/v1/completions": {"prompt": "hi"},
}
FINE_DELTA = event({"type": "response.output_text.delta", "delta": "fine"})
FINE_BLOCK = event({"type": "content_block_delta", "delta": {"text": "fine"}})
FINE_TEXT = event({"choices": [{"index": 0, "text": "fine", "finish_reason": "stop"}]})
WHOLE = {
    CHAT: [STREAM_HEAD, ROLE, chunk("fine"), STOP, DONE],
    "/v1/responses": [STREAM_HEAD, CREATED, FINE_DELTA, COMPLETED],
    "/v1/messages": [STREAM_HEAD, START, FINE_BLOCK, MESSAGE_END],
    "/v1/completions": [STREAM_HEAD, FINE_TEXT, DONE],
}
OPENINGS: dict[str, tuple[str, list[bytes], dict[str, Any]]] = {
    "comment, then error": (CHAT, [b": OPENROUTER PROCESSING\n\n", BOOM], {}),
    "comment, then cut": (CHAT, [b": keep-alive\n\n"], {}),
    "nothing": (CHAT, [], {}),
    "role, then cut": (CHAT, [ROLE], {}),
    "role with usage, then cut": (CHAT, [chunk(usage={"prompt_tokens": 7, "completion_tokens": 0})], {}),
    "role, then cut, tools": (CHAT, [ROLE], TOOLS),
    "role, then cut, response_format": (CHAT, [ROLE], {"response_format": {"type": "json_object"}}),
    "role, then error": (CHAT, [ROLE, BOOM], {}),
    "filters, then cut": (CHAT, [b'data: {"choices":[],"prompt_filter_results":[{}]}\n\n', ROLE], {}),
    "null choices, then cut": (CHAT, [b'data: {"id":"","choices":null}\n\n'], {}),
    "half an event": (CHAT, [ROLE, b'data: {"choices":[{"index":0,"delta":{"conte'], {}),
    "empty text, then cut": ("/v1/completions", [b'data: {"choices":[{"index":0,"text":""}]}\n\n'], {}),
    "created, then cut": ("/v1/responses", [CREATED], {}),
    "created and an empty item, then cut": ("/v1/responses", [CREATED, ITEM], {}),
    "created, then error": ("/v1/responses", [CREATED, QUOTA], {}),
    "created, then failed": ("/v1/responses", [CREATED, FAILED], {}),
    "created, tools": ("/v1/responses", [CREATED], TOOLS),
    "start and ping, then cut": ("/v1/messages", [START], {}),
    "start and an empty block, then cut": ("/v1/messages", [START, BLOCK], {}),
    "start and ping, then overloaded": ("/v1/messages", [START, OVERLOADED], {}),
    "with carriage returns": (CHAT, [ROLE.replace(b"\n", b"\r\n"), BOOM.replace(b"\n", b"\r\n")], {}),
}


@pytest.mark.parametrize("opening", list(OPENINGS))
async def test_a_stream_that_is_lost_before_its_first_token_is_tried_elsewhere(opening: str) -> None:
    path, events, more = OPENINGS[opening]
    lost = [0]

    def script(request: dict[str, Any]) -> Answer:
        lost[0] += 1
        return [STREAM_HEAD, *events]

    async with running() as rig, backend(rig, "a", script), backend(rig, "b", lambda _: WHOLE[path]):
        load = rig.gateway.endpoint_table.by_endpoint_id["a"]
        for i in range(8):
            load.held_until_s = 0.0
            body = {**BODIES[path], **more, "model": "balanced", "stream": True}
            session = {"x-session-id": f"session {i}"}  # else all go to one endpoint
            async with rig.client.post(rig.base + path, json=body, headers=session) as got:
                assert got.status == 200
                text = await got.text()
            assert "fine" in text
            assert "boom" not in text
            assert text.encode() == b"".join(WHOLE[path][1:])
        assert lost[0]
        assert load.ttft_s is None, "what opens a stream is not its first token"


@pytest.mark.parametrize(
    ("api", "event", "content"),
    [
        (Api.CHAT, ROLE, False),
        (Api.CHAT, b": hi\n\n", False),
        (
            Api.CHAT,
            b'data: {"choices":[{"delta":{"role":"assistant","content":null,"tool_calls":[]}}]}\n\n',
            False,
        ),
        (Api.CHAT, b'data: {"choices":[{"delta":{"content":" "}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{"content":[{"type":"text","text":"x"}]}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{"reasoning_content":"x"}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{"refusal":"x"}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{"audio":{"id":"x"}}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{},"logprobs":{"content":[]}}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[{"delta":{"content":""},"token_ids":[5]}]}\n\n', True),
        (Api.CHAT, b'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n', True),
        (Api.CHAT, b'data: {"something":"new"}\n\n', True),
        (Api.CHAT, b"data: not json\n\n", True),
        (Api.CHAT, DONE, True),
        (Api.RESPONSES, CREATED + ITEM, False),
        (
            Api.RESPONSES,
            b'data: {"type":"response.output_item.added","item":{"type":"function_call"}}\n\n',
            True,
        ),
        (Api.RESPONSES, b'event: response.new\ndata: {"type":"response.new"}\n\n', True),
        (Api.MESSAGES, START + BLOCK, False),
        (
            Api.MESSAGES,
            b'data: {"type":"content_block_start","content_block":{"type":"tool_use","name":"f"}}\n\n',
            True,
        ),
        (Api.EMBEDDINGS, b"data: {}\n\n", True),
    ],
)
def test_where_the_answer_begins(api: Api, event: bytes, content: bool) -> None:
    assert has_content(api, event) is content


async def test_how_a_stream_is_split_into_packets_makes_no_difference() -> None:
    stream = b"".join([ROLE, chunk("fin"), chunk("e"), STOP, DONE])

    async def pieces(size: int) -> None:
        split = [stream[i : i + size] for i in range(0, len(stream), size)]
        async with running() as rig, backend(rig, "a", lambda _: [STREAM_HEAD, *split]):
            seen = await rig.stream(chat_body())
            assert (seen.raw, seen.done) == (stream, True)

    for size in (7, 100, len(stream)):
        await pieces(size)


# -- a 200 that is no answer -----------------------------------------------------------------------------

NO_ANSWERS: dict[str, tuple[Answer, dict[str, Any]]] = {
    "empty": (response(200, b""), {}),
    "blank": (response(200, b" \n"), {}),
    "no content": (b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n", {}),
    "HTML": (response(200, b"<!doctype html><html>login</html>", content_type=b"text/html"), {}),
    "HTML that says it is JSON": (response(200, b"<html>login</html>"), {}),
    "text": (response(200, b"OK"), {}),
    "half of it": (response(200, b'{"choices":[{"message"'), {}),
    "error": (response(200, b'{"error":{"message":"boom","code":502}}'), {}),
    "error as text": (response(200, b'{"error":"boom"}'), {}),
    "object: error": (response(200, b'{"object":"error","message":"boom","code":500}'), {}),
    "type: error": (response(200, b'{"type":"error","error":{"type":"api_error","message":"boom"}}'), {}),
    "redirect": (response(307, b"", b"location: https://x.example/"), {}),
    "HTML for a stream": (response(200, b"<html>login</html>", content_type=b"text/html"), {"stream": True}),
    "empty for a stream": (response(200, b""), {"stream": True}),
    "an empty stream": (STREAM_HEAD, {"stream": True}),
    "an error for a stream": (response(200, b'{"error":{"message":"boom"}}'), {"stream": True}),
    "JSON for a stream": (response(200, b'{"choices":[]}'), {"stream": True}),
    "a stream for JSON": ([STREAM_HEAD, ROLE, chunk("x"), STOP, DONE], {}),
}


@pytest.mark.parametrize("kind", list(NO_ANSWERS))
async def test_a_200_that_is_no_answer_is_tried_elsewhere(kind: str) -> None:
    answer, more = NO_ANSWERS[kind]
    async with running() as rig, backend(rig, "a", lambda _: answer), backend(rig, "b", good):
        attempts = set()
        for i in range(8):
            if more:
                stream = await rig.stream(chat_body(f"text {i}"))
                assert (stream.text, stream.done) == ("fine", True)
                attempts.add(stream.headers.get("x-attempts"))
            else:
                status, headers, value = await rig.post(CHAT, chat_body(f"text {i}"))
                assert (status, value["choices"][0]["message"]["content"]) == (200, "fine")
                attempts.add(headers.get("x-attempts"))
        assert "2" in attempts


@pytest.mark.parametrize("kind", list(NO_ANSWERS))
async def test_a_200_that_is_no_answer_of_the_only_engine_is_an_error_that_says_so(kind: str) -> None:
    answer, more = NO_ANSWERS[kind]
    async with running() as rig, backend(rig, "a", lambda _: answer):
        status, headers, value = await rig.post(CHAT, chat_body(**more))
        assert status in {500, 502}
        assert value["error"]["message"]
        assert headers["x-tier"] == "balanced"


async def test_an_error_body_with_a_clients_status_is_the_clients() -> None:
    body = b'{"error":{"message":"too long","type":"invalid_request_error","code":"context_length_exceeded"}}'
    async with running() as rig, backend(rig, "a", lambda _: response(200, body)) as a:
        async with backend(rig, "b", lambda _: response(200, body)) as b:
            status, _, value = await rig.post(CHAT, chat_body())
            assert (status, value["error"]["message"]) == (400, "too long")
            assert value["error"]["code"] == "context_length_exceeded"
            assert len(a.seen) + len(b.seen) == 1


# -- how it is labelled and where it ends ----------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        b"content-type: Text/Event-Stream",
        b"content-type: text/event-stream;charset=UTF-8",
        b"content-type: text/plain; charset=utf-8",
        b"content-type: application/json",
        b"content-type: application/x-ndjson",
        b"content-type: application/octet-stream",
        b"x-none: 1",
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
async def test_a_stream_is_read_as_one_whatever_its_content_type_says(
    content_type: bytes, mark: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\n" + content_type + b"\r\nconnection: close\r\n\r\n"
    answer = [head, mark + ROLE, chunk("he"), chunk("llo"), STOP, DONE]
    async with running() as rig, backend(rig, "a", lambda _: answer):
        stream = await rig.stream(chat_body())
        assert (stream.text, stream.done) == ("hello", True)
        assert stream.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize(
    "end",
    [
        [STOP],
        [STOP, b"data: [DONE]"],
        [STOP, b"data: [DONE]\n"],
        [STOP, DONE, b": bye\n\n"],
        [STOP.rstrip()],
        [STOP, b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'],
        [STOP, DONE, b'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n'],
        [STOP, b"data:[DONE]\n\n"],
    ],
)
@pytest.mark.parametrize("resume", ["best_effort", "never"])
async def test_a_whole_answer_whose_end_is_spelled_differently_is_whole(
    end: list[bytes], resume: str
) -> None:
    answer = [STREAM_HEAD, ROLE, chunk("he"), chunk("llo"), *end]
    async with running(plane(resume=resume)) as rig, backend(rig, "a", lambda _: answer):
        stream = await rig.stream(chat_body())
        assert (stream.text, stream.finish_reason, stream.error) == ("hello", "stop", None)
        assert stream.raw.rstrip().endswith(end[-1].rstrip()) or b"[DONE]" in stream.raw
        assert b"[DONE]" in stream.raw
        metrics = rig.gateway._own_metrics()
        assert 'tierplane_requests_total{outcome="ok",reason="stream",tier="balanced"} 1.0' in metrics
        assert "tierplane_endpoint_failures_total{" not in metrics


async def test_a_stream_that_ends_without_a_finish_reason_ends_with_an_error_event() -> None:
    answer = [STREAM_HEAD, ROLE, chunk("he"), b'data: {"choices":[{"index":0,"delta":{"content":"l']
    async with running() as rig, backend(rig, "a", lambda _: answer):
        stream = await rig.stream(chat_body())
        assert (stream.text, stream.done) == ("he", False)
        assert stream.error is not None


# -- silence ---------------------------------------------------------------------------------------------


async def _raw(rig: Rig, body: dict[str, Any], **headers: str) -> tuple[int, Any, bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with rig.client.post(rig.base + CHAT, json={**body, "stream": True}, headers=names) as got:
        return got.status, got.headers, await got.read()


async def test_a_stream_that_waits_in_the_queue_sends_comments_if_its_client_asks() -> None:
    async with running() as rig:
        await rig.engine("a", limit=1, ttft_ms=400)
        first = asyncio.ensure_future(rig.stream(chat_body(max_tokens=1)))
        await until_async(lambda: rig.served_by("a"))
        status, headers, raw = await _raw(
            rig, chat_body(max_tokens=1), x_stream_comments="0.1", x_request_id="me"
        )
        assert status == 200
        assert raw.startswith(b": waiting\n\n: waiting\n\n")
        assert raw.endswith(DONE)
        assert headers["x-request-id"] == "me"
        assert (await first).done
        assert b": waiting" not in (await _raw(rig, chat_body(max_tokens=1)))[2], "off by default"


async def test_comments_can_be_switched_on_for_all_streams_and_off_for_one() -> None:
    async with running(plane(stream_comments_s=0.1)) as rig:
        await rig.engine("a", ttft_ms=350)
        assert b": waiting" in (await _raw(rig, chat_body(max_tokens=1)))[2]
        assert b": waiting" not in (await _raw(rig, chat_body(max_tokens=1), x_stream_comments="0"))[2]
        status, _, _ = await rig.post(CHAT, chat_body(max_tokens=1), x_stream_comments="0.1")
        assert status == 200, "an answer that is not streamed has no comments"


async def test_a_retry_behind_comments_stays_unnoticed() -> None:
    async with running() as rig:
        await rig.engine("a", ttft_ms=400)
        stream = asyncio.ensure_future(_raw(rig, chat_body(max_tokens=2), x_stream_comments="0.1"))
        await until_async(lambda: rig.served_by("a"))
        await rig.engine("b", ttft_ms=200)
        rig.kill("a")
        status, _, raw = await stream
        assert status == 200
        assert raw.endswith(DONE)
        assert b"error" not in raw


@pytest.mark.parametrize("answer", [response(400, b'{"error":{"message":"boom"}}'), response(503, b"boom")])
async def test_a_failure_behind_comments_is_an_error_event(answer: bytes) -> None:
    async with running() as rig, backend(rig, "a", lambda _: [b"", answer]):
        status, _, raw = await _raw(rig, chat_body(), x_stream_comments="0.1")
        assert status == 200
        assert raw.startswith(b": waiting\n\n")
        event = json.loads(raw.split(b"data: ")[1])
        assert "boom" in event["error"]["message"]
        assert b"[DONE]" not in raw


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "0.001", "1e9"])
async def test_an_interval_that_is_none_is_a_bad_request(value: str) -> None:
    async with running() as rig:
        status, _, body = await rig.post(CHAT, chat_body(stream=True), x_stream_comments=value)
        assert (status, body["error"]["param"]) == (400, "x-stream-comments")


async def test_comments_are_sent_on_serves_ingress_as_well() -> None:
    async with running() as rig:
        await rig.engine("a", ttft_ms=350)
        body = json.dumps(chat_body(max_tokens=1, stream=True)).encode()
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"x-stream-comments", b"0.1")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
        await asyncio.wait_for(rig.gateway.app(scope, inbox.get, send), 5)
        assert sent[0]["status"] == 200
        pieces = [message["body"] for message in sent[1:] if message["body"]]
        assert pieces[0] == b": waiting\n\n", "at once, not with what follows"
        assert pieces[-1].endswith(DONE)
