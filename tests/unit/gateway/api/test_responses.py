"""``/v1/responses`` made of chat completions, for engines that don't serve it, read by OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, NotFoundError

from controlplane.core.domain.endpoint import Capabilities
from controlplane.errors import BadRequest
from controlplane.gateway.api.responses_request import chat_request
from controlplane.gateway.api.responses_writer import ResponsesWriter
from tests.support.gateway import Rig, running
from tests.support.scripted_backend import ROLE, STREAM_HEAD, Answer, backend, chunk, good

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
QUESTION = 'the weather in "Lisbon"'


@asynccontextmanager
async def chat_only(**knobs: Any) -> AsyncIterator[tuple[Rig, AsyncOpenAI]]:
    """A gateway with an engine that serves chat completions only, and OpenAI's client."""
    async with running() as rig:
        await rig.engine("only", tokens=6, **knobs)
        rig.change("only", capabilities=Capabilities())
        async with (
            DefaultAsyncHttpxClient() as http,
            AsyncOpenAI(api_key="k", base_url=f"{rig.base}/v1", max_retries=0, http_client=http) as client,
        ):
            yield rig, client


async def test_a_response_is_made_of_a_chat_completion() -> None:
    async with chat_only() as (_, client):
        whole = await client.responses.create(
            model="balanced", input="hello", instructions="Be kind.", metadata={"session_id": "s"}
        )
        assert (whole.status, whole.object, whole.instructions) == ("completed", "response", "Be kind.")
        assert whole.output_text
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens > 6
        cut = await client.responses.create(model="balanced", input="hello", max_output_tokens=2)
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"


async def test_a_stream_has_every_event_with_the_members_that_clients_read() -> None:
    async with chat_only() as (_, client):
        async with client.responses.stream(model="balanced", input="hello") as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    middle = ["response.output_text.delta"] * len(deltas)
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *middle,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(deltas) == final.output_text != ""
    assert final.usage is not None
    assert final.usage.output_tokens >= len(deltas)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_loop_with_a_tool(stream: bool) -> None:
    async with chat_only() as (_, client):

        async def ask(turns: Any) -> Any:
            if not stream:
                return await client.responses.create(model="balanced", input=turns, tools=[TOOL])
            async with client.responses.stream(model="balanced", input=turns, tools=[TOOL]) as events:
                return await events.get_final_response()

        turns: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
        first = await ask(turns)
        call = first.output[0]
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call",
            "get_weather",
            {"city": "Lisbon"},
        )
        turns += [call.model_dump(exclude={"parsed_arguments"})]
        turns += [{"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}]
        assert "18 degrees" in (await ask(turns)).output_text


async def test_structured_output() -> None:
    async with chat_only() as (_, client):
        text: Any = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
        response = await client.responses.create(model="balanced", input=QUESTION, text=text)
        assert json.loads(response.output_text) == {"city": "Lisbon"}


async def test_errors_are_those_of_the_interface() -> None:
    async with chat_only() as (_, client):
        with pytest.raises(NotFoundError):
            await client.responses.create(model="nothing", input="hello")
        with pytest.raises(BadRequestError, match="previous_response_id is not supported"):
            await client.responses.create(model="balanced", input="hello", previous_response_id="resp_1")
        with pytest.raises(BadRequestError, match=r"tools\[0\]: only functions"):
            await client.responses.create(model="balanced", input="hello", tools=[{"type": "web_search"}])
        with pytest.raises(BadRequestError):
            await client.responses.create(model="balanced", input="word " * 40_000)


async def test_another_endpoint_takes_over_before_the_first_token() -> None:
    def broken(request: dict[str, Any]) -> Answer:
        return [STREAM_HEAD, ROLE]

    async with running() as rig, backend(rig, "a", broken, capabilities=Capabilities()):
        async with backend(rig, "b", good, capabilities=Capabilities()):
            async with AsyncOpenAI(api_key="k", base_url=f"{rig.base}/v1", max_retries=0) as client:
                for _ in range(4):
                    async with client.responses.stream(model="balanced", input="hello") as stream:
                        assert (await stream.get_final_response()).output_text == "fine"


async def test_a_stream_that_is_lost_ends_with_an_error() -> None:
    def broken(request: dict[str, Any]) -> Answer:
        return [STREAM_HEAD, ROLE, chunk("half"), b""]

    async with running() as rig, backend(rig, "a", broken, capabilities=Capabilities()):
        async with AsyncOpenAI(api_key="k", base_url=f"{rig.base}/v1", max_retries=0) as client:
            stream = await client.responses.create(model="balanced", input="hello", stream=True)
            events = [event async for event in stream]
    assert [event.type for event in events[-2:]] == ["response.output_text.delta", "error"]
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_an_engine_that_serves_responses_gets_them_as_they_are() -> None:
    async with chat_only() as (rig, _):
        await rig.engine("both", tier="capable")
        for tier, made in (("capable", False), ("balanced", True)):
            _, _, value = await rig.post("/v1/responses", {"model": tier, "input": "hello"})
            assert (value.get("store") is False) is made


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"input": [{"role": "developer", "content": "b"}], "instructions": "a"},
            [{"role": "system", "content": "a\n\nb"}],
        ),
        (
            {
                "input": [
                    {
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "hm", "annotations": []}],
                    },
                    {"type": "reasoning", "summary": []},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
                    {
                        "type": "function_call_output",
                        "call_id": "1",
                        "output": [{"type": "input_text", "text": "x"}],
                    },
                ]
            },
            [
                {
                    "role": "assistant",
                    "content": "hm",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                        {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ],
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]},
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}],
        ),
    ],
)
def test_input_items_become_messages(fields: dict[str, Any], expected: list[Any]) -> None:
    assert chat_request(fields)["messages"] == expected


def test_a_named_tool_is_the_only_one_that_the_engine_sees() -> None:
    tools = [TOOL, {**TOOL, "name": "other"}]
    for choice in (
        {"type": "function", "name": "other"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]},
    ):
        body = chat_request({"input": "x", "tools": tools, "tool_choice": choice})
        assert [tool["function"]["name"] for tool in body["tools"]] == ["other"]
        assert body["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": "x", "tools": "search"}, "tools"),
        ({"input": "x", "tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice"),
        ({"input": "x", "background": True}, "background"),
    ],
)
def test_what_has_no_equivalent_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat_request(fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"message": {"content": ["x"], "tool_calls": "x"}}], "usage": [1]},
        {"choices": [{"message": {"tool_calls": [{"function": None}]}}], "usage": {"prompt_tokens": -1}},
    ],
)
def test_a_completion_of_another_shape_is_a_response_without_that_part(odd: dict[str, Any]) -> None:
    response = ResponsesWriter({"model": "m"}).whole(odd)
    assert response["status"] == "completed"
    usage = response["usage"]
    assert usage is None or usage["total_tokens"] >= 0


async def test_a_request_of_very_many_values_is_refused() -> None:
    async with chat_only() as (rig, _):
        body = {"model": "balanced", "input": "x", "odd": [1] * 200_002}
        status, _, value = await rig.post("/v1/responses", body)
    assert status == 400
    assert "200000 values" in value["error"]["message"]
