"""The clients that people use, through the gateway, against real vLLM.

What the small model says is held to one fact («The capital of France is Paris.»). Its tool calls are real
as far as the wire goes: that a call comes, with the right name; what a loop does with sensible arguments is
tested with a scripted engine in test_agent_loops.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from agent_framework import Agent
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from anthropic import Anthropic
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, DefaultHttpxClient, NotFoundError, OpenAI
from pydantic import SecretStr

from tests.support.plane import Plane

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(400)]

TIER = "lightweight"
MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
FACT = "The capital of France is Paris."
KEY = "not-needed"
ASKED: Any = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0}
"""Anthropic's client has no parameter for it."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def url(plane: Plane) -> str:
    """The address of a gateway in front of real vLLM engines on CPU."""
    return plane.url


@pytest.fixture
def openai(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic(url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", [TIER, MODEL, "auto"])
def test_openai_chat(openai: OpenAI, model: str) -> None:
    answer = openai.chat.completions.create(
        model=model, temperature=0, messages=[{"role": "user", "content": QUESTION}]
    )
    assert answer.choices[0].message.content == FACT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5


def test_openai_chat_stream(openai: OpenAI) -> None:
    stream = openai.chat.completions.create(
        model=TIER,
        temperature=0,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == FACT
    assert sum(bool(piece) for piece in pieces) > 5, "it came in one piece"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert not any("token_ids" in chunk.to_json() for chunk in chunks)


def test_openai_completions(openai: OpenAI) -> None:
    def ask(**more: Any) -> Any:
        prompt = "The capital of France is"
        return openai.completions.create(model=TIER, temperature=0, prompt=prompt, max_tokens=8, **more)

    whole = ask().choices[0].text
    assert "Paris" in whole
    assert "".join(chunk.choices[0].text for chunk in ask(stream=True)) == whole


def test_openai_responses(openai: OpenAI) -> None:
    answer = openai.responses.create(model=TIER, temperature=0, input=QUESTION, store=False)
    assert answer.output_text == FACT
    assert answer.status == "completed"


def test_openai_responses_stream(openai: OpenAI) -> None:
    with openai.responses.create(
        model=TIER, temperature=0, input=QUESTION, store=False, stream=True
    ) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == FACT
    assert events[-1].type == "response.completed"


def test_openai_models(openai: OpenAI) -> None:
    assert {"auto", TIER, MODEL} <= {model.id for model in openai.models.list()}


def test_openai_error_for_an_unknown_model(openai: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="nothing-like-it"):
        openai.chat.completions.create(model="nothing-like-it", messages=[{"role": "user", "content": "hi"}])


def test_openai_tool_call(openai: OpenAI) -> None:
    """On the wire; the arguments that so small a model makes up are not looked at."""
    asked: Any = {
        "model": TIER,
        "temperature": 0,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "What is the weather in Lisbon?"}],
        "tools": [WEATHER],
        "tool_choice": "required",
    }
    answer = openai.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name == "get_weather"

    streamed = [
        call
        for chunk in openai.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    names = [call.function.name for call in streamed if call.function and call.function.name]
    assert names[0] == "get_weather"

    asked["messages"] += [
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "18 degrees and sunny"},
    ]
    second = openai.chat.completions.create(**{**asked, "tool_choice": "none"})
    assert second.choices[0].message.content
    assert not second.choices[0].message.tool_calls


def test_anthropic_messages(anthropic: Anthropic) -> None:
    answer = anthropic.messages.create(model=TIER, max_tokens=50, messages=ASKED, extra_body=GREEDY)
    assert [block.text for block in answer.content if block.type == "text"] == [FACT]
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 5


def test_anthropic_stream(anthropic: Anthropic) -> None:
    with anthropic.messages.stream(model=TIER, max_tokens=50, messages=ASKED, extra_body=GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == FACT
    assert len(pieces) > 5
    assert final.stop_reason == "end_turn"


@pytest.fixture
def langchain(url: str) -> Iterator[ChatOpenAI]:
    with DefaultHttpxClient() as http:
        yield ChatOpenAI(
            base_url=f"{url}/v1",
            api_key=SecretStr(KEY),
            model=TIER,
            temperature=0,
            max_retries=0,
            http_client=http,
        )


def test_langchain_invoke(langchain: ChatOpenAI) -> None:
    answer = langchain.invoke(QUESTION)
    assert answer.content == FACT
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 5


def test_langchain_stream(langchain: ChatOpenAI) -> None:
    pieces = [chunk.text for chunk in langchain.stream(QUESTION)]
    assert "".join(pieces) == FACT
    assert sum(bool(piece) for piece in pieces) > 5


@pytest.fixture(params=[OpenAIChatCompletionClient, OpenAIChatClient])
async def agent(url: str, request: pytest.FixtureRequest) -> AsyncIterator[Agent[Any]]:
    """Talks /v1/chat/completions with ``OpenAIChatCompletionClient``, /v1/responses with
    ``OpenAIChatClient``."""
    async with AsyncOpenAI(api_key=KEY, base_url=f"{url}/v1", max_retries=0) as openai:
        client = request.param(model=TIER, async_client=openai)
        yield Agent(client=client, default_options={"temperature": 0, "store": False})


async def test_agent_framework(agent: Agent[Any]) -> None:
    answer = await agent.run(QUESTION)
    assert answer.text == FACT


async def test_agent_framework_stream(agent: Agent[Any]) -> None:
    stream = agent.run(QUESTION, stream=True)
    updates = [update async for update in stream]
    # With /v1/responses the last updates bring the whole text once more, to replace the pieces.
    assert (await stream.get_final_response()).text == FACT
    assert sum(bool(update.text) for update in updates) > 5
