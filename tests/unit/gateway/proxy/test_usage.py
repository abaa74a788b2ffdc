"""Tokens of requests are the engine's own figures, counted once, and no answer poisons the counters."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from controlplane.gateway.stream_usage import MAX_TOKENS
from tests.support.gateway import CAPABILITIES, CHAT, Rig, chat_body, plane, running
from tests.support.raw_engine import STREAM_HEAD, Received, attach, raw_engine, response, stream

PLAIN = replace(CAPABILITIES, resume_by_token_ids=False)
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
HEAD = '"id":"c","object":"chat.completion.chunk","created":1,"model":"m"'
ROLE = (
    f'{{{HEAD},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"finish_reason":null}}]}}'
)
CHUNK = f'{{{HEAD},"choices":[{{"index":0,"delta":{{"content":"two tokens"}},"finish_reason":null}}]}}'
LAST = f'{{{HEAD},"choices":[{{"index":0,"delta":{{}},"finish_reason":"stop"}}]}}'
USAGE = '"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}'
ONLY_USAGE = f'{{{HEAD},"choices":[],{USAGE}}}'
LAST_WITH_USAGE = LAST.replace("}]}", f"}}],{USAGE}}}")
WHOLE = (
    '{"id":"a","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"content":"hi"}}]%s}'
)


def events(*values: str, done: bool = True) -> bytes:
    data = "".join(f"data: {value}\n\n" for value in values)
    return (data + "data: [DONE]\n\n" * done).encode()


def counted(rig: Rig) -> tuple[float, float]:
    """Prompt and generated tokens in ``/metrics``; ``/usage`` and the controller have the same."""
    text = rig.gateway.metrics.text()
    found = [
        float(value)
        for kind in ("prompt", "generated")
        for value in re.findall(rf'^tierplane_tokens_total{{kind="{kind}",.*}} (.*)$', text, re.MULTILINE)
    ]
    usage = rig.gateway.ledger.tiers["balanced"]
    traffic = next(item for item in rig.gateway.info().traffic if item.subject == "balanced")
    assert [usage.prompt_tokens, usage.generated_tokens] == found or not found
    assert [traffic.prompt_tokens, traffic.generated_tokens] == found or not found
    prompt, generated = found or (0.0, 0.0)
    return prompt, generated


@pytest.mark.parametrize(
    ("sent", "tokens"),
    [
        ((ROLE, CHUNK, CHUNK, LAST, ONLY_USAGE), (7, 5)),
        ((ROLE, CHUNK, LAST_WITH_USAGE), (7, 5)),
        ((ROLE, CHUNK, LAST_WITH_USAGE, ONLY_USAGE), (7, 5)),
        ((ROLE, CHUNK, LAST), (0, 3)),
    ],
    ids=["last event", "last choice", "both", "none"],
)
@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("asks", [True, False])
async def test_tokens_of_a_stream_are_the_engines_own(
    sent: tuple[str, ...], tokens: tuple[int, int], in_one: bool, asks: bool
) -> None:
    pieces = [events(value, done=False) for value in sent] + [events()]
    answer = stream(b"".join(pieces)) if in_one else stream(*pieces)
    async with running() as rig, raw_engine(lambda _: answer) as engine:
        await attach(rig, engine, capabilities=PLAIN)
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if asks else {}
        seen = await rig.stream(chat_body(**more))
        assert seen.done and seen.finish_reason == "stop"
        assert json.loads(engine.received[0].body)["stream_options"] == {"include_usage": True}
        assert counted(rig) == tokens
        extra = [event for event in seen.events if not event["choices"]]
        assert bool(extra) == (asks and ONLY_USAGE in sent)
        assert len(seen.events) == len(sent) - (ONLY_USAGE in sent and not asks)


@pytest.mark.parametrize(
    ("model", "options", "received"),
    [
        ("model-balanced", None, {"include_usage": True}),
        ("auto", None, {"include_usage": True}),
        ("auto", {"include_usage": False, "x": 1}, {"include_usage": True, "x": 1}),
        ("model-balanced", {"continuous_usage_stats": True}, {"include_usage": True}),
        ("auto", {"include_usage": True, "continuous_usage_stats": True}, ...),
        ("auto", "wrong", ...),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_is_asked_for(model: str, options: Any, received: Any, path: str) -> None:
    async with running() as rig, raw_engine(lambda _: stream(events(CHUNK, LAST, ONLY_USAGE))) as engine:
        await attach(rig, engine)
        body = {**chat_body(), "model": model, "prompt": "x"}
        if options is not None:
            body["stream_options"] = options
        assert (await rig.stream(body, path)).done
        got = json.loads(engine.received[0].body)
        assert got["stream_options"] == (options if received is ... else received)
        assert {**got, "model": model, "stream_options": options} == {
            **body, "stream": True, "stream_options": options, "return_token_ids": True,
        } or options == "wrong"  # fmt: skip


async def test_usage_is_not_asked_for_where_it_comes_anyhow() -> None:
    async with running() as rig, raw_engine(lambda _: response(b'{"id":"a"}')) as engine:
        await attach(rig, engine)
        await rig.post(CHAT, chat_body())
        for path in (RESPONSES, MESSAGES):
            await rig.post(
                path, {"model": "auto", "stream": True, "max_tokens": 3, "input": "x", "messages": []}
            )
        assert not any("stream_options" in json.loads(request.body) for request in engine.received)


@pytest.mark.parametrize("status", [b"400 Bad Request", b"422 Unprocessable Entity"])
async def test_an_engine_that_rejects_stream_options_is_asked_without_from_then_on(status: bytes) -> None:
    def answer(request: Received) -> bytes:
        if b"stream_options" in request.body:
            return response(b'{"detail":[{"loc":["body","stream_options"]}]}', status=status)
        return stream(events(ROLE, CHUNK, CHUNK, LAST))

    async with running() as rig, raw_engine(answer) as engine:
        await attach(rig, engine, capabilities=PLAIN)
        for turn in range(1, 4):
            seen = await rig.stream(chat_body())
            assert seen.done and len(seen.events) == 4
            assert len(engine.received) == turn + 1
        assert engine.connections == 1 or engine.connections == 2
        assert counted(rig) == (0, 12), "an estimate: events"
        text = rig.gateway.metrics.text()
        assert "tierplane_endpoint_failures_total{" not in text
        rig.change("a", generation=3)
        await rig.stream(chat_body())
        assert len(engine.received) == 6, "a new engine process is asked again"


async def test_a_clients_own_mistake_about_stream_options_teaches_nothing() -> None:
    def answer(request: Received) -> bytes:
        value = json.loads(request.body)
        if "mistake" in value or "mistake" in value.get("stream_options", {}):
            return response(b'{"error":{"message":"mistake in stream_options"}}', status=b"400 X")
        return stream(events(ROLE, CHUNK, LAST, ONLY_USAGE))

    async with running() as rig, raw_engine(answer) as engine:
        await attach(rig, engine)
        for more in ({"mistake": 1}, {"stream_options": {"mistake": 1}}):
            seen = await rig.stream(chat_body(**more))
            assert seen.status == 400
            assert seen.events[0]["error"]["message"] == "mistake in stream_options"
        assert (await rig.stream(chat_body())).done
        assert counted(rig) == (7, 5)


async def test_another_rejection_reaches_the_client_whole() -> None:
    sent = response(b'{"error":{"message":"no such parameter"}}', status=b"400 X")
    async with running() as rig, raw_engine(lambda _: sent) as engine:
        await attach(rig, engine)
        seen = await rig.stream(chat_body())
        assert (seen.status, len(engine.received)) == (400, 1)
        assert seen.events[0]["error"]["message"] == "no such parameter"


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (
            RESPONSES,
            b'event: response.created\ndata: {"type":"response.created","response":{"usage":null}}\n\n'
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"hi"}\n\n'
            b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":'
            b'{"input_tokens":7,"output_tokens":5}}}\n\n',
        ),
        (
            MESSAGES,
            b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7,'
            b'"output_tokens":1}}}\n\n'
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"hi"}}\n\n'
            b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
            b'"usage":{"output_tokens":5}}\n\n'
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        ),
    ],
)
async def test_usage_of_the_other_routes(path: str, sent: bytes) -> None:
    async with running() as rig, raw_engine(lambda _: stream(sent)) as engine:
        await attach(rig, engine)
        body = {"model": "auto", "stream": True, "max_tokens": 9, "input": "x", "messages": []}
        async with rig.client.post(rig.base + path, json=body) as answer:
            assert await answer.read() == sent
        assert counted(rig) == (7, 5)


@pytest.mark.parametrize(
    "wrong",
    [
        "-1",
        "9" * 400,
        str(MAX_TOKENS + 1),
        "1e999",
        "1.5",
        '"5"',
        "true",
        "[5]",
        "{}",
        "null",
        "9223372036854775808",
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_figure_that_can_not_be_right_is_not_counted(wrong: str, streaming: bool) -> None:
    usage = f'"usage":{{"prompt_tokens":7,"completion_tokens":{wrong}}}'
    whole = response((WHOLE % f",{usage}").encode())
    streamed = stream(events(ROLE, CHUNK, LAST, f'{{{HEAD},"choices":[],{usage}}}'))
    async with running() as rig, raw_engine(lambda _: streamed if streaming else whole) as engine:
        await attach(rig, engine, capabilities=PLAIN)
        if streaming:
            assert (await rig.stream(chat_body())).done
            assert counted(rig) == (7, 3), "an estimate: events"
        else:
            async with rig.client.post(rig.base + CHAT, json=chat_body()) as answer:
                assert answer.status == 200
                assert usage.encode() in await answer.read(), "the client gets what the engine sent"
            assert counted(rig) == (7, 0)
        assert rig.gateway.metrics.wrong_usage.labels("balanced")._value.get() == (wrong != "null")


@pytest.mark.parametrize("usage", ['"usage":"much"', '"usage":[1]', '"usage":null', '"x":1', '"usage":{}'])
async def test_usage_of_another_type_is_missing(usage: str) -> None:
    async with running() as rig, raw_engine(lambda _: response((WHOLE % f",{usage}").encode())) as engine:
        await attach(rig, engine)
        assert (await rig.post(CHAT, chat_body()))[0] == 200
        assert counted(rig) == (0, 0)


@pytest.mark.parametrize("asks", [True, False])
async def test_a_stream_that_lacks_only_its_end_is_counted_once(asks: bool) -> None:
    cut = events(ROLE, CHUNK, LAST, ONLY_USAGE, done=False)
    async with (
        running() as rig,
        raw_engine(lambda _: STREAM_HEAD + b"%x\r\n%b\r\n" % (len(cut), cut), close=True) as engine,
    ):
        await attach(rig, engine)
        more: dict[str, Any] = {"stream_options": {"include_usage": True}} if asks else {}
        seen = await rig.stream(chat_body(**more))
        assert seen.done and (seen.usage is not None) is asks
        assert counted(rig) == (7, 5)


async def test_a_replayed_stream_has_the_tokens_of_the_replay() -> None:
    cut = events(ROLE, CHUNK, done=False)
    answers = [
        STREAM_HEAD + b"%x\r\n%b\r\n" % (len(cut), cut) + b"broken",
        stream(events(ROLE, CHUNK, LAST, ONLY_USAGE)),
    ]
    async with running(plane()) as rig, raw_engine(lambda _: answers.pop(0)) as engine:
        for name in ("a", "b"):
            await attach(rig, engine, name)
        seen = await rig.stream(chat_body())
        assert seen.done and seen.error is None
        assert seen.text == "two tokens"
        assert seen.usage is None
        assert counted(rig) == (7, 5)
        assert json.loads(engine.received[1].body)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("first", [True, False])
async def test_an_event_without_an_end_fails_the_attempt(first: bool) -> None:
    opening = b"" if first else events(ROLE, CHUNK, done=False)
    endless = opening + b"data: " + b"x" * (17 * 1024 * 1024)
    async with (
        running(plane(retry={"max_attempts": 1})) as rig,
        raw_engine(lambda _: STREAM_HEAD + b"%x\r\n%b" % (2 * len(endless), endless)) as engine,
    ):
        await attach(rig, engine)
        seen = await rig.stream(chat_body())
        error = seen.events[0]["error"] if first else seen.error
        assert error is not None and "over 16777216 bytes" in error["message"]
        assert seen.status == (502 if first else 200)
