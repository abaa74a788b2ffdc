"""Whose fault an error is: the client's, the engine's or the gateway's own."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from controlplane.core.routing.circuit_breaker import BreakerState
from controlplane.core.traffic.counters import TrafficCounters
from controlplane.gateway.proxy.upstream import own_trouble
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.scripted_backend import (
    DONE,
    ROLE,
    STOP,
    STREAM_HEAD,
    Answer,
    Script,
    backend,
    chunk,
    good,
    response,
)
from tests.support.waiting import until_async

TOO_LONG = "Input length (122946 tokens) exceeds the maximum allowed length (16384 tokens)"
NO_IMAGES = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
IMAGE = [
    {"type": "text", "text": "see"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
]

TOO_LONG_EVENTS = {
    "error object": f'data: {{"error":{{"message":"{TOO_LONG}","type":"BadRequestError","code":400}}}}\n\n',
    "spaces": f'data: {{ "error" : {{ "message" : "{TOO_LONG}" , "code" : 400 }} }}\n\n',
    "code as text": f'data: {{"error":{{"message":"{TOO_LONG}","code":"400"}}}}\n\n',
    "type only": f'data: {{"error":{{"message":"{TOO_LONG}","type":"invalid_request_error"}}}}\n\n',
    "code is a word": f'data: {{"error":{{"message":"{TOO_LONG}","code":"context_length_exceeded"}}}}\n\n',
    "status": f'data: {{"error":{{"message":"{TOO_LONG}","status":"INVALID_ARGUMENT"}}}}\n\n',
    "no blank, TGI": f'data:{{"error":"{TOO_LONG}","error_type":"validation"}}\n\n',
    "object: error": f'data: {{"object":"error","message":"{TOO_LONG}","type":"BadRequestError"}}\n\n',
    "chunk": f'data: {{"id":"c","choices":[],"error":{{"code":400,"message":"{TOO_LONG}"}}}}\n\n',
    "choice": f'data: {{"choices":[{{"index":0,"error":{{"code":400,"message":"{TOO_LONG}"}}}}]}}\n\n',
    "error:": f'error: {{"code":400,"message":"{TOO_LONG}","type":"invalid_request_error"}}\n\n',
    "event: error": f'event: error\ndata: {{"message":"{TOO_LONG}","code":400}}\n\n',
    "event:error": f'event:error\r\ndata:{{"error":{{"message":"{TOO_LONG}","code":400}}}}\r\n\r\n',
    "after a role": ROLE.decode() + f'data: {{"error":{{"message":"{TOO_LONG}","code":400}}}}\n\n',
    "after a comment": f': hello\n\ndata: {{"error":{{"message":"{TOO_LONG}","code":422}}}}\n\n',
}

BOOM_EVENTS = {
    "error object": 'data: {"error":{"message":"boom","type":"server_error","code":500}}\n\n',
    "no blank, TGI": 'data:{"error":"Request failed during generation: boom","error_type":"generation"}\n\n',
    "spaces": 'data: { "error": { "message": "boom" } }\n\n',
    "object: error": 'data: {"object": "error", "message": "boom", "param": null, "code": 500}\n\n',
    "chunk": 'data: {"id":"g","choices":[],"error":{"code":502,"message":"boom"}}\n\n',
    "choice": 'data: {"choices":[{"index":0,"finish_reason":"error","error":{"message":"boom"}}]}\n\n',
    "error:": 'error: {"code":500,"message":"boom","type":"server_error"}\n\n',
    "event: error": 'event: error\ndata: {"message":"boom","code":500}\n\n',
    "event: error, text": "event: error\ndata: boom\n\n",
    "two lines": 'data: {"error":\ndata: {"message":"boom"}}\n\n',
    "after a comment": ': PROCESSING\n\ndata: {"error":{"message":"boom","code":502}}\n\n',
    "after a role": ROLE.decode() + 'data: {"error":{"message":"boom","code":502}}\n\n',
}


def is_image(request: dict[str, Any]) -> bool:
    return "image_url" in json.dumps(request)


def text_only(request: dict[str, Any]) -> Answer:
    """llama.cpp without a projector."""
    if is_image(request):
        error = {"code": 500, "message": NO_IMAGES, "type": "server_error"}
        return response(500, json.dumps({"error": error}).encode())
    return good(request)


def no_tool_text(request: dict[str, Any]) -> Answer:
    """A server in whose handler ``tools`` as a string raises an exception."""
    if isinstance(request.get("tools"), str):
        return response(500, b"Internal Server Error", content_type=b"text/plain; charset=utf-8")
    return good(request)


def too_long(event: str) -> Script:
    def script(request: dict[str, Any]) -> Answer:
        if request.get("stream") and "long" in json.dumps(request["messages"]):
            return [STREAM_HEAD, event.encode(), DONE]
        return good(request)

    return script


BAD: dict[str, tuple[Script, dict[str, Any]]] = {
    "an image for a text-only engine": (text_only, {"messages": [{"role": "user", "content": IMAGE}]}),
    "tools as a string": (no_tool_text, {"tools": "all of them"}),
    **{
        f"a prompt that is too long, {name}": (
            too_long(event), {"stream": True, "messages": [{"role": "user", "content": "long"}]},
        )
        for name, event in TOO_LONG_EVENTS.items()
    },
}  # fmt: skip


def counters(rig: Rig) -> TrafficCounters:
    """The figures from which SLO attainment and the alerts of tier ``balanced`` follow."""
    read = rig.gateway.traffic.read(rig.gateway.endpoint_table, rig.gateway.queue)
    return next(each for each in read if each.subject == "balanced")


def metric(rig: Rig, name: str, **labels: str) -> float:
    """The sum of a counter's samples with these labels."""
    return sum(
        sample.value
        for family in rig.gateway.metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def breakers(rig: Rig) -> set[BreakerState]:
    return {load.breaker.state for load in rig.gateway.endpoint_table.by_endpoint_id.values()}


# -- the client's fault ----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoints", [1, 2])
@pytest.mark.parametrize("kind", list(BAD))
async def test_fifty_bad_requests_of_one_client_change_nothing_for_the_others(
    kind: str, endpoints: int
) -> None:
    script, bad = BAD[kind]
    async with running() as rig, backend(rig, "a", script):
        if endpoints == 2:
            async with backend(rig, "b", script):
                await _fifty(rig, bad)
        else:
            await _fifty(rig, bad)


async def _fifty(rig: Rig, bad: dict[str, Any]) -> None:
    for i in range(50):
        status, headers, value = await rig.post(CHAT, chat_body(user=f"client {i}") | bad)
        assert status in {400, 422, 500}
        assert headers["x-should-retry"] == "false"
        assert headers["x-tier"] == "balanced"
        assert int(headers.get("x-attempts", 1)) <= 2
        assert value["error"]["message"]
        if i % 10 == 9:
            status, _, _ = await rig.post(CHAT, chat_body("another client"))
            assert status == 200
    await until_async(lambda: not rig.gateway._relay._attempts.verdicts._checks)
    assert breakers(rig) == {BreakerState.CLOSED}
    seen = counters(rig)
    assert (seen.ok, seen.failed, seen.shed, seen.retried, seen.missed) == (5, 0, 0, 0, 0)
    assert seen.judged == 5, "bad requests count for no SLO"
    assert metric(rig, "tierplane_retries_total") == 0
    assert metric(rig, "tierplane_requests_total", outcome="client_error") == 50
    assert metric(rig, "tierplane_requests_total", outcome="failed") == 0
    assert not any(load.in_flight for load in rig.gateway.endpoint_table.by_endpoint_id.values())


async def test_fifty_bad_requests_in_a_row_with_nobody_else_leave_the_breaker_closed() -> None:
    async with running() as rig, backend(rig, "a", text_only):
        for _ in range(50):
            status, _, value = await rig.post(CHAT, chat_body(messages=[{"role": "user", "content": IMAGE}]))
            assert (status, value["error"]["message"]) == (500, NO_IMAGES)
        assert breakers(rig) == {BreakerState.CLOSED}
        assert (await rig.post(CHAT, chat_body()))[0] == 200


@pytest.mark.parametrize("shape", list(TOO_LONG_EVENTS))
async def test_a_clients_error_in_a_stream_is_answered_with_its_status_and_not_retried(shape: str) -> None:
    async with running() as rig, backend(rig, "a", too_long(TOO_LONG_EVENTS[shape])) as a:
        async with backend(rig, "b", too_long(TOO_LONG_EVENTS[shape])) as b:
            stream = await rig.stream(chat_body("long"))
            assert stream.status in {400, 422}
            assert stream.error is not None
            assert stream.error["message"] == TOO_LONG
            assert "retry-after" not in stream.headers
            assert len(a.seen) + len(b.seen) == 1


async def test_a_clients_error_after_tokens_ends_the_stream_and_is_no_failure_of_the_tier() -> None:
    def script(request: dict[str, Any]) -> Answer:
        error = b'data: {"error":{"message":"context is full","code":400}}\n\n'
        return [STREAM_HEAD, ROLE, chunk("one"), error, DONE]

    async with running() as rig, backend(rig, "a", script):
        stream = await rig.stream(chat_body())
        assert stream.text == "one"
        assert stream.error is not None
        assert stream.error["message"] == "context is full"
        assert not stream.done
        assert counters(rig).failed == 0
        assert breakers(rig) == {BreakerState.CLOSED}


async def test_the_same_refusal_by_a_second_endpoint_is_answered_and_not_tried_a_third_time() -> None:
    async with running() as rig, backend(rig, "a", text_only) as a:
        async with backend(rig, "b", text_only) as b, backend(rig, "c", text_only) as c:
            request = chat_body(messages=[{"role": "user", "content": IMAGE}])
            status, headers, value = await rig.post(CHAT, request)
            assert (status, headers["x-attempts"]) == (500, "2")
            assert value["error"]["message"] == NO_IMAGES
            assert len(a.seen) + len(b.seen) + len(c.seen) == 2


async def test_types_that_engines_take_though_they_are_wrong_raise_nothing() -> None:
    def script(request: dict[str, Any]) -> Answer:
        return [STREAM_HEAD, ROLE, chunk("one"), b'data: {"error":{"code":[],"message":7,"type":{}}}\n\n']

    async with running() as rig, backend(rig, "a", script):
        stream = await rig.stream(chat_body(max_tokens="100"))
        assert stream.error is not None


# -- the engine's fault ----------------------------------------------------------------------------------


def broken(request: dict[str, Any]) -> Answer:
    return response(
        500, b'{"error":{"message":"CUDA error: device-side assert","type":"InternalServerError"}}'
    )


def broken_in_streams(request: dict[str, Any]) -> Answer:
    error = b'data: {"error":{"message":"CUDA error: device-side assert","code":500}}\n\n'
    return [STREAM_HEAD, ROLE, error] if request.get("stream") else broken(request)


@pytest.mark.parametrize(("script", "stream"), [(broken, False), (broken_in_streams, True)])
@pytest.mark.parametrize("names", ["a", "ab"])
async def test_engines_that_are_broken_for_every_request_are_taken_out(
    names: str, script: Script, stream: bool
) -> None:
    tiers = ({"name": "balanced"}, {"name": "capable"})
    async with running(plane(*tiers)) as rig, backend(rig, "a", script), backend(rig, "z", good, "capable"):
        other = backend(rig, "b", script) if names == "ab" else backend(rig, "y", good, "capable")
        async with other:
            for i in range(6):
                body = chat_body(f"text {i}", model="balanced")
                status = (await rig.stream(body)).status if stream else (await rig.post(CHAT, body))[0]
                if names == "a" or i > 2:
                    assert status == 200, "the next tier serves it"
                await until_async(lambda: not rig.gateway._relay._attempts.verdicts._checks)
            loads = rig.gateway.endpoint_table.by_endpoint_id
            assert all(loads[name].breaker.state is BreakerState.OPEN for name in names)
            assert loads["z"].breaker.state is BreakerState.CLOSED
            assert metric(rig, "tierplane_endpoint_failures_total", tier="balanced") > 0


async def test_an_only_engine_that_is_broken_fails_its_requests_and_they_count() -> None:
    async with running() as rig, backend(rig, "a", broken):
        status, headers, value = await rig.post(CHAT, chat_body())
        assert status == 500
        assert "CUDA error" in value["error"]["message"]
        assert "x-should-retry" not in headers
        assert counters(rig).failed == counters(rig).missed == 1
        assert breakers(rig) == {BreakerState.OPEN}


async def test_an_engine_is_to_blame_for_what_its_neighbour_can_answer() -> None:
    async with running() as rig, backend(rig, "a", broken), backend(rig, "b", good):
        for i in range(20):
            assert (await rig.post(CHAT, chat_body(f"text {i}")))[0] == 200
        loads = rig.gateway.endpoint_table.by_endpoint_id
        assert loads["a"].breaker.state is not BreakerState.CLOSED
        assert loads["b"].breaker.state is BreakerState.CLOSED
        assert metric(rig, "tierplane_retries_total", reason="server_error") >= 3


@pytest.mark.parametrize("shape", list(BOOM_EVENTS))
async def test_an_error_before_the_first_token_is_tried_elsewhere_in_every_shape(shape: str) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return [STREAM_HEAD, BOOM_EVENTS[shape].encode(), DONE] if request.get("stream") else good(request)

    tiers = ({"name": "balanced"}, {"name": "capable"})
    async with running(plane(*tiers)) as rig, backend(rig, "a", script), backend(rig, "b", good, "capable"):
        stream = await rig.stream(chat_body(model="balanced"))
        assert (stream.text, stream.done) == ("fine", True)
        assert stream.headers["x-attempts"] == "2"
        assert b"boom" not in stream.raw


@pytest.mark.parametrize("shape", list(BOOM_EVENTS))
async def test_an_error_after_tokens_is_a_failure_of_the_tier_and_ends_with_an_error_event(
    shape: str,
) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return b"".join([STREAM_HEAD, ROLE, chunk("one"), BOOM_EVENTS[shape].encode(), DONE])

    async with running() as rig, backend(rig, "a", script):
        stream = await rig.stream(chat_body())
        assert stream.text == "one"
        assert stream.error is not None
        assert not stream.done
        assert metric(rig, "tierplane_requests_total", outcome="ok") == 0
        assert metric(rig, "tierplane_requests_total", outcome="failed") == 1


@pytest.mark.parametrize(
    "text", ['{"error": {"code": 500}}', "error: none", "event: error\n\ndata: x", '"error"']
)
async def test_text_about_errors_is_text(text: str) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return [STREAM_HEAD, ROLE, chunk("so: "), chunk(text), STOP, DONE]

    async with running() as rig, backend(rig, "a", script):
        stream = await rig.stream(chat_body())
        assert (stream.text, stream.done) == (f"so: {text}", True)


@pytest.mark.parametrize(
    ("status", "event"),
    [
        (429, '{"error":{"message":"x","type":"rate_limit_error"}}'),
        (400, '{"error":{"message":"x","type":"invalid_request_error"}}'),
        (529, '{"type":"error","error":{"type":"overloaded_error","message":"x"}}'),
        (503, '{"error":{"message":"x","type":"unavailable_error","code":503}}'),
    ],
)
async def test_an_error_event_gives_the_status_that_it_carries(status: int, event: str) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return [STREAM_HEAD, f"data: {event}\n\n".encode()]

    async with running() as rig, backend(rig, "a", script):
        assert (await rig.stream(chat_body())).status == status
        assert breakers(rig) == {BreakerState.CLOSED}


# -- back-pressure ---------------------------------------------------------------------------------------

SAYS = {"429": "slow down", "503": "Loading model", "529": "Overloaded"}
BUSY = {
    status: response(int(status), json.dumps({"error": {"message": text}}).encode(), b"retry-after: 17")
    for status, text in SAYS.items()
}


@pytest.mark.parametrize("status", list(BUSY))
async def test_back_pressure_reaches_the_client_with_status_text_tier_and_retry_after(status: str) -> None:
    async with running() as rig, backend(rig, "a", lambda _: BUSY[status]):
        for _ in range(10):
            seen, headers, value = await rig.post(CHAT, chat_body())
            assert str(seen) == status
            assert SAYS[status] in value["error"]["message"]
            assert headers["retry-after"] == "17"
            assert headers["x-tier"] == "balanced"
        assert breakers(rig) == {BreakerState.CLOSED}
        assert metric(rig, "tierplane_retries_total") == 0, "there was nothing to try"


@pytest.mark.parametrize("status", list(BUSY))
async def test_an_endpoint_that_asks_for_a_pause_is_left_alone_while_another_serves(status: str) -> None:
    async with running() as rig, backend(rig, "a", lambda _: BUSY[status]) as a, backend(rig, "b", good):
        for i in range(20):
            assert (await rig.post(CHAT, chat_body(f"text {i}")))[0] == 200
        assert len(a.seen) == 1


async def test_an_endpoint_that_asked_for_a_pause_is_asked_if_no_other_is_left() -> None:
    answers = [BUSY["429"]]
    async with (
        running() as rig,
        backend(rig, "a", lambda request: answers.pop() if answers else good(request)),
    ):
        assert (await rig.post(CHAT, chat_body()))[0] == 429
        assert (await rig.post(CHAT, chat_body()))[0] == 200
        load = rig.gateway.endpoint_table.by_endpoint_id["a"]
        assert load.held_until_s < load.sampled_s + 1e-6, "it serves again, so nothing is held back"


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        (b"retry-after: 0", 1, 1),
        (b"retry-after: -5", 1, 1),
        (b"retry-after: 2.5", 3, 3),
        (b"Retry-After: Fri, 31 Dec 2100 23:59:59 GMT", 600, 600),
        (b"retry-after: Fri, 31 Dec 1999 23:59:59 GMT", 1, 1),
        (b"retry-after: 99999999999", 600, 600),
        (b"retry-after: soon", 5, 5),
        (b"retry-after: nan", 5, 5),
        (b"retry-after-ms: 1500", 2, 2),
    ],
)
async def test_retry_after_is_read_in_every_form_and_bounded(value: bytes, low: int, high: int) -> None:
    async with running() as rig, backend(rig, "a", lambda _: response(429, b"{}", value)):
        _, headers, _ = await rig.post(CHAT, chat_body())
        assert low <= int(headers["retry-after"]) <= high


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (
            response(
                502,
                b"<html><head><title>502 Bad Gateway</title><style>p{}</style></head>nginx</html>",
                content_type=b"text/html",
            ),
            502,
            "502: 502 Bad Gateway nginx",
        ),
        (response(524, b"<!DOCTYPE html><html>timeout &amp; more</html>"), 524, "524: timeout & more"),
        (response(500, b"x" * 5000), 500, "x" * 300),
        (
            response(413, b"<html>413 Request Entity Too Large</html>", content_type=b"text/html"),
            413,
            "Too Large",
        ),
    ],
)
async def test_the_last_failures_status_and_a_short_text_reach_the_client(
    answer: bytes, status: int, says: str
) -> None:
    async with running() as rig, backend(rig, "a", lambda _: answer):
        seen, headers, value = await rig.post(CHAT, chat_body())
        assert seen == status
        assert says in value["error"]["message"]
        assert "<" not in value["error"]["message"]
        assert len(value["error"]["message"]) < 500
        assert headers["x-tier"] == "balanced"


