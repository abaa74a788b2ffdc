from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.routing.tier_table import Api
from controlplane.errors import EndpointLost
from controlplane.gateway.proxy.responses import error_event
from controlplane.gateway.proxy.resume import (
    FOLD_BYTES,
    TOKEN_ID_MEMBERS,
    Continuation,
    NotResumable,
    SentSoFar,
    Splice,
    StreamRecorder,
    plan,
)
from tests.support.gateway import CHAT, Rig, Stream, chat_body, plane, running, scripted_engine, take
from tests.support.waiting import until_async


def sse(*events: dict[str, Any], done: bool = False) -> bytes:
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    return data + (b"data: [DONE]\n\n" if done else b"")


def chunk(
    text: str = "", ids: list[int] | None = None, finish: str | None = None, **more: Any
) -> dict[str, Any]:
    choice = {
        "index": 0,
        "delta": {"content": text},
        "logprobs": None,
        "finish_reason": finish,
        "token_ids": ids,
    }
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
        **more,
    }


OPENING = {
    "id": "c1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
    "prompt_token_ids": [1, 2, 3],
}


def sent_of(*events: dict[str, Any], done: bool = False) -> SentSoFar:
    recorder = StreamRecorder("chat")
    recorder.add(sse(OPENING, *events, done=done))
    return recorder.sent()


def body(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [], "stream": True, "max_tokens": 10, **more}).encode()


# -- live: engines lost in the middle of a stream ---------------------------------------------------


async def lost_after(rig: Rig, events: int, request: dict[str, Any], path: str = CHAT) -> Stream:
    """The stream of a request whose engine is killed after so many events."""

    def kill(count: int) -> None:
        if count == events:
            busy = [load for load in rig.gateway.endpoint_table.by_endpoint_id.values() if load.in_flight]
            rig.kill(busy[0].endpoint.endpoint_id)

    return await rig.stream(request, path, on_event=kill)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("events", [1, 2, 9])
async def test_a_greedy_stream_continues_exactly_where_it_was_lost(path: str, events: int) -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=15)
        await rig.engine("b", itl_ms=15)
        request: dict[str, Any] = {"model": "auto", "max_tokens": 20, "temperature": 0}
        request |= {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
        request["stream_options"] = {"include_usage": True}
        whole = await rig.stream(request, path)
        resumed = await lost_after(rig, events, request, path)
        assert resumed.text == whole.text
        assert resumed.finish_reason == whole.finish_reason == "length"
        assert resumed.usage is not None
        assert whole.usage is not None
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert resumed.usage[name] == whole.usage[name]
        assert resumed.done
        assert len({event["id"] for event in resumed.events}) == 1
        assert b"token_ids" not in resumed.raw
        metrics = rig.gateway.metrics.registry
        assert metrics.get_sample_value("tierplane_resumes_total", {"method": "continue"}) == 1


async def test_a_stream_survives_two_losses() -> None:
    async with running(plane(retry={"max_attempts": 4})) as rig:
        for name in "abc":
            await rig.engine(name, itl_ms=5)
        request = chat_body(max_tokens=30)
        whole = await rig.stream(request)

        def kill(count: int) -> None:
            if count in {5, 12}:
                busy = [load for load in rig.gateway.endpoint_table.by_endpoint_id.values() if load.in_flight]
                rig.kill(busy[0].endpoint.endpoint_id)

        assert (await rig.stream(request, on_event=kill)).text == whole.text


async def test_stop_strings_are_replayed_so_that_one_across_the_loss_still_stops() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=15)
        await rig.engine("b", itl_ms=15)
        words = (await rig.stream(chat_body(max_tokens=20))).text.split(" ")
        request = chat_body(max_tokens=20, stop=[f"{words[8]} {words[9]}"])
        whole = await rig.stream(request)
        resumed = await lost_after(rig, 4, request)
        assert resumed.text == whole.text
        assert resumed.finish_reason == whole.finish_reason == "stop"


