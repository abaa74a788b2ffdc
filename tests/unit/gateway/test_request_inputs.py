"""Images, audio, video and tools that no engine of the tiers takes are refused before an engine sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from controlplane.core.domain.endpoint import Capabilities
from controlplane.core.routing.tier_table import INPUT_BITS, Input
from controlplane.gateway.request_inputs import first_part, inputs_of
from tests.support.gateway import CHAT, chat_body, plane, running
from tests.support.scripted_backend import backend, good

TEXT_ONLY = Capabilities(responses=True, messages=True, images=False, audio=False, video=False, tools=False)
SEES = Capabilities(responses=True, messages=True)
IN_MESSAGE, IN_INPUT = "messages[0].content[1]", "input[0].content[1]"
TEXT = {"type": "text", "text": "what is this?"}
PARTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "image_url": (
        CHAT,
        {"type": "image_url", "image_url": {"url": "data:,"}},
        IN_MESSAGE,
        "images",
    ),
    "input_audio": (CHAT, {"type": "input_audio", "input_audio": {}}, IN_MESSAGE, "audio"),
    "audio_url": (CHAT, {"type": "audio_url", "audio_url": {}}, IN_MESSAGE, "audio"),
    "video_url": (CHAT, {"type": "video_url", "video_url": {}}, IN_MESSAGE, "video"),
    "image": ("/v1/messages", {"type": "image", "source": {}}, IN_MESSAGE, "images"),
    "input_image": (
        "/v1/responses",
        {"type": "input_image", "image_url": "data:,"},
        IN_INPUT,
        "images",
    ),
}


def body_with(path: str, part: dict[str, Any]) -> dict[str, Any]:
    items = [{"role": "user", "content": [TEXT, part]}]
    return {"model": "balanced", "max_tokens": 5, "input" if path == "/v1/responses" else "messages": items}


@pytest.mark.parametrize("kind", list(PARTS))
async def test_a_part_that_no_engine_takes_is_refused_and_named(kind: str) -> None:
    path, part, where, what = PARTS[kind]
    async with running() as rig, backend(rig, "a", good, capabilities=TEXT_ONLY) as a:
        status, _, value = await rig.post(path, body_with(path, part))
        assert status == 400
        assert value["error"]["message"] == f"no engine of balanced takes {what}: see {where}"
        assert not a.seen
        status, _, _ = await rig.post(CHAT, chat_body(f'he said: {{"type":"{kind}"}}, "tools": [{{'))
        assert status == 200, "text about parts is text"


async def test_tools_that_no_engine_takes_are_refused() -> None:
    async with running() as rig, backend(rig, "a", good, capabilities=TEXT_ONLY) as a:
        tools = [{"type": "function", "function": {"name": "f"}}]
        status, _, value = await rig.post(CHAT, chat_body(tools=tools))
        assert (status, value["error"]["param"]) == (400, "tools")
        assert not a.seen
        assert (await rig.post(CHAT, chat_body(tools=[])))[0] == 200


async def test_an_endpoint_that_is_not_known_gets_everything() -> None:
    async with running() as rig, backend(rig, "a", good) as a:
        status, _, _ = await rig.post(CHAT, body_with(CHAT, PARTS["image_url"][1]))
        assert status == 200
        assert len(a.seen) == 1


async def test_an_image_goes_to_the_neighbour_that_sees() -> None:
    tiers = ({"name": "balanced"}, {"name": "capable"})
    async with running(plane(*tiers)) as rig, backend(rig, "a", good, capabilities=TEXT_ONLY):
        async with backend(rig, "b", good, "capable", SEES):
            status, headers, _ = await rig.post(CHAT, body_with(CHAT, PARTS["image_url"][1]))
            assert (status, headers["x-tier"]) == (200, "capable")
            assert "balanced does not take images" in headers["x-tier-reason"]
            _, value = await rig.get("/health")
            assert value["status"] == "healthy"
            pinned = body_with(CHAT, PARTS["image_url"][1]) | {"model": "model-balanced"}
            assert (await rig.post(CHAT, pinned))[0] == 400
            _, _, explanation = await rig.post("/v1/route", pinned)
            assert explanation["endpoints"][0]["left_out"] == ["does not take images"]


def test_inputs_are_found_however_they_are_written() -> None:
    images = INPUT_BITS[Input.IMAGES]
    assert inputs_of(b'{"messages":[{"content":[{"type" : "image_url"}]}]}') == images
    assert inputs_of(json.dumps({"messages": [{"content": '{"type":"image"}'}]}).encode()) == 0
    assert first_part(b"[" * 5000, images) is None
    assert first_part(b"[1]", images) is None
    assert first_part(b'{"messages":[7,{"content":7},{"content":[7,{"type":7}]}]}', images) is None
    assert first_part(b" " * 2**20 + b"{}", images) is None


@pytest.mark.parametrize("unit", [b'"type":"imag",', b'"type":', b'"tools":', b'{"type":"image"},'])
def test_a_body_of_a_million_types_is_left_to_the_engine(unit: bytes) -> None:
    assert inputs_of(b'"image" "audio" "video" "tools"' + unit * 1_000_000) == 0


def test_a_long_body_of_few_types_is_looked_at() -> None:
    text = b'{"type":"text","text":"%b"},{"type":"image"}' % (b"x" * 2_000_000)
    assert inputs_of(text) == INPUT_BITS[Input.IMAGES]
