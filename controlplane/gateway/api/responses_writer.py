"""A chat completion as OpenAI's ``/v1/responses`` has it: one object, or the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_ECHOED: Final[dict[str, Any]] = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "reasoning": None, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
    "tools": [], "top_p": 1.0, "user": None,
}  # fmt: skip
"""Members of a request that its response repeats, with their defaults."""
_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}

Event = dict[str, Any]


class ResponsesWriter:
    """Turns one chat completion into a response. Feed it the whole completion, or chunk after chunk of a
    stream; the events of a stream are numbered."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request = request
        self._number = 0
        self._head: dict[str, Any] = {}
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._calls: dict[Any, int] = {}
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self.ended = False

    def whole(self, completion: Mapping[str, Any]) -> dict[str, Any]:
        """The response of a completion that was not streamed."""
        choice = _first(completion.get("choices"))
        message = choice.get("message")
        self._begin(completion)
        self._delta(message if isinstance(message, Mapping) else {})
        self._close()
        self._finish_reason = choice.get("finish_reason")
        self._usage = completion.get("usage")
        return self._response(self._status())

    def chunk(self, chunk: Mapping[str, Any]) -> list[Event]:
        """The events of one chunk of a stream."""
        events = [] if self._head else self._begin(chunk)
        choice = _first(chunk.get("choices"))
        delta = choice.get("delta")
        events += self._delta(delta if isinstance(delta, Mapping) else {})
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self._usage = chunk.get("usage") or self._usage
        return events

    def end(self) -> list[Event]:
        """The last events of a complete stream."""
        events = [] if self._head else self._begin({})
        events += self._close()
        self.ended = True
        status = self._status()
        return [*events, self._event(f"response.{status}", response=self._response(status))]

    def error(self, error: Mapping[str, Any]) -> list[Event]:
        """The event that ends an incomplete stream."""
        self.ended = True
        return [self._event("error", **{name: error.get(name) for name in ("code", "message", "param")})]

    def _begin(self, completion: Mapping[str, Any]) -> list[Event]:
        ident = str(completion.get("id") or "0").removeprefix("chatcmpl-")
        self._head = {
            "id": f"resp_{ident}",
            "created_at": completion.get("created") or 0,
            "model": completion.get("model") or self._request.get("model"),
        }
        response = self._response("in_progress")
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=response) for kind in kinds]

    def _delta(self, delta: Mapping[str, Any]) -> list[Event]:
        events: list[Event] = []
        text = delta.get("content")
        if isinstance(text, str) and text:
            events += self._text(text)
        calls = delta.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else []):
            if isinstance(call, Mapping):
                events += self._call(call, position)
        return events

    def _text(self, text: str) -> list[Event]:
        events: list[Event] = []
        item = self._open
        if item is None or item["type"] != "message":
            events += self._close()
            item = self._add("msg", {"type": "message", "role": "assistant", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self._item_event("added", item))
            events.append(
                self._event("response.content_part.added", **self._at(item), content_index=0, part=part)
            )
            item["content"] = [dict(part)]
        item["content"][0]["text"] += text
        at = {**self._at(item), "content_index": 0}
        return [*events, self._event("response.output_text.delta", **at, delta=text, logprobs=[])]

    def _call(self, call: Mapping[str, Any], position: int) -> list[Event]:
        events: list[Event] = []
        function = call.get("function")
        function = function if isinstance(function, Mapping) else {}
        index = call.get("index", position)
        if index not in self._calls:
            events += self._close()
            self._calls[index] = len(self._output)
            ident = call.get("id") or f"call_{self._head['id']}_{index}"
            item = self._add(
                "fc",
                {"type": "function_call", "call_id": ident, "name": function.get("name"), "arguments": ""},
            )
            events.append(self._item_event("added", item))
        item = self._output[self._calls[index]]
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            item["arguments"] += arguments
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **self._at(item), delta=arguments))
        return events

    def _close(self) -> list[Event]:
        """The events that complete the item that is being written."""
        item, self._open = self._open, None
        if item is None:
            return []
        item["status"] = "completed"
        at = self._at(item)
        if item["type"] == "message":
            part = item["content"][0]
            at["content_index"] = 0
            events = [
                self._event("response.output_text.done", **at, text=part["text"], logprobs=[]),
                self._event("response.content_part.done", **at, part=part),
            ]
        else:
            named = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **at, **named)]
        return [*events, self._item_event("done", item)]

    def _add(self, prefix: str, members: dict[str, Any]) -> dict[str, Any]:
        ident = f"{prefix}_{self._head['id'].removeprefix('resp_')}_{len(self._output)}"
        self._open = item = {"id": ident, **members, "status": "in_progress"}
        self._output.append(item)
        return item

    def _at(self, item: Mapping[str, Any]) -> dict[str, Any]:
        index = next(index for index, each in enumerate(self._output) if each is item)
        return {"item_id": item["id"], "output_index": index}

    def _item_event(self, what: str, item: Mapping[str, Any]) -> Event:
        index = self._at(item)["output_index"]
        return self._event(f"response.output_item.{what}", output_index=index, item=dict(item))

    def _event(self, kind: str, **members: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **members}

    def _status(self) -> str:
        return "incomplete" if self._finish_reason in _INCOMPLETE else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        given = {name: self._request.get(name) for name in _ECHOED}
        reason = _INCOMPLETE.get(self._finish_reason or "") if status == "incomplete" else None
        return {
            **{name: _ECHOED[name] if value is None else value for name, value in given.items()},
            **self._head,
            "object": "response",
            "status": status,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": [] if status == "in_progress" else self._output,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _usage(self._usage),
        }


def _usage(usage: Any) -> dict[str, Any] | None:
    if not isinstance(usage, Mapping):
        return None
    prompt, generated = _whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens"))
    cached, reasoned = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": _whole(_member(cached, "cached_tokens"))},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": _whole(_member(reasoned, "reasoning_tokens"))},
        "total_tokens": prompt + generated,
    }


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _first(choices: Any) -> Mapping[str, Any]:
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, Mapping) else {}