async def test_a_stream_that_can_not_be_resumed_ends_with_an_error_event() -> None:
    async with running(plane(resume="never")) as rig:
        await rig.engine("a", itl_ms=15)
        await rig.engine("b", itl_ms=15)
        lost = await lost_after(rig, 5, chat_body(max_tokens=20))
        assert lost.error is not None
        assert lost.error["code"] == "endpoint_lost"
        assert "never" in lost.error["message"]
        assert not lost.done


async def test_an_engine_that_ends_its_answer_early_without_done_is_resumed() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=15)
        whole = await rig.stream(chat_body(max_tokens=20))
        await rig.engine("b", itl_ms=15)
        rig.knobs("a", cut_after_tokens=4)
        for i in range(4):
            assert (await rig.stream(chat_body(max_tokens=20), x_session_id=str(i))).text == whole.text


async def test_an_engine_that_stops_in_mid_stream_is_resumed_by_its_silence() -> None:
    async with running(plane(silence_timeout_s=0.3)) as rig:
        await rig.engine("a", itl_ms=15)
        whole = await rig.stream(chat_body(max_tokens=20))
        await rig.engine("b", itl_ms=15)
        rig.knobs("a", hang_after_tokens=4)
        streams = await asyncio.gather(
            *(rig.stream(chat_body(max_tokens=20), x_session_id=str(i)) for i in range(6))
        )
        assert {stream.text for stream in streams} == {whole.text}


async def test_a_stream_waits_for_its_only_engine_to_come_back() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=5)
        whole = await rig.stream(chat_body(max_tokens=20))

        async def restart(count: int) -> None:
            if count == 6:
                rig.kill("a")
                rig.change("a", state=EndpointState.RESTARTING)
                asyncio.get_running_loop().call_later(
                    0.3, lambda: restarted.append(asyncio.ensure_future(rig.engine("a")))
                )

        restarted: list[Any] = []
        stream = await rig.stream(chat_body(max_tokens=20), on_event=restart)
        assert stream.text == whole.text


async def test_a_resumed_stream_counts_though_its_client_leaves_at_the_last_event() -> None:
    rest = {"index": 0, "text": "two", "token_ids": [11], "finish_reason": "stop"}
    streams = sse(OPENING, chunk("one ", [10])), sse({"choices": [rest]}, done=True)
    async with running() as rig, scripted_engine(*streams) as url:
        for name in "ab":
            await rig.engine(name)
            rig.change(name, base_url=url, generation=2)
        got = await take(rig, chat_body(max_tokens=10), b"data: [DONE]\n\n")
        assert got.count(b'"one "') == got.count(b'"two"') == 1
        value = rig.gateway.metrics.registry.get_sample_value
        await until_async(lambda: value("tierplane_resumes_total", {"method": "continue"}))
        fate = {"tier": "balanced", "outcome": "ok", "reason": "resumed"}
        assert value("tierplane_requests_total", fate) == 1
        assert rig.gateway.info().in_flight == 0


# -- the decision -------------------------------------------------------------------------------------


def test_greedy_continues_from_the_last_event_whose_text_and_ids_agree() -> None:
    sent = sent_of(chunk("a", [10]), chunk("b", [11]), chunk("cd", [12, 13]), chunk("", [14]))
    continuation = plan(body(temperature=0), sent, "exact")
    assert continuation.method == "continue"
    assert continuation.path == "/v1/completions"
    assert continuation.body["prompt"] == [1, 2, 3, 10, 11]
    assert continuation.body["max_tokens"] == 8
    assert continuation.skip_text == "cd"
    assert "messages" not in continuation.body