# -- the gateway's own fault -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM]
)
async def test_the_gateways_own_lack_of_resources_blames_no_engine(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any, **__: Any) -> Any:
        raise OSError(number, "no")

    async with running() as rig, backend(rig, "a", good), backend(rig, "b", good):
        loop = SimpleNamespace(create_connection=fails)
        monkeypatch.setattr(rig.gateway._connections, "_loop", loop)
        for _ in range(8):
            status, headers, value = await rig.post(CHAT, chat_body())
            assert (status, value["error"]["code"]) == (503, "gateway_exhausted")
            assert headers["retry-after"] == "1"
        monkeypatch.undo()
        rig.gateway._connections._by_key.clear()
        assert breakers(rig) == {BreakerState.CLOSED}
        assert metric(rig, "tierplane_endpoint_failures_total") == 0
        assert (await rig.post(CHAT, chat_body()))[0] == 200


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (
            OSError("Multiple exceptions: [Errno 24] Too many open files, [Errno 24] Too many open files"),
            True,
        ),
        (
            OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 24] Too many open files"),
            False,
        ),
        (OSError("what"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
        (socket.gaierror(socket.EAI_NONAME, "unknown host"), False),
        (socket.gaierror(socket.EAI_SYSTEM, "system error"), True),
    ],
)
def test_own_trouble_is_told_from_an_engines(error: OSError, own: bool) -> None:
    assert own_trouble(error) is own


