"""Members of other types than the API gives them, in what a client or an engine sent of a lost stream: it is
resumed, or the reason is said."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from controlplane.gateway.proxy import resume
from controlplane.gateway.proxy.resume import (
    NotResumable,
    SentSoFar,
    Splice,
    StreamRecorder,
    plan,
    request_members,
)
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.raw_engine import STREAM_HEAD, attach, raw_engine

HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def event(choice: Any = None, **more: Any) -> dict[str, Any]:
    ids = {"token_ids": [10], "delta": {"content": "a"}, "index": 0, "finish_reason": None}
    return {**HEAD, "choices": [{**ids, **(choice or {})}], **more}


def sent_of(*events: Any) -> SentSoFar:
    recorder = StreamRecorder("chat")
    recorder.add(
        sse({**event({"token_ids": None, "delta": {"role": "assistant"}}), "prompt_token_ids": [1, 2]})
    )
    recorder.add(sse(*events))
    return recorder.sent()


def request(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [], "stream": True, "temperature": 0, **more}).encode()


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        ({"max_tokens": "100"}, 99),
        ({"max_tokens": 100.0}, 99),
        ({"max_completion_tokens": " 100 ", "max_tokens": 7}, 99),
        ({"max_completion_tokens": None, "max_tokens": "7"}, 6),
        ({"max_tokens": 9, "n": "1"}, 8),
        ({"max_tokens": 9, "n": 1.0, "best_of": None}, 8),
        ({"max_tokens": 9, "temperature": "0"}, 8),
        ({"max_tokens": 9, "temperature": "0.0"}, 8),
        ({"max_tokens": 9, "x": 10**40}, 8),
    ],
)
def test_members_that_engines_take_leniently_are_resumed(more: dict[str, Any], limit: int) -> None:
    continuation = plan(request(**more), sent_of(event()), "exact")
    assert (continuation.method, continuation.body["max_tokens"]) == ("continue", limit)
    assert continuation.body["prompt"] == [1, 2, 10]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"max_tokens": "many"}, "'max_tokens' is not a whole number"),
        ({"max_tokens": 1.5}, "'max_tokens' is not a whole number"),
        ({"max_tokens": [1]}, "'max_tokens' is not a whole number"),
        ({"max_completion_tokens": {}}, "'max_completion_tokens' is not a whole number"),
        ({"max_tokens": "9" * 5000}, "'max_tokens' is not a whole number"),
        ({"n": "2"}, "'n' is not 1"),
        ({"n": []}, "'n' is not a whole number"),
        ({"best_of": "all"}, "'best_of' is not a whole number"),
        ({"temperature": "hot"}, "'temperature' is not a number"),
        ({"temperature": [0]}, "'temperature' is not a number"),
        ({"temperature": "1"}, "sampling without a seed"),
    ],
)
def test_members_that_can_not_be_read_are_named(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotResumable, match=reason):
        plan(request(**more), sent_of(event()), "exact")


def test_a_seed_of_any_type_is_sent_again() -> None:
    for seed in (1.5, "7", 10**40):
        continuation = plan(request(temperature=1, seed=seed), sent_of(event()), "exact")
        assert (continuation.method, continuation.body["seed"]) == ("replay", seed)


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperature":0,"stop":1e999}',
        b'{"temperature":0,"stop":"\xff\xfe"}',
        b'{"temperature":0,"stop":"\\ud800"}',
        b'{"temperature":0,"stop":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"[]",
    ],
    ids=["float", "utf8", "surrogate", "deep", "list"],
)
def test_a_request_that_can_not_be_read_again_is_not_resumed(body: bytes) -> None:
    with pytest.raises(NotResumable, match="the request"):
        plan(body, sent_of(event()), "exact")
    assert plan(body, sent_of(event({"finish_reason": "stop"})), "exact").method == "finish"


@pytest.mark.parametrize(
    "wrong",
    [
        event({"token_ids": "abc"}),
        event({"token_ids": {"1": 2}}),
        event({"token_ids": 7}),
        event({"token_ids": [1.5]}),
        event({"token_ids": ["1"]}),
        event({"token_ids": [True]}),
        event({"token_ids": [-1]}),
        event({"delta": "text"}),
        event({"delta": ["text"]}),
        event({"text": ["text"]}),
        event({"finish_reason": {"type": "stop"}}),
        event({"finish_reason": 3}),
        {**HEAD, "choices": {"0": {}}},
        {**HEAD, "choices": "none"},
        {**HEAD, "choices": 1},
        {**HEAD, "choices": ["text"]},
        {**HEAD, "choices": [None]},
    ],
)
def test_events_of_other_types_are_unreadable_and_never_a_type_error(wrong: Any) -> None:
    with pytest.raises(NotResumable, match="the engine's events can't be read"):
        plan(request(), sent_of(event(), wrong), "exact")
    sent = sent_of(event())
    splice = Splice(plan(request(max_tokens=9), sent, "exact"), sent, None)
    with pytest.raises(NotResumable, match="the other engine's events can't be read"):
        splice.feed(sse(wrong))


@pytest.mark.parametrize("ids", ["abc", [None], 3, {"a": 1}, [1.0]])
def test_prompt_ids_that_are_no_list_of_ids_are_unreadable(ids: Any) -> None:
    recorder = StreamRecorder("chat")
    recorder.add(sse({**event(), "prompt_token_ids": ids}))
    with pytest.raises(NotResumable, match="the engine's events can't be read"):
        plan(request(), recorder.sent(), "exact")


@pytest.mark.parametrize("content", [[{"type": "text", "text": "a"}], {"text": "a"}, 7])
def test_content_that_is_no_string_is_not_resumed(content: Any) -> None:
    with pytest.raises(NotResumable, match="tool calls, log-probabilities or reasoning"):
        plan(request(), sent_of(event({"delta": {"content": content}})), "exact")


def test_an_error_member_that_is_null_is_no_error() -> None:
    sent = sent_of(event())
    splice = Splice(plan(request(max_tokens=9), sent, "exact"), sent, None)
    got = splice.feed(sse({**event({"delta": None, "text": "b", "token_ids": [11]}), "error": None}))
    assert b'"content":"b"' in got


def test_usage_that_is_no_object_is_not_sent_on() -> None:
    sent = sent_of(event())
    splice = Splice(plan(request(stop=["x"]), sent, "exact"), sent, {"include_usage": True})
    with pytest.raises(NotResumable, match="can't be read"):
        splice.feed(sse({**HEAD, "choices": [], "usage": "much"}))


def test_a_stream_that_is_too_long_to_store_is_not_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "MAX_TEXT_CHARS", 10)
    monkeypatch.setattr(resume, "FOLD_BYTES", 1000)
    recorder = StreamRecorder("chat")
    for _ in range(100):
        recorder.add(sse(event()))
        assert recorder._sent.text_chars <= 20
    with pytest.raises(NotResumable, match="too much of it was sent"):
        plan(request(), recorder.sent(), "exact")
    recorder.add(sse(event({"finish_reason": "stop"})))
    assert plan(request(), recorder.sent(), "exact").method == "finish"


async def ending(rig: Rig, body: bytes) -> bytes:
    headers = {"content-type": "application/json"}
    async with rig.client.post(rig.base + CHAT, data=body, headers=headers) as response:
        return await response.read()  # a broken chunk would raise


@pytest.mark.parametrize(
    ("body", "sent", "said"),
    [
        (chat_body(stream=True), event({"delta": {"content": [{"type": "text", "text": "a"}]}}), b'"error"'),
        (chat_body(stream=True), event({"token_ids": "abc"}), b'"error"'),
        (chat_body(stream=True, x=10**400), event(), b'"error"'),
        (chat_body(stream=True, n=1.5), event(), b"'n' is not a whole number"),
        (chat_body(stream=True, max_tokens="9"), event({"finish_reason": "stop"}), b"data: [DONE]\n\n"),
    ],
)
async def test_a_lost_stream_never_ends_in_silence(body: dict[str, Any], sent: Any, said: bytes) -> None:
    data = sse(sent)
    cut = STREAM_HEAD + b"%x\r\n%b\r\n" % (len(data), data)
    async with running(plane()) as rig, raw_engine(lambda _: cut, close=True) as engine:
        await attach(rig, engine)
        got = await ending(rig, json.dumps(body).encode())
        assert got.startswith(b"data: ")
        assert said in got, got


async def test_an_error_of_the_gateway_in_a_stream_ends_it_with_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(StreamRecorder, "add", broken)
    data = sse(event(), event({"finish_reason": "stop"}))
    whole = STREAM_HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    async with running(plane()) as rig, raw_engine(lambda _: whole) as engine:
        await attach(rig, engine)
        got = await ending(rig, json.dumps(chat_body(stream=True)).encode())
        assert b"an internal error of the gateway" in got and b"unforeseen" not in got
        assert not rig.gateway.info().in_flight


@pytest.mark.parametrize("finished", [True, False])
async def test_a_request_with_text_that_is_not_utf8_is_finished_or_says_why(finished: bool) -> None:
    body = b'{"stream":true,"temperature":0,"stop":"\xff\xfe","messages":[]}'
    data = sse(event({"finish_reason": "stop" if finished else None}))
    cut = STREAM_HEAD + b"%x\r\n%b\r\n" % (len(data), data)
    async with running(plane()) as rig, raw_engine(lambda _: cut, close=True) as engine:
        await attach(rig, engine)
        got = await ending(rig, body)
        assert (b"data: [DONE]" in got) is finished
        assert (b"the request can't be read again" in got) is not finished


def test_a_long_member_of_a_request_is_sent_again_without_being_decoded() -> None:
    many = b"[%b0]" % (b"[]," * 1_000_000)
    members = request_members(b'{"temperature":0,"max_tokens":5,"messages":[],"seed":%b}' % many)
    assert isinstance(members["seed"], msgspec.Raw)
    assert (members["temperature"], members["max_tokens"]) == (0, 5)
    assert msgspec.json.encode(members).endswith(b'"seed":%b}' % many)
