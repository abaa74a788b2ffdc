"""A lost stream continues only at an engine that serves the same model."""

from __future__ import annotations

import pytest

from controlplane.config import GatewayConfig, PlaneConfig, TierConfig
from tests.support.gateway import chat_body, running


def two_tiers(first: str, second: str) -> PlaneConfig:
    tiers = [
        TierConfig(name=name, engine="simulated", model=model, spill="none")
        for name, model in (("a", first), ("b", second))
    ]
    return PlaneConfig(tiers=tiers, gateway=GatewayConfig())


@pytest.mark.parametrize(
    ("first", "second"),
    [("orga/Llama", "orgb/Llama"), ("/models/qwen/final", "/models/llama/final")],
)
async def test_a_lost_stream_never_continues_with_another_model_of_that_name(first: str, second: str) -> None:
    async with running(two_tiers(first, second)) as rig:
        await rig.engine("ea", "a", cut_after_tokens=3, itl_ms=5)
        await rig.engine("eb", "b", itl_ms=5)
        stream = await rig.stream(chat_body(model="a", max_tokens=20))
        assert stream.error is not None
        assert stream.error["code"] == "endpoint_lost"
        assert not stream.done


async def test_a_lost_stream_continues_with_the_same_model_in_another_tier() -> None:
    async with running(two_tiers("orga/Llama", "orga/Llama")) as rig:
        await rig.engine("ea", "a", cut_after_tokens=3, itl_ms=5)
        await rig.engine("eb", "b", itl_ms=5)
        stream = await rig.stream(chat_body(model="a", max_tokens=20))
        assert stream.error is None
        assert stream.done


async def test_a_lost_stream_does_not_continue_at_a_replica_that_has_a_new_model_already() -> None:
    async with running() as rig:
        await rig.engine("a", cut_after_tokens=3, itl_ms=5)
        rig.change("a", model_identity="orga/Llama")
        await rig.engine("b", itl_ms=5)
        rig.change("b", model_identity="orga/Llama revision=v2")
        rig.change("b", concurrency_limit=1)
        streams = [
            await rig.stream(chat_body(max_tokens=20), x_session_id=str(number)) for number in range(6)
        ]
        lost = [stream for stream in streams if stream.error is not None]
        assert lost
        assert all("another model" in str(stream.error) for stream in lost)


@pytest.mark.parametrize("body", [{"model": "Llama"}, {"models": ["Llama", "a"]}])
async def test_a_name_that_different_models_have_is_refused_with_both(body: dict[str, object]) -> None:
    async with running(two_tiers("orga/Llama", "orgb/Llama")) as rig:
        await rig.engine("ea", "a")
        await rig.engine("eb", "b")
        messages = chat_body()["messages"]
        status, _, answer = await rig.post("/v1/chat/completions", {"messages": messages, **body})
        assert status == 404
        assert "orga/Llama (tier a), orgb/Llama (tier b)" in answer["error"]["message"]
        status, headers, _ = await rig.post(
            "/v1/chat/completions", {"messages": messages, "model": "orgb/Llama"}
        )
        assert (status, headers["x-tier"]) == (200, "b")
        _, listed = await rig.get("/v1/models")
        assert [each["id"] for each in listed["data"]] == ["auto", "a", "b", "orga/Llama", "orgb/Llama"]
        status, answer = await rig.get("/v1/models/Llama")
        assert status == 404
        assert "orga/Llama (tier a), orgb/Llama (tier b)" in answer["error"]["message"]
