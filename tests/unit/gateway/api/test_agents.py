"""``/chat`` and ``/batch``."""

from __future__ import annotations

import json
import tracemalloc
from time import monotonic
from typing import Any

import pytest

from controlplane.errors import BadRequest
from controlplane.gateway.api import agents
from controlplane.gateway.api.agents import MAX_BATCH, CapturedResponse, batch, chat
from controlplane.http.messages import Request, Responder
from tests.support.gateway import plane, running


async def test_chat_responds_to_a_message() -> None:
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
async def test_an_invalid_chat_is_rejected(body: dict[str, Any], status: int) -> None:
    async with running() as rig:
        await rig.engine("a")
        returned, _, value = await rig.post("/chat", body)
        assert returned == status
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


BAD_RESPONSES = {
    "not UTF-8": b'{"choices":[{"message":{"content":"\xdd"}}]}',
    "nested too deep": b'{"choices":[{"message":{"content":%b%b}}]}' % (b"[" * 1500, b"]" * 1500),
    "not JSON": b"<html>",
    "empty": b"",
    "a list": b"[]",
    "no choices": b'{"choices":[]}',
    "another shape": b'{"choices":[{"message":"x"}]}',
}


@pytest.mark.parametrize("name", BAD_RESPONSES)
async def test_an_unreadable_response_of_an_engine_fails_only_its_item(name: str) -> None:
    async def complete(request: Request, out: Responder) -> None:
        bad = b"bad" in request.body
        out.send(200, [], BAD_RESPONSES[name] if bad else b'{"choices":[{"message":{"content":"fine"}}]}')

    out = CapturedResponse()
    body = b'[{"message":"good"},{"message":"bad"},{"message":"good"}]'
    await batch(complete, monotonic, Request("POST", "/batch", "", {}, body), out)
    results = json.loads(out.body)["results"]
    assert [result["status"] for result in results] == ["ok", "error", "ok"]
    assert results[0]["response"] == "fine"
    assert results[1]["error"]["code"] == "engine_error"


@pytest.mark.parametrize("name", ["not UTF-8", "nested too deep", "not JSON", "empty"])
async def test_an_unreadable_error_of_an_engine_keeps_its_status(name: str) -> None:
    async def complete(request: Request, out: Responder) -> None:
        out.send(400, [], BAD_RESPONSES[name])

    out = CapturedResponse()
    await chat(complete, monotonic, Request("POST", "/chat", "", {}, b'{"message":"x"}'), out)
    assert out.status == 400
    assert json.loads(out.body)["error"]["message"]


async def test_the_responses_of_a_batch_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "MAX_BATCH_BYTES", 4000)
    content = b"x" * 1000

    async def complete(request: Request, out: Responder) -> None:
        out.send(200, [], b'{"choices":[{"message":{"content":"%b"}}]}' % content)

    out = CapturedResponse()
    body = json.dumps([{"message": "a"}] * 20).encode()
    await batch(complete, monotonic, Request("POST", "/batch", "", {}, body), out)
    value = json.loads(out.body)
    assert (value["succeeded"], value["failed"]) == (3, 17)
    assert value["results"][-1]["error"]["code"] == "payload_too_large"


async def test_a_batch_of_a_million_items_makes_few_objects() -> None:
    async def complete(request: Request, out: Responder) -> None:
        raise AssertionError("nothing is sent")

    for body in (b"[%b0]" % (b"0," * 4_000_000), b'{"requests":[%b0]}' % (b"{}," * 4_000_000)):
        tracemalloc.start()
        try:
            with pytest.raises(BadRequest, match="1000 items"):
                await batch(complete, monotonic, Request("POST", "/batch", "", {}, body), CapturedResponse())
            assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
        finally:
            tracemalloc.stop()


async def test_a_batch_with_a_byte_order_mark_is_served() -> None:
    async with running() as rig:
        await rig.engine("a")
        data = b'\xef\xbb\xbf[{"message":"hello","max_tokens":2}]'
        async with rig.client.post(rig.base + "/batch", data=data) as response:
            assert (await response.json())["succeeded"] == 1