@pytest.mark.parametrize(
    ("more", "policy", "method"),
    [
        ({"temperature": 0}, "exact", "continue"),
        ({"temperature": 0, "stop": ["x"]}, "exact", "replay"),
        ({"temperature": 0, "presence_penalty": 1}, "exact", "replay"),
        ({"temperature": 0, "response_format": {"type": "json_object"}}, "exact", "replay"),
        ({"temperature": 0, "tools": [{}]}, "exact", "replay"),
        ({"temperature": 0, "tools": [{}], "tool_choice": "none"}, "exact", "continue"),
        ({"temperature": 1, "seed": 7}, "exact", "replay"),
        ({}, "best_effort", "continue"),
        ({"temperature": 0.7}, "exact", "sampling without a seed"),
        ({"stop": ["x"]}, "best_effort", "sampling without a seed"),
        ({"temperature": 0}, "never", "never"),
        ({"temperature": 0, "n": 2}, "best_effort", "'n' is not 1"),
        ({"temperature": 0, "logprobs": True}, "best_effort", "log-probabilities"),
    ],
)
def test_how_a_stream_is_continued(more: dict[str, Any], policy: Any, method: str) -> None:
    sent = sent_of(chunk("a", [10]), chunk("b", [11]))
    if method in {"continue", "replay"}:
        assert plan(body(**more), sent, policy).method == method
    else:
        with pytest.raises(NotResumable, match=method):
            plan(body(**more), sent, policy)


def test_tool_calls_that_were_sent_can_not_be_resumed() -> None:
    event = chunk()
    event["choices"][0]["delta"] = {"tool_calls": [{"index": 0}]}
    with pytest.raises(NotResumable, match="tool calls"):
        plan(body(temperature=0), sent_of(event), "best_effort")


def test_an_answer_without_a_limit_needs_the_context_length() -> None:
    sent = sent_of(chunk("a", [10]))
    request = json.dumps({"model": "m", "messages": [], "temperature": 0}).encode()
    continuation = plan(request, sent, "exact")
    assert continuation.needs_context_length
    assert continuation.limited(100).body["max_tokens"] == 96
    assert continuation.limited(4).method == "finish"
    with pytest.raises(NotResumable, match="context length"):
        continuation.limited(None)


def test_a_stream_that_only_lacks_its_end_is_finished_here() -> None:
    sent = sent_of(chunk("a", [10], "stop"))
    continuation = plan(body(temperature=0), sent, "exact")
    assert continuation.method == "finish"
    end = Splice(continuation, sent, {"include_usage": True}).finish()
    assert b'"completion_tokens":1' in end
    assert end.endswith(b"data: [DONE]\n\n")
    assert b"finish_reason" not in end


def test_all_tokens_sent_but_no_end_is_the_length_limit() -> None:
    sent = sent_of(*(chunk("a", [i]) for i in range(10)))
    continuation = plan(body(temperature=0), sent, "exact")
    assert continuation.method == "finish"
    assert b'"finish_reason":"length"' in Splice(continuation, sent, None).finish()


def test_other_text_than_was_sent_is_refused() -> None:
    sent = sent_of(chunk("a", [10]), chunk("bc", [11, 12]))
    splice = Splice(plan(body(temperature=0), sent, "exact"), sent, None)
    with pytest.raises(NotResumable, match="differs"):
        splice.feed(sse({"choices": [{"index": 0, "text": "x", "token_ids": [11]}]}))


def test_a_recorder_is_bounded_and_loses_nothing() -> None:
    recorder = StreamRecorder("chat")
    recorder.add(sse(OPENING))
    event = sse(chunk("x" * 1000, [7]))
    count = 3 * FOLD_BYTES // len(event)
    for _ in range(count):
        recorder.add(event)
    assert recorder._raw_bytes <= FOLD_BYTES
    sent = recorder.sent()
    assert len(sent.token_ids) == count
    assert sent.text_chars == 1000 * count


def test_the_pattern_removes_members_and_never_text() -> None:
    event = json.dumps(
        {"a": 1, "token_ids": [1, 2], "prompt_token_ids": None}, separators=(",", ":")
    ).encode()
    assert TOKEN_ID_MEMBERS.sub(b"", event) == b'{"a":1}'
    text = json.dumps({"t": ',"token_ids":[1]'}).encode()
    assert TOKEN_ID_MEMBERS.sub(b"", text) == text


@pytest.mark.parametrize("api", list(Api))
def test_every_route_has_its_own_error_event(api: Api) -> None:
    event = error_event(EndpointLost("gone"), api)
    assert b"gone" in event
    assert event.endswith(b"\n\n")
    assert b"[DONE]" not in event


def test_a_finish_needs_no_request() -> None:
    assert Continuation("finish").path == ""
