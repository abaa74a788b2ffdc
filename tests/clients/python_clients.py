"""The Python clients of the client table: each calls a gateway as its users do, and says what came of it.

Run by :mod:`tests.clients` in an environment of its own, as ``python python_clients.py BASE_URL MODEL
[CLIENT…]``; prints JSON, ``{client: {feature: "ok" or what went wrong}}``. The features: a stream, a loop
with a tool and its result, structured output, and errors as the client's own types.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "not-needed"
QUESTION = "What is the weather in Lisbon?"
RESULT = "18 degrees and sunny"
PERSON = "Alice is 30 years old. Her name and age?"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DEADLINE = {"x-request-timeout-seconds": "0.001"}
Check = Callable[[str, str], Awaitable[None]]


def get_weather(city: str) -> str:
    """The weather in a city."""
    return RESULT


def expect(condition: object, what: str) -> None:
    """Fail with ``what`` was expected."""
    if not condition:
        raise AssertionError(what)


async def raises(kinds: type[BaseException] | tuple[type[BaseException], ...], call: Awaitable[Any]) -> None:
    """Await a call that must fail with one of the client's own errors."""
    try:
        await call
    except kinds:
        return
    raise AssertionError(f"no {kinds}")


async def openai_stream(base: str, model: str) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(api_key=KEY, base_url=f"{base}/v1", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}, max_tokens=30
        ):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        expect(text and usage, "text and usage")
        async with client.responses.stream(
            model=model, input="What is the capital of France?", max_output_tokens=400
        ) as stream:
            expect((await stream.get_final_response()).output_text, "text of the response")


async def openai_tools(base: str, model: str) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(api_key=KEY, base_url=f"{base}/v1", max_retries=0) as client:
        tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
        messages: Any = [{"role": "user", "content": QUESTION}]
        first = await client.chat.completions.create(
            model=model, messages=messages, tools=[tool], max_tokens=80
        )
        calls = first.choices[0].message.tool_calls
        expect(calls and "city" in json.loads(calls[0].function.arguments), "a call")  # type: ignore[union-attr]
        assert calls
        messages += [first.choices[0].message.model_dump(exclude_none=True)]
        messages += [{"role": "tool", "tool_call_id": each.id, "content": RESULT} for each in calls]
        second = await client.chat.completions.create(
            model=model, messages=messages, tools=[tool], max_tokens=80
        )
        expect("18" in (second.choices[0].message.content or ""), "the result in the answer")
        function: Any = {"type": "function", "name": "get_weather", "parameters": CITY}
        items: Any = [{"role": "user", "content": QUESTION}]
        async with client.responses.stream(model=model, input=items, tools=[function]) as stream:
            response = await stream.get_final_response()
        call: Any = response.output[0]
        expect(
            call.type == "function_call" and "city" in json.loads(call.arguments), "a call of the response"
        )
        items += [call.model_dump(exclude={"parsed_arguments"})]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
        last = await client.responses.create(model=model, input=items, tools=[function], max_output_tokens=80)
        expect("18" in last.output_text, "the result in the response")