async def test_a_deadline_that_passed_is_not_to_be_tried_again_by_an_sdk() -> None:
    async with running() as rig:
        await rig.engine("a", hang=True)
        status, headers, _ = await rig.post(CHAT, chat_body(), x_request_timeout_seconds="0.2")
        assert (status, headers["x-should-retry"]) == (408, "false")


# -- checks ----------------------------------------------------------------------------------------------


def is_check(request: dict[str, Any]) -> bool:
    return request.get("max_tokens") == 1 and "ping" in json.dumps(request)


async def test_a_check_without_a_clear_result_blames_no_endpoint() -> None:
    def script(request: dict[str, Any]) -> Answer:
        return BUSY["429"] if is_check(request) else broken(request)

    async with running() as rig, backend(rig, "a", script):
        for _ in range(5):
            assert (await rig.post(CHAT, chat_body()))[0] == 500
        assert breakers(rig) == {BreakerState.CLOSED}
        assert counters(rig).failed == 5, "nor is it known that the requests were to blame"


async def test_requests_that_fail_together_share_one_check() -> None:
    async with running() as rig, backend(rig, "a", broken) as a:
        statuses = await asyncio.gather(*(rig.post(CHAT, chat_body(f"text {i}")) for i in range(8)))
        assert {status for status, _, _ in statuses} <= {500, 503}
        assert sum(is_check(request) for request in a.seen) <= 2
        assert breakers(rig) == {BreakerState.OPEN}


