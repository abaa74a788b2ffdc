"""Tool loops of the clients that agents are built with, through the gateway, with a scripted engine.

The engine is a script, not a model: asked with a tool at hand it calls the tool for Lisbon, given the tool's
result it says it. So the loop's content is known, which it is not with a small real model; the wire format
of real vLLM is tested in vllm/test_clients.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from agent_framework import Agent
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from aiohttp import web
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import SecretStr

from controlplane.core.domain.endpoint import Capabilities, Endpoint, EndpointState
from tests.support.gateway import Rig, running

MODEL = "model-balanced"
WEATHER = "18 degrees and sunny"
ARGUMENTS = '{"city": "Lisbon"}'
KEY = "not-needed"
_EMPTY: dict[str, dict[str, Any]] = {"message": {"content": []}, "function_call": {"arguments": ""}}
"""What an item of a response begins with."""


class Script:
    """The engine; ``turns`` has what each request was about."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """``/v1/chat/completions``."""
        body = await request.json()
        assert body["model"] == MODEL
        last = body["messages"][-1]
        if last["role"] == "tool":
            self.turns.append("result")
            message: dict[str, Any] = {"role": "assistant", "content": f"It is {last['content']}."}
            finish = "stop"
        else:
            self.turns.append("question")
            function = {"name": body["tools"][0]["function"]["name"], "arguments": ARGUMENTS}
            call = {"index": 0, "id": "call_1", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            finish = "tool_calls"
        head = {"id": "chatcmpl-1", "created": 1, "model": MODEL}
        choice = {"index": 0, "finish_reason": finish}
        if not body.get("stream"):
            usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
            choices = [{**choice, "message": message}]
            return web.json_response(
                {**head, "object": "chat.completion", "choices": choices, "usage": usage}
            )
        head["object"] = "chat.completion.chunk"
        begun = {"index": 0, "delta": message, "finish_reason": None}
        events = [{**head, "choices": [begun]}, {**head, "choices": [{**choice, "delta": {}}]}]
        return await _stream(request, [_data(event) for event in events] + [b"data: [DONE]\n\n"])

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """``/v1/responses``."""
        body = await request.json()
        assert body["model"] == MODEL
        last = body["input"][-1]
        if last.get("type") == "function_call_output":
            self.turns.append("result")
            text = {"type": "output_text", "text": f"It is {last['output']}.", "annotations": []}
            item: dict[str, Any] = {"type": "message", "id": "m", "role": "assistant", "content": [text]}
        else:
            self.turns.append("question")
            name = body["tools"][0]["name"]
            item = {"type": "function_call", "id": "f", "call_id": "c", "name": name, "arguments": ARGUMENTS}
        item["status"] = "completed"
        whole = {
            "id": f"resp_{len(self.turns)}",
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": MODEL,
            "output": [item],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": body.get("tools", []),
        }
        if not body.get("stream"):
            return web.json_response(whole)
        begun = {**whole, "status": "in_progress", "output": []}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": begun},
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": {**item, **_EMPTY[item["type"]]},
            },
        ]
        at = {"output_index": 0, "item_id": item["id"]}
        if item["type"] == "message":
            said = item["content"][0]["text"]
            piece = {"type": "response.output_text.delta", "content_index": 0, "delta": said, "logprobs": []}
        else:
            piece = {"type": "response.function_call_arguments.delta", "delta": ARGUMENTS}
        events.append({**piece, **at})
        events.append({"type": "response.output_item.done", "output_index": 0, "item": item})
        events.append({"type": "response.completed", "response": whole})
        numbered = [{**event, "sequence_number": number} for number, event in enumerate(events)]
        return await _stream(
            request, [f"event: {event['type']}\n".encode() + _data(event) for event in numbered]
        )


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[Rig, Script]]:
    """A gateway in front of the script."""
    script = Script()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", script.chat)
    app.router.add_post("/v1/responses", script.responses)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with running() as rig:
            rig.endpoints["script"] = Endpoint(
                endpoint_id="script",
                tier="balanced",
                model=MODEL,
                engine="endpoint",
                base_url=f"http://127.0.0.1:{runner.addresses[0][1]}",
                state=EndpointState.READY,
                concurrency_limit=4,
                generation=1,
                capabilities=Capabilities(responses=True),
            )
            rig.publish()
            yield rig, script
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("kind", [OpenAIChatCompletionClient, OpenAIChatClient])
@pytest.mark.parametrize("stream", [False, True])
async def test_agent_framework_calls_the_tool_and_tells_its_result(kind: type[Any], stream: bool) -> None:
    asked = []

    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return WEATHER

    async with scripted() as (rig, script):
        async with AsyncOpenAI(api_key=KEY, base_url=f"{rig.base}/v1", max_retries=0) as openai:
            client = kind(model="balanced", async_client=openai)
            agent: Agent[Any] = Agent(client=client, tools=[get_weather], default_options={"store": False})
            if stream:
                text = "".join([update.text async for update in agent.run("Lisbon's weather?", stream=True)])
            else:
                text = (await agent.run("Lisbon's weather?")).text
    assert asked == ["Lisbon"]
    assert text == f"It is {WEATHER}."
    assert script.turns == ["question", "result"]


async def test_langchain_calls_the_tool_and_tells_its_result() -> None:
    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return WEATHER if city == "Lisbon" else "unknown"

    async with scripted() as (rig, script):
        async with DefaultAsyncHttpxClient() as http:
            model = ChatOpenAI(
                base_url=f"{rig.base}/v1",
                api_key=SecretStr(KEY),
                model="auto",
                max_retries=0,
                http_async_client=http,
            )
            with_tool = model.bind_tools([get_weather])
            messages: list[Any] = [HumanMessage("What is the weather in Lisbon?")]
            first = await with_tool.ainvoke(messages)
            messages += [first, *[await get_weather.ainvoke(call) for call in first.tool_calls]]
            assert isinstance(messages[-1], ToolMessage)
            second = await with_tool.ainvoke(messages)
    assert second.content == f"It is {WEATHER}."
    assert script.turns == ["question", "result"]


async def _stream(request: web.Request, events: list[bytes]) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    for event in events:
        await answer.write(event)
    await answer.write_eof()
    return answer


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"
