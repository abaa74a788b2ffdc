"""OpenAI's ``/v1/responses`` as a request for ``/v1/chat/completions``, for engines that serve only that,
or whose ``/v1/responses`` lacks members that clients read.

Nothing is stored: a request that refers to an earlier response is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from controlplane.errors import BadRequest

_OWN: Final = frozenset({
    "background", "context_management", "conversation", "include", "input", "instructions",
    "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt", "prompt_cache_key",
    "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store",
    "stream_options", "text", "tool_choice", "tools", "top_logprobs", "truncation", "verbosity",
})  # fmt: skip
"""Members of ``/v1/responses`` that ``/v1/chat/completions`` lacks, or has in another form. All others
are passed on."""
_STORED: Final = {
    "previous_response_id": "send the earlier items in 'input'",
    "conversation": "send the earlier items in 'input'",
    "prompt": "send the prompt in 'input' and 'instructions'",
    "background": "leave it out, and wait for the response",
}
"""Members that need stored responses → the remedy."""
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "refusal", "summary_text"})


def chat_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the chat completion that a request stands for. Raises :class:`BadRequest` that names the
    member which has no equivalent."""
    for name, remedy in _STORED.items():
        if fields.get(name):
            raise BadRequest(f"{name} is not supported, as responses are not stored: {remedy}", param=name)
    body = {name: value for name, value in fields.items() if name not in _OWN}
    body["messages"] = _messages(fields.get("input"), fields.get("instructions"))
    if fields.get("max_output_tokens") is not None:
        body["max_tokens"] = fields["max_output_tokens"]
    if fields.get("stream"):
        body["stream_options"] = {"include_usage": True}
    if isinstance(reasoning := fields.get("reasoning"), Mapping) and reasoning.get("effort"):
        body["reasoning_effort"] = reasoning["effort"]
    if isinstance(text := fields.get("text"), Mapping):
        body |= _response_format(text.get("format"))
    if fields.get("tools"):
        body |= _tools(fields["tools"], fields.get("tool_choice"))
    else:
        body.pop("parallel_tool_calls", None)
    return body


def _messages(value: Any, instructions: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": _content(instructions, "instructions")})
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadRequest("'input' must be a text or a list of items", param="input")
    for index, item in enumerate(value):
        _add_item(messages, item, f"input[{index}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    if not isinstance(item, Mapping):
        raise BadRequest(f"{where} must be an object", param=where)
    kind = item.get("type") or "message"
    last = messages[-1] if messages else {}
    if kind == "message":
        role = str(item.get("role"))
        role = "system" if role == "developer" else role
        content = _content(item.get("content"), f"{where}.content")
        both_texts = isinstance(content, str) and isinstance(last.get("content"), str)
        if role == last.get("role") == "system" and both_texts:
            last["content"] += f"\n\n{content}"  # many templates take one system message only
        else:
            messages.append({"role": role, "content": content})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if last.get("role") == "assistant":
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        content = _content(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind != "reasoning":
        raise BadRequest(f"{where}: items of type '{str(kind)[:40]}' are not supported", param=where)


def _content(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A message's content: a text, or a list of parts if not all of them are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRequest(f"{where} must be a text or a list of parts", param=where)
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS:
            parts.append({"type": "text", "text": str(part.get("text", part.get("refusal", "")))})
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        elif kind == "message":
            raise BadRequest(f"{where}[{index}] must be a part of a message", param=where)
        else:
            name = f"{where}[{index}]"
            raise BadRequest(f"{name}: parts of type '{str(kind)[:40]}' are not supported", param=name)
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _response_format(wanted: Any) -> dict[str, Any]:
    if not isinstance(wanted, Mapping) or wanted.get("type") in (None, "text"):
        return {}
    if wanted.get("type") == "json_schema":
        inner = {name: value for name, value in wanted.items() if name != "type"}
        return {"response_format": {"type": "json_schema", "json_schema": inner}}
    return {"response_format": dict(wanted)}


def _tools(tools: Any, choice: Any) -> dict[str, Any]:
    if not isinstance(tools, list):
        raise BadRequest("'tools' must be a list", param="tools")
    made: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind != "function":
            where = f"tools[{index}]"
            text = f"{where}: only functions are supported, not tools of type '{str(kind)[:40]}'"
            raise BadRequest(text, param=where)
        members = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in members if tool.get(name) is not None}
        made[str(tool.get("name"))] = {"type": "function", "function": function}
    names = list(made)
    if isinstance(choice, Mapping):
        if choice.get("type") == "function":
            names, choice = [str(choice.get("name"))], "required"
        elif choice.get("type") == "allowed_tools":
            allowed = choice.get("tools")
            names = [str(each.get("name")) for each in allowed or () if isinstance(each, Mapping)]
            choice = choice.get("mode", "auto")
        else:
            raise BadRequest("tool_choice of this type is not supported", param="tool_choice")
    unknown = [name for name in names if name not in made]
    if unknown:
        raise BadRequest(
            f"tool_choice names '{unknown[0][:40]}', which is not among the tools", param="tool_choice"
        )
    # Engines know no set of allowed tools, and llama.cpp no named one: they see those that may be called.
    body: dict[str, Any] = {"tools": [made[name] for name in names]}
    return body if choice is None else {**body, "tool_choice": choice}
