"""What the simulated engine says to a request with tools or with a schema, so that agents can be tried
without a model.

* It calls each tool that the last user's message names, by its whole name or by a word of it (``weather`` for
  ``get_weather``), with arguments that are valid under the tool's schema. If the request demands a call and
  the message names no tool, it calls the first that was not called yet.
* Once a tool's result follows, it responds with a text that quotes the result.
* If a schema is asked for (``response_format``), its response is JSON that is valid under it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from controlplane.engines.simulated.json_schema import NoExample, Schema, example

MAX_CALLS: Final = 16
"""The most tools that one response calls."""
_PLAIN_WORDS: Final = frozenset(
    {
        "all",
        "and",
        "find",
        "for",
        "from",
        "get",
        "list",
        "make",
        "run",
        "search",
        "set",
        "the",
        "tool",
        "use",
        "with",
    }
)
"""Common words in tools' names, which don't identify a tool."""
_PIECES: Final = re.compile(r"\s*\S{1,12}|\s+")
_NAME_WORDS: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")


class UnusableSchema(ValueError):
    """A schema of the request has no example; the message names it."""


class Tool(NamedTuple):
    """A function that the client offers, with the schema of its arguments."""

    name: str
    schema: Schema


class Conversation(NamedTuple):
    """What matters of a conversation: its last question, and the calls and results after it."""

    question: str
    called: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


class OutputRequest(NamedTuple):
    """The tools and the form of output that a request asks for, in the same terms for all APIs."""

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    """``auto``, ``none``, ``required`` or, after ``=``, the name of the tool to call."""
    parallel: bool = True
    schema: Schema | None = None
    """The schema that the text must follow; True for any JSON object."""


class ScriptedCall(NamedTuple):
    """A call of a tool; ``pieces`` are the tokens of its arguments, JSON."""

    name: str
    pieces: tuple[str, ...]


class Script(NamedTuple):
    """The response: calls of tools, or the pieces of a text."""

    calls: tuple[ScriptedCall, ...] = ()
    text: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[str, ...]:
        """All pieces, one token each."""
        return self.text + tuple(piece for call in self.calls for piece in call.pieces)


def script(wanted: OutputRequest, conversation: Conversation) -> Script | None:
    """The response to a request; None, without tools and schema, means made-up words.
    Raises :class:`UnusableSchema`."""
    calls = _calls(wanted, conversation)
    if calls:
        return Script(calls=calls)
    if wanted.schema is not None:
        return Script(text=_pieces(_json(wanted.schema, conversation.question, "the response's schema")))
    if conversation.results:
        text = " ".join(conversation.results)
        return Script(text=_pieces(f"The simulated engine read this result: {text}"))
    return None


def _calls(wanted: OutputRequest, conversation: Conversation) -> tuple[ScriptedCall, ...]:
    if wanted.choice == "none" or not wanted.tools:
        return ()
    tools = [tool for tool in wanted.tools if tool.name not in conversation.called]
    if wanted.choice.startswith("="):
        chosen = [tool for tool in tools if f"={tool.name}" == wanted.choice]
    elif conversation.results and wanted.choice != "required":
        chosen = []
    else:
        chosen = [tool for tool in tools if _names(conversation.question, tool.name)]
        if not chosen and wanted.choice == "required":
            chosen = tools[:1]
    most = MAX_CALLS if wanted.parallel else 1
    return tuple(
        ScriptedCall(
            tool.name, _pieces(_json(tool.schema, conversation.question, f"the schema of '{tool.name}'"))
        )
        for tool in chosen[:most]
    )


def _names(text: str, name: str) -> bool:
    """Whether the text names a tool: its whole name, or a word of it that is not a common one."""
    if name and name.lower() in text.lower():
        return True
    said = {word.lower() for word in re.findall(r"\w+", text)}
    words = {word.lower() for word in _NAME_WORDS.findall(name)} - _PLAIN_WORDS
    return any(len(word) > 2 and word in said for word in words)


def _json(schema: Schema, text: str, what: str) -> str:
    try:
        if schema is True:
            return json.dumps({"simulated": True, "answer": text[:200]}, ensure_ascii=False)
        return json.dumps(example(schema, text[:10_000]), ensure_ascii=False)
    except NoExample as error:
        raise UnusableSchema(f"{what} has no example: {error}") from None


def _pieces(text: str) -> tuple[str, ...]:
    return tuple(_PIECES.findall(text))


def output_request(path: str, fields: Mapping[str, Any]) -> OutputRequest:
    """What a request of any API asks for."""
    messages = path == "/v1/messages"
    choice = fields.get("tool_choice")
    parallel = fields.get("parallel_tool_calls") is not False
    if isinstance(choice, Mapping):
        parallel = parallel and choice.get("disable_parallel_tool_use") is not True
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        kind = str(choice.get("type"))
        named = {"any": "required"}.get(kind, kind) if name is None else f"={name}"
    else:
        named = str(choice or "auto")
    return OutputRequest(
        tuple(tool for each in _list(fields.get("tools")) if (tool := _tool(each, messages)) is not None),
        named,
        parallel,
        _response_schema(fields),
    )


def _tool(value: Any, messages: bool) -> Tool | None:
    if not isinstance(value, Mapping):
        return None
    function = value.get("function")
    function = function if isinstance(function, Mapping) else value
    name = function.get("name")
    if not isinstance(name, str) or (not messages and value.get("type", "function") != "function"):
        return None
    schema = function.get("input_schema" if messages else "parameters")
    # Arguments are an object, also if no schema says so.
    return Tool(name, {"type": "object", **schema} if isinstance(schema, Mapping) else {"type": "object"})


def _response_schema(fields: Mapping[str, Any]) -> Schema | None:
    output = fields.get("output_config")
    text = fields.get("text")
    formats = (
        fields.get("response_format"),
        fields.get("output_format"),
        output.get("format") if isinstance(output, Mapping) else None,
        text.get("format") if isinstance(text, Mapping) else None,
    )
    for wanted in formats:
        if not isinstance(wanted, Mapping):
            continue
        if wanted.get("type") == "json_object":
            return True
        if wanted.get("type") == "json_schema":
            inner = wanted.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, Mapping) else wanted.get("schema")
            return schema if isinstance(schema, Mapping) else True
    return None


def conversation_of(path: str, fields: Mapping[str, Any]) -> Conversation:
    """The last question of a request, and the calls and results after it."""
    if path == "/v1/responses":
        value = fields.get("input")
        return Conversation(value) if isinstance(value, str) else _of_items(_list(value))
    question, called, results = "", [], []
    for message in _list(fields.get("messages")):
        if not isinstance(message, Mapping):
            continue
        blocks = [block for block in _list(message.get("content")) if isinstance(block, Mapping)]
        for call in _list(message.get("tool_calls")):
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                called.append(str(function.get("name")))
        called += [str(block.get("name")) for block in blocks if block.get("type") == "tool_use"]
        found = [_text(block.get("content")) for block in blocks if block.get("type") == "tool_result"]
        if message.get("role") == "tool":
            found.append(_text(message.get("content")))
        results += found
        if message.get("role") == "user" and not found:
            question, called, results = _text(message.get("content")), [], []
    return Conversation(question, tuple(called), tuple(results))


def _of_items(items: list[Any]) -> Conversation:
    question, called, results = "", [], []
    for item in items:
        if not isinstance(item, Mapping):
            continue
        if item.get("type") == "function_call":
            called.append(str(item.get("name")))
        elif item.get("type") == "function_call_output":
            results.append(_text(item.get("output")))
        elif item.get("role") == "user":
            question, called, results = _text(item.get("content")), [], []
    return Conversation(question, tuple(called), tuple(results))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return " ".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else "" if content is None else json.dumps(content)
