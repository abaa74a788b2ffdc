"""Large requests and responses: how much of them is copied, held and decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from controlplane.gateway.proxy import attempt, engine_errors
from controlplane.gateway.proxy.engine_errors import MAX_MEMBER_BYTES, whole_error
from tests.support.gateway import CHAT, chat_body, plane, running
from tests.support.raw_engine import attach, raw_engine, response

ANSWER = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]
}


def test_of_a_long_response_only_what_may_be_an_error_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = engine_errors._decode

    def counting(text: Any) -> Any:
        decoded.append(len(text))
        return decode(text)

    monkeypatch.setattr(engine_errors, "_decode", counting)
    many = b"[%b0]" % (b"[]," * 1_000_000)
    assert whole_error(b'{"x":{"error":1},"data":%b}' % many, b"") is None
    assert whole_error(b'[{"error":1},%b]' % many, b"") is None
    found = whole_error(b'{"data":%b,"error":{"code":400,"message":"too long"}}' % many, b"")
    assert found is not None
    assert (found.status, found.message) == (400, "too long")
    assert whole_error(b'{"error":%b}' % many, b"") is not None
    assert max(decoded) <= MAX_MEMBER_BYTES


def test_a_long_response_that_is_nested_too_deep_is_no_answer() -> None:
    found = whole_error(b'{"y":"%b","error":%b%b}' % (b" " * 2_000_000, b"[" * 5000, b"]" * 5000), b"")
    assert found is not None
    assert found.is_no_answer


async def test_long_responses_of_one_engine_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "MAX_HELD_BYTES", 1_000_000)
    long = response(json.dumps({**ANSWER, "pad": "x" * 3_000_000}).encode())
    short = response(json.dumps(ANSWER).encode())
    async with running(plane()) as rig, raw_engine(lambda r: long if b"long" in r.body else short) as engine:
        await attach(rig, engine)
        for _ in range(5):
            status, _, value = await rig.post(CHAT, chat_body("long"))
            assert (status, value["error"]["code"]) == (503, "gateway_exhausted")
        status, _, _ = await rig.post(CHAT, chat_body("short"))
        assert status == 200


@pytest.mark.parametrize("size", [10, 64 * 1024, 900_000])
async def test_a_request_of_any_length_arrives_as_it_was_sent(size: int) -> None:
    body = {**chat_body("x" * size), "model": "other"}
    async with running(plane()) as rig, raw_engine(lambda _: response(json.dumps(ANSWER).encode())) as engine:
        await attach(rig, engine)
        body["model"] = "auto"
        for _ in range(2):
            status, _, _ = await rig.post(CHAT, body)
            assert status == 200
        first, second = (json.loads(received.body) for received in engine.received[-2:])
        assert first == second
        assert first["messages"] == body["messages"]