@pytest.mark.parametrize("bad", [{"tools": "all of them"}, {"stream": True, "user": "long"}])
async def test_a_bad_request_as_a_breakers_probe_does_not_keep_others_out(bad: dict[str, Any]) -> None:
    def script(request: dict[str, Any]) -> Answer:
        if request.get("user") == "long":
            return [STREAM_HEAD, TOO_LONG_EVENTS["chunk"].encode()]
        return no_tool_text(request)

    async with running() as rig, backend(rig, "a", script):
        breaker = rig.gateway.endpoint_table.by_endpoint_id["a"].breaker
        breaker.failure(asyncio.get_running_loop().time() - 1.05, weight=3)
        assert (await rig.post(CHAT, chat_body(**bad)))[0] in {400, 500}
        assert breaker.state is BreakerState.OPEN, "the bad request proved nothing"
        assert (await rig.post(CHAT, chat_body()))[0] == 200
        assert breaker.state is BreakerState.CLOSED


async def test_a_client_that_leaves_before_the_verdict_leaves_nothing_behind() -> None:
    checks: list[int] = []

    def script(request: dict[str, Any]) -> Answer:
        if is_check(request):
            checks.append(1)
            return [b"", response(200, b'{"choices":[]}')]
        return broken(request)

    async with running() as rig, backend(rig, "a", script):
        leaving = asyncio.ensure_future(rig.post(CHAT, chat_body()))
        await until_async(lambda: checks)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await until_async(lambda: not rig.gateway._relay._attempts.verdicts._checks)
        await until_async(lambda: metric(rig, "tierplane_endpoint_failures_total", kind="request") == 1)
        assert breakers(rig) == {BreakerState.CLOSED}
        assert not rig.gateway.info().in_flight


async def test_an_engine_that_fails_every_stream_after_its_first_token_is_taken_out() -> None:
    def script(request: dict[str, Any]) -> Answer:
        error = b'data: {"error":{"message":"CUDA error","code":500}}\n\n'
        return [STREAM_HEAD, ROLE, chunk("one"), error]

    async with running() as rig, backend(rig, "a", script):
        for i in range(10):
            assert (await rig.stream(chat_body(f"text {i}"))).error is not None
        assert breakers(rig) == {BreakerState.OPEN}
