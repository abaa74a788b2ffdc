"""``/chat`` and ``/batch``."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.gateway.api.agents import MAX_BATCH
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