async def openai_structured(base: str, model: str) -> None:
    from openai import AsyncOpenAI
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    async with AsyncOpenAI(api_key=KEY, base_url=f"{base}/v1", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": PERSON}]
        chat = await client.chat.completions.parse(
            model=model, messages=messages, response_format=Person, max_tokens=80
        )
        expect(isinstance(chat.choices[0].message.parsed, Person), "a person")
        response = await client.responses.parse(model=model, input=PERSON, text_format=Person)
        expect(isinstance(response.output_parsed, Person), "a person of the response")


async def openai_errors(base: str, model: str) -> None:
    import openai

    async with openai.AsyncOpenAI(api_key=KEY, base_url=f"{base}/v1") as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        create = client.chat.completions.create
        await raises(openai.NotFoundError, create(model="nothing", messages=messages))
        long: Any = [{"role": "user", "content": "word " * 60_000}]
        await raises(openai.BadRequestError, create(model=model, messages=long))
        started_s = time.monotonic()
        late = create(model=model, messages=messages, extra_headers=DEADLINE)
        await raises((openai.APITimeoutError, openai.APIStatusError), late)
        expect(time.monotonic() - started_s < 1.0, "no retry of a deadline")


async def anthropic_stream(base: str, model: str) -> None:
    from anthropic import AsyncAnthropic

    async with AsyncAnthropic(api_key=KEY, base_url=base, max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
        async with client.messages.stream(model=model, max_tokens=30, messages=messages) as stream:
            final: Any = await stream.get_final_message()
        expect(final.content[0].text and final.usage.output_tokens, "text and usage")


async def anthropic_tools(base: str, model: str) -> None:
    from anthropic import AsyncAnthropic

    async with AsyncAnthropic(api_key=KEY, base_url=base, max_retries=0) as client:
        tool: Any = {"name": "get_weather", "description": "The weather in a city", "input_schema": CITY}
        messages: Any = [{"role": "user", "content": QUESTION}]
        async with client.messages.stream(
            model=model, max_tokens=80, messages=messages, tools=[tool]
        ) as stream:
            first: Any = await stream.get_final_message()
        use = next((block for block in first.content if block.type == "tool_use"), None)
        expect(
            use is not None and first.stop_reason == "tool_use" and "city" in use.input, "a tool_use block"
        )
        assert use is not None
        messages += [{"role": "assistant", "content": [use.model_dump()]}]
        result = {"type": "tool_result", "tool_use_id": use.id, "content": RESULT}
        messages += [{"role": "user", "content": [result]}]
        second: Any = await client.messages.create(
            model=model, max_tokens=80, messages=messages, tools=[tool]
        )
        expect("18" in second.content[0].text, "the result in the answer")


async def anthropic_structured(base: str, model: str) -> None:
    from anthropic import AsyncAnthropic

    async with AsyncAnthropic(api_key=KEY, base_url=base, max_retries=0) as client:
        tool: Any = {"name": "person", "description": "A person", "input_schema": SCHEMA}
        messages: Any = [{"role": "user", "content": PERSON}]
        choice: Any = {"type": "tool", "name": "person"}
        made: Any = await client.messages.create(
            model=model, max_tokens=80, messages=messages, tools=[tool], tool_choice=choice
        )
        use = next((block for block in made.content if block.type == "tool_use"), None)
        expect(use is not None and isinstance(use.input.get("age"), int), "a person as a tool's input")


async def anthropic_errors(base: str, model: str) -> None:
    import anthropic

    async with anthropic.AsyncAnthropic(api_key=KEY, base_url=base) as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        create = client.messages.create
        await raises(anthropic.NotFoundError, create(model="nothing", max_tokens=9, messages=messages))
        long: Any = [{"role": "user", "content": "word " * 60_000}]
        await raises(anthropic.BadRequestError, create(model=model, max_tokens=9, messages=long))
        started_s = time.monotonic()
        late = create(model=model, max_tokens=9, messages=messages, extra_headers=DEADLINE)
        await raises((anthropic.APITimeoutError, anthropic.APIStatusError), late)
        expect(time.monotonic() - started_s < 1.0, "no retry of a deadline")


def _langchain(base: str, model: str, **more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=f"{base}/v1", api_key=KEY, model=model, max_tokens=80, **more)  # type: ignore[arg-type]


async def langchain_stream(base: str, model: str) -> None:
    text = "".join(
        [
            str(chunk.content)
            async for chunk in _langchain(base, model).astream("What is the capital of France?")
        ]
    )
    expect(text, "text")


async def langchain_tools(base: str, model: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    weather = tool(get_weather)
    chat = _langchain(base, model).bind_tools([weather])
    messages: list[Any] = [HumanMessage(QUESTION)]
    first = await chat.ainvoke(messages)
    expect(first.tool_calls, "a call")
    messages += [first, *[await weather.ainvoke(call) for call in first.tool_calls]]
    expect("18" in str((await chat.ainvoke(messages)).content), "the result in the answer")


async def langchain_structured(base: str, model: str) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        """A person."""

        name: str
        age: int

    made = await _langchain(base, model).with_structured_output(Person).ainvoke(PERSON)
    expect(isinstance(made, Person), "a person")


async def langchain_errors(base: str, model: str) -> None:
    import openai

    await raises(openai.NotFoundError, _langchain(base, "nothing").ainvoke("hello"))
    await raises(openai.BadRequestError, _langchain(base, model).ainvoke("word " * 60_000))
    late = _langchain(base, model, default_headers=DEADLINE).ainvoke("hello")
    await raises((openai.APITimeoutError, openai.APIStatusError), late)


def _llamaindex(base: str, model: str, **more: Any) -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=model,
        api_base=f"{base}/v1",
        api_key=KEY,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=80,
        **more,
    )


async def llamaindex_stream(base: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage

    stream = await _llamaindex(base, model).astream_chat(
        [ChatMessage(role="user", content="What is the capital of France?")]
    )
    expect("".join([part.delta or "" async for part in stream]), "text")


async def llamaindex_tools(base: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    llm = _llamaindex(base, model)
    tool = FunctionTool.from_defaults(get_weather)
    first = await llm.achat_with_tools([tool], user_msg=QUESTION)
    calls = llm.get_tool_calls_from_response(first, error_on_no_tool_call=False)
    expect(calls, "a call")
    results = [
        ChatMessage(role="tool", content=RESULT, additional_kwargs={"tool_call_id": call.tool_id})
        for call in calls
    ]
    history = [ChatMessage(role="user", content=QUESTION), first.message, *results]
    second = await llm.achat_with_tools([tool], chat_history=history)
    expect("18" in (second.message.content or ""), "the result in the answer")


async def llamaindex_structured(base: str, model: str) -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        """A person."""

        name: str
        age: int

    made = await _llamaindex(base, model).as_structured_llm(Person).acomplete(PERSON)
    expect(isinstance(made.raw, Person), "a person")


async def llamaindex_errors(base: str, model: str) -> None:
    import openai

    await raises(openai.NotFoundError, _llamaindex(base, "nothing", max_retries=0).acomplete("hello"))
    await raises(openai.BadRequestError, _llamaindex(base, model, max_retries=0).acomplete("word " * 60_000))
    late = _llamaindex(base, model, max_retries=0, default_headers=DEADLINE).acomplete("hello")
    await raises((openai.APITimeoutError, openai.APIStatusError), late)


def _agent(kind: str, base: str, model: str, **options: Any) -> Any:
    import agent_framework.openai
    from agent_framework import Agent

    client = getattr(agent_framework.openai, kind)(model=model, api_key=KEY, base_url=f"{base}/v1")
    limit = {"max_tokens": 80, **options}
    if kind == "OpenAIChatClient":
        limit["store"] = False  # else it refers to the earlier response instead of sending the conversation
    return Agent(client=client, tools=[get_weather], default_options=limit)


def _framework(kind: str) -> dict[str, Check]:
    async def stream(base: str, model: str) -> None:
        text = "".join(
            [
                part.text
                async for part in _agent(kind, base, model).run("What is the capital of France?", stream=True)
            ]
        )
        expect(text, "text")

    async def tools(base: str, model: str) -> None:
        expect("18" in (await _agent(kind, base, model).run(QUESTION)).text, "the result in the answer")
        parts = [part.text async for part in _agent(kind, base, model).run(QUESTION, stream=True)]
        expect("18" in "".join(parts), "the result in the streamed answer")

    async def structured(base: str, model: str) -> None:
        from agent_framework import Agent
        from pydantic import BaseModel

        class Person(BaseModel):
            name: str
            age: int

        import agent_framework.openai

        client = getattr(agent_framework.openai, kind)(model=model, api_key=KEY, base_url=f"{base}/v1")
        made = await Agent(client=client).run(PERSON, options={"response_format": Person})
        expect(isinstance(made.value, Person), "a person")

    async def errors(base: str, model: str) -> None:
        from agent_framework.exceptions import AgentFrameworkException

        for wrong, text in (("nothing", "hello"), (model, "word " * 60_000)):
            await raises(AgentFrameworkException, _agent(kind, base, wrong).run(text))

    return {"stream": stream, "tools": tools, "structured": structured, "errors": errors}


def _pydantic_ai(base: str, model: str) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{base}/v1", api_key=KEY))


async def pydantic_ai_stream(base: str, model: str) -> None:
    from pydantic_ai import Agent

    async with Agent(_pydantic_ai(base, model)).run_stream("What is the capital of France?") as run:
        expect("".join([part async for part in run.stream_text(delta=True)]), "text")


async def pydantic_ai_tools(base: str, model: str) -> None:
    from pydantic_ai import Agent

    agent: Any = Agent(_pydantic_ai(base, model), tools=[get_weather])
    expect("18" in (await agent.run(QUESTION)).output, "the result in the answer")


async def pydantic_ai_structured(base: str, model: str) -> None:
    from pydantic import BaseModel
    from pydantic_ai import Agent

    class Person(BaseModel):
        name: str
        age: int

    agent: Any = Agent(_pydantic_ai(base, model), output_type=Person)
    expect(isinstance((await agent.run(PERSON)).output, Person), "a person")


async def pydantic_ai_errors(base: str, model: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.exceptions import ModelHTTPError

    for wrong, text, status in (("nothing", "hello", 404), (model, "word " * 60_000, 400)):
        try:
            await Agent(_pydantic_ai(base, wrong)).run(text)
        except ModelHTTPError as error:
            expect(error.status_code == status, f"{status}, not {error.status_code}")
        else:
            raise AssertionError("no ModelHTTPError")


def _instructor(base: str) -> Any:
    import instructor
    from openai import AsyncOpenAI

    return instructor.from_openai(AsyncOpenAI(api_key=KEY, base_url=f"{base}/v1", max_retries=0))


def _person() -> Any:
    from pydantic import BaseModel

    class Person(BaseModel):
        """A person."""

        name: str
        age: int

    return Person


async def instructor_structured(base: str, model: str) -> None:
    made = await _instructor(base).create(
        model=model,
        response_model=_person(),
        messages=[{"role": "user", "content": PERSON}],
        max_retries=1,
        max_tokens=80,
    )
    expect(isinstance(made.age, int), "a person")


async def instructor_stream(base: str, model: str) -> None:
    parts = _instructor(base).create_partial(
        model=model,
        response_model=_person(),
        messages=[{"role": "user", "content": PERSON}],
        max_retries=1,
        max_tokens=80,
    )
    made = [part async for part in parts]
    expect(made and isinstance(made[-1].age, int), "a person, part by part")


async def instructor_errors(base: str, model: str) -> None:
    import openai
    from instructor.core.exceptions import InstructorRetryException

    call = _instructor(base).create(
        model="nothing", response_model=_person(), messages=[{"role": "user", "content": "x"}], max_retries=1
    )
    await raises((openai.NotFoundError, InstructorRetryException), call)


async def _litellm(base: str, model: str, text: str, **more: Any) -> Any:
    import litellm

    litellm.suppress_debug_info = True
    return await litellm.acompletion(
        model=f"openai/{model}",
        api_base=f"{base}/v1",
        api_key=KEY,
        messages=[{"role": "user", "content": text}] if text else more.pop("messages"),
        max_tokens=80,
        **more,
    )


async def litellm_stream(base: str, model: str) -> None:
    stream = await _litellm(base, model, "What is the capital of France?", stream=True)
    expect("".join([chunk.choices[0].delta.content or "" async for chunk in stream]), "text")


async def litellm_tools(base: str, model: str) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
    first = await _litellm(base, model, QUESTION, tools=[tool])
    message = first.choices[0].message
    expect(message.tool_calls, "a call")
    results = [{"role": "tool", "tool_call_id": call.id, "content": RESULT} for call in message.tool_calls]
    turns = [{"role": "user", "content": QUESTION}, message.model_dump(), *results]
    second = await _litellm(base, model, "", messages=turns, tools=[tool])
    expect("18" in second.choices[0].message.content, "the result in the answer")


async def litellm_structured(base: str, model: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    made = await _litellm(base, model, PERSON, response_format=wanted)
    expect(isinstance(json.loads(made.choices[0].message.content)["age"], int), "a person")


async def litellm_errors(base: str, model: str) -> None:
    import litellm

    await raises(litellm.NotFoundError, _litellm(base, "nothing", "hello"))
    await raises(litellm.BadRequestError, _litellm(base, model, "word " * 60_000))
    late = _litellm(base, model, "hello", extra_headers=DEADLINE)
    await raises((litellm.Timeout, litellm.APIError), late)


def _checks(prefix: str) -> dict[str, Check]:
    names = ("stream", "tools", "structured", "errors")
    return {name: check for name in names if (check := globals().get(f"{prefix}_{name}")) is not None}


CLIENTS: dict[str, dict[str, Check]] = {
    "openai-python": _checks("openai"),
    "anthropic": _checks("anthropic"),
    "LangChain": _checks("langchain"),
    "LlamaIndex": _checks("llamaindex"),
    "Agent Framework, responses": _framework("OpenAIChatClient"),
    "Agent Framework, chat": _framework("OpenAIChatCompletionClient"),
    "pydantic-ai": _checks("pydantic_ai"),
    "instructor": _checks("instructor"),
    "litellm": _checks("litellm"),
}


async def run(base: str, model: str, only: list[str]) -> dict[str, dict[str, str]]:
    """Run every check of the clients whose names begin with one of ``only``, or of all."""
    table: dict[str, dict[str, str]] = {}
    for client, checks in CLIENTS.items():
        if only and not any(client.startswith(name) for name in only):
            continue
        table[client] = {}
        for name, check in checks.items():
            try:
                async with asyncio.timeout(60):
                    await check(base, model)
                table[client][name] = "ok"
            except Exception as error:
                table[client][name] = f"{type(error).__name__}: {str(error)[:200]}"
    return table


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], sys.argv[2], sys.argv[3:]))))
