"""Scripted responses of the simulated engine: calls of tools, and JSON that is valid under a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from anthropic import Anthropic
from openai import BadRequestError, DefaultHttpxClient, OpenAI

from controlplane.engines.simulated.json_schema import NoExample, example
from controlplane.engines.simulated.script import Conversation, OutputRequest, Tool, script
from tests.support.engines import SimulatedServer

TEXT = 'the weather in "New York", or in Lisbon, for 3 days'
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "colour": {"$ref": "#/$defs/Colour"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["colour", "next"],
            "additionalProperties": False,
        },
        "Colour": {"enum": ["red", "green"]},
    },
    "$ref": "#/$defs/Node",
}


def union(kind: str) -> dict[str, Any]:
    return {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": each}}, "required": ["k"]} for each in kind
        ]
    }


@pytest.mark.parametrize(
    "schema",
    [
        WEATHER,
        TREE,
        union("ab"),
        {"type": ["string", "null"]},
        {"type": "string", "pattern": r"^[A-Z]{3}-\d{4}$"},
        {"type": "string", "pattern": r"^(foo|bar)+@[^@]+\.com$", "minLength": 12},
        {"type": "string", "minLength": 30, "maxLength": 31},
        *(
            {"type": "string", "format": name}
            for name in ("date-time", "date", "email", "ipv4", "uuid", "uri")
        ),
        {"type": "integer", "multipleOf": 7, "minimum": 10},
        {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
        {"type": "integer", "maximum": -3},
        {"type": "number", "minimum": -5, "maximum": -2},
        {"type": "boolean"},
        {"type": "null"},
        {"const": {"a": [1]}},
        {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "uniqueItems": True},
        {
            "type": "array",
            "items": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "minItems": 3,
            "uniqueItems": True,
        },
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        {"type": "array", "contains": {"const": 5}},
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2},
        {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n", "other"]},
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
                {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
            ]
        },
        {},
    ],
)
def test_an_example_is_valid_under_its_schema(schema: dict[str, Any]) -> None:
    for text in ("", TEXT):
        made = example(schema, text)
        jsonschema.validate(made, schema, format_checker=jsonschema.FormatChecker())
        assert example(schema, text) == made


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/schema"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"anyOf": [{"anyOf": [{"$ref": "#"}] * 9}] * 9},
        {"type": "odd"},
    ],
)
def test_a_schema_that_allows_nothing_of_bounded_size_has_no_example(schema: Any) -> None:
    with pytest.raises(NoExample):
        example(schema)


def test_words_and_numbers_of_the_message_are_used() -> None:
    assert example(WEATHER, TEXT) == {"city": "New York", "days": 3}
    assert example({"enum": ["red", "green"]}, "a Green one") == "green"


@pytest.mark.parametrize(
    ("question", "options", "called", "expected"),
    [
        ("the weather, please", {}, (), ["get_weather"]),
        ("Call add", {}, (), ["add"]),
        ("add the weather", {}, (), ["get_weather", "add"]),
        ("add the weather", {"parallel": False}, (), ["get_weather"]),
        ("hello", {}, (), []),
        ("hello", {"choice": "required"}, (), ["get_weather"]),
        ("hello", {"choice": "required"}, ("get_weather",), ["add"]),
        ("hello", {"choice": "=add"}, (), ["add"]),
        ("hello", {"choice": "=add"}, ("add",), []),
        ("the weather", {"choice": "none"}, (), []),
        ("the weather", {}, ("get_weather",), []),
    ],
)
def test_which_tools_are_called(
    question: str, options: dict[str, Any], called: tuple[str, ...], expected: list[str]
) -> None:
    tools = (Tool("get_weather", WEATHER), Tool("add", {"type": "object"}))
    made = script(
        OutputRequest(tools, **options), Conversation(question, called, ("18 degrees",) * len(called))
    )
    assert [call.name for call in made.calls] == expected if made is not None else not expected


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    server = SimulatedServer()
    yield server
    server.close()


@pytest.fixture
def openai(server: SimulatedServer) -> Iterator[OpenAI]:
    with (
        DefaultHttpxClient() as http,
        OpenAI(
            api_key=server.secret,
            base_url=f"http://127.0.0.1:{server.port}/v1",
            max_retries=0,
            http_client=http,
        ) as client,
    ):
        yield client


TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
FUNCTION: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER}
QUESTION: Any = {"role": "user", "content": TEXT}
ARGUMENTS = {"city": "New York", "days": 3}


def test_a_chat_calls_the_tool_and_quotes_its_result(openai: OpenAI) -> None:
    first = openai.chat.completions.create(model="m", messages=[QUESTION], tools=[TOOL])
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS  # type: ignore[union-attr]
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "18 degrees"}
    turns: Any = [QUESTION, message.model_dump(), result]
    second = openai.chat.completions.create(model="m", messages=turns, tools=[TOOL])
    assert "18 degrees" in (second.choices[0].message.content or "")
    assert second.choices[0].finish_reason == "stop"
    with openai.chat.completions.stream(model="m", messages=[QUESTION], tools=[TOOL]) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls is not None
    assert json.loads(streamed.message.tool_calls[0].function.arguments) == ARGUMENTS


def test_a_response_calls_the_tool_and_quotes_its_result(openai: OpenAI) -> None:
    first = openai.responses.create(model="m", input=TEXT, tools=[FUNCTION])
    call: Any = first.output[0]
    assert (call.type, json.loads(call.arguments)) == ("function_call", ARGUMENTS)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    turns: Any = [QUESTION, call.model_dump(), output]
    assert "18 degrees" in openai.responses.create(model="m", input=turns, tools=[FUNCTION]).output_text
    with openai.responses.stream(model="m", input=TEXT, tools=[FUNCTION]) as stream:
        kinds = [event.type for event in stream]
        streamed: Any = stream.get_final_response().output[0]
    assert json.loads(streamed.arguments) == ARGUMENTS
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_a_message_uses_the_tool_and_quotes_its_result(server: SimulatedServer) -> None:
    tool: Any = {"name": "get_weather", "input_schema": WEATHER}
    asked: dict[str, Any] = {"model": "m", "max_tokens": 99, "tools": [tool]}
    with Anthropic(
        api_key=server.secret, base_url=f"http://127.0.0.1:{server.port}", max_retries=0
    ) as client:
        first = client.messages.create(messages=[QUESTION], **asked)
        block: Any = first.content[0]
        assert (first.stop_reason, block.type, block.input) == ("tool_use", "tool_use", ARGUMENTS)
        result: Any = {"type": "tool_result", "tool_use_id": block.id, "content": "18 degrees"}
        turns: Any = [
            QUESTION,
            {"role": "assistant", "content": [block.model_dump()]},
            {"role": "user", "content": [result]},
        ]
        second: Any = client.messages.create(messages=turns, **asked).content[0]
        assert "18 degrees" in second.text
        with client.messages.stream(messages=[QUESTION], **asked) as stream:
            streamed: Any = stream.get_final_message().content[0]
    assert streamed.input == ARGUMENTS


def test_json_is_valid_under_the_schema_that_is_asked_for(openai: OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": WEATHER, "strict": True}}
    chat = openai.chat.completions.create(model="m", messages=[QUESTION], response_format=wanted)
    assert json.loads(chat.choices[0].message.content or "") == ARGUMENTS
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": WEATHER}}
    assert json.loads(openai.responses.create(model="m", input=TEXT, text=text).output_text) == ARGUMENTS
    free = openai.chat.completions.create(
        model="m", messages=[QUESTION], response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(free.choices[0].message.content or ""), dict)
    wanted["json_schema"]["schema"] = {"$ref": "#"}
    with pytest.raises(BadRequestError, match="no example"):
        openai.chat.completions.create(model="m", messages=[QUESTION], response_format=wanted)


def test_a_scripted_response_ends_at_max_tokens(openai: OpenAI) -> None:
    made = openai.chat.completions.create(model="m", messages=[QUESTION], tools=[TOOL], max_tokens=1)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.completion_tokens == 1
