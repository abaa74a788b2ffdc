"""Bodies of scripted responses (:mod:`controlplane.engines.simulated.script`), as vLLM and Anthropic write
them: calls of tools, and texts that are known before the first token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from controlplane.engines.simulated.batching import Finish
from controlplane.engines.simulated.script import Script
from controlplane.engines.simulated.wire_formats import (
    DONE,
    FINGERPRINT,
    ResponsesFormat,
    WireFormat,
    messages_event,
)


class _Positions:
    """Which part of the script each token belongs to: −1 for the text, else the index of the call."""

    def __init__(self, script: Script) -> None:
        self._parts = [-1] * len(script.text)
        for index, call in enumerate(script.calls):
            self._parts += [index] * len(call.pieces)
        self._next = 0

    def take(self, texts: Sequence[bytes]) -> Iterator[tuple[int, str]]:
        """(part, text) of the next tokens."""
        for text in texts:
            yield self._parts[self._next], json.loads(b'"' + text + b'"')
            self._next += 1


class _Assembled:
    """The parts of a whole response, as far as they were generated."""

    def __init__(self, script: Script, texts: Sequence[bytes]) -> None:
        parts: dict[int, str] = {}
        for part, text in _Positions(script).take(texts):
            parts[part] = parts.get(part, "") + text
        self.text = parts.pop(-1, "")
        self.calls = [(index, script.calls[index].name, arguments) for index, arguments in parts.items()]


class ScriptedChat(WireFormat):
    """``/v1/chat/completions``."""

    def __init__(
        self,
        ident: str,
        model: str,
        created: int,
        prompt_ids: Sequence[int],
        *,
        script: Script,
        include_usage: bool,
    ) -> None:
        super().__init__(f"chatcmpl-{ident}", model, created, prompt_ids)
        self._script = script
        self._include_usage = include_usage
        self._positions = _Positions(script)
        self._begun: set[int] = set()

    def opening(self) -> list[bytes]:
        """The role."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token, before the first of a call one with its name; the reason comes last."""
        events: list[bytes] = []
        for part, text in self._positions.take(texts):
            if part < 0:
                events.append(self._chunk({"content": text}))
                continue
            if part not in self._begun:
                self._begun.add(part)
                function = {"name": self._script.calls[part].name, "arguments": ""}
                call = {"id": self._call_id(part), "type": "function", "index": part, "function": function}
                events.append(self._chunk({"tool_calls": [call]}))
            events.append(self._chunk({"tool_calls": [{"index": part, "function": {"arguments": text}}]}))
        if finish is not None:
            events.append(self._chunk({}, self._reason(finish)))
        return events

    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The usage if the request asked for it, then the end."""
        if not self._include_usage:
            return [DONE]
        usage = json.loads(self._usage(count))
        return [_data({**self._fields("chat.completion.chunk"), "choices": [], "usage": usage}), DONE]

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece."""
        made = _Assembled(self._script, texts)
        message: dict[str, Any] = {"role": "assistant", "content": made.text or None}
        if made.calls:
            message["tool_calls"] = [
                {
                    "id": self._call_id(index),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for index, name, arguments in made.calls
            ]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason(finish)}
        fields = self._fields("chat.completion")
        return json.dumps(
            {**fields, "choices": [choice], "usage": json.loads(self._usage(len(ids)))}
        ).encode()

    def _reason(self, finish: Finish) -> str:
        return "tool_calls" if self._script.calls and finish.reason == "stop" else finish.reason

    def _call_id(self, index: int) -> str:
        return f"call_{self.ident.removeprefix('chatcmpl-')}_{index}"

    def _fields(self, kind: str) -> dict[str, Any]:
        head = {"id": self.ident, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": FINGERPRINT}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data({**self._fields("chat.completion.chunk"), "choices": [choice]})


class ScriptedResponses(ResponsesFormat):
    """``/v1/responses``: a text as :class:`ResponsesFormat` writes it, calls as items of their own."""

    def __init__(
        self,
        ident: str,
        model: str,
        created: int,
        prompt_ids: Sequence[int],
        *,
        request_fields: Mapping[str, Any],
        script: Script,
    ) -> None:
        super().__init__(ident, model, created, prompt_ids, request_fields=request_fields)
        self._script = script
        self._positions = _Positions(script)
        self._arguments: list[str] = []

    def opening(self) -> list[bytes]:
        """The first events; those of a message only if there is a text."""
        return super().opening() if not self._script.calls else super().opening()[:2]

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token, with those around each call."""
        if not self._script.calls:
            return super().tokens(ids, texts, finish)
        events: list[bytes] = []
        for part, text in self._positions.take(texts):
            if part == len(self._arguments):
                events += self._call_done()
                self._arguments.append("")
                item = self._call(part, "", "in_progress")
                events.append(self._event("response.output_item.added", output_index=part, item=item))
            self._arguments[part] += text
            events.append(
                self._event(
                    "response.function_call_arguments.delta",
                    item_id=self._item_id(part),
                    output_index=part,
                    delta=text,
                )
            )
        return events

    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The last events."""
        if not self._script.calls:
            return super().closing(count, finish)
        return [*self._call_done(), self._end(self._items(), count, finish)]

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece."""
        if not self._script.calls:
            return super().whole(ids, texts, finish)
        self._arguments = [arguments for _, _, arguments in _Assembled(self._script, texts).calls]
        return json.dumps(self._response(_status(finish), self._items(), len(ids), finish)).encode()

    def _end(self, items: list[dict[str, Any]], count: int, finish: Finish) -> bytes:
        name = "response.incomplete" if finish.reason == "length" else "response.completed"
        return self._event(name, response=self._response(_status(finish), items, count, finish))

    def _call_done(self) -> list[bytes]:
        index = len(self._arguments) - 1
        if index < 0:
            return []
        arguments = self._arguments[index]
        name = self._script.calls[index].name
        return [
            self._event(
                "response.function_call_arguments.done",
                item_id=self._item_id(index),
                output_index=index,
                name=name,
                arguments=arguments,
            ),
            self._event(
                "response.output_item.done",
                output_index=index,
                item=self._call(index, arguments, "completed"),
            ),
        ]

    def _items(self) -> list[dict[str, Any]]:
        return [self._call(index, arguments, "completed") for index, arguments in enumerate(self._arguments)]

    def _item_id(self, index: int) -> str:
        return f"fc_{self.ident.removeprefix('resp_')}_{index}"

    def _call(self, index: int, arguments: str, status: str) -> dict[str, Any]:
        return {
            "id": self._item_id(index),
            "call_id": f"call_{self.ident.removeprefix('resp_')}_{index}",
            "type": "function_call",
            "name": self._script.calls[index].name,
            "arguments": arguments,
            "status": status,
        }


class ScriptedMessages(WireFormat):
    """Anthropic's ``/v1/messages``."""

    def __init__(
        self, ident: str, model: str, created: int, prompt_ids: Sequence[int], *, script: Script
    ) -> None:
        super().__init__(f"msg_{ident}", model, created, prompt_ids)
        self._script = script
        self._positions = _Positions(script)
        self._open: int | None = None
        self._blocks = 0

    def opening(self) -> list[bytes]:
        """The message without content."""
        return [
            messages_event("message_start", message={**self._message([], None), "usage": self._counts(0)})
        ]

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token, with those around each block."""
        events: list[bytes] = []
        for part, text in self._positions.take(texts):
            if part != self._open:
                events += self._block_stop()
                self._open = part
                block = {"type": "text", "text": ""} if part < 0 else self._tool_use(part, {})
                events.append(messages_event("content_block_start", index=self._blocks, content_block=block))
                self._blocks += 1
            delta = (
                {"type": "text_delta", "text": text}
                if part < 0
                else {"type": "input_json_delta", "partial_json": text}
            )
            events.append(messages_event("content_block_delta", index=self._blocks - 1, delta=delta))
        return events

    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The last events."""
        delta = {"stop_reason": self._reason(finish), "stop_sequence": None}
        return [
            *self._block_stop(),
            messages_event("message_delta", delta=delta, usage=self._counts(count)),
            messages_event("message_stop"),
        ]

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece; the arguments of a call that was cut off are empty."""
        made = _Assembled(self._script, texts)
        content: list[dict[str, Any]] = [{"type": "text", "text": made.text}] if made.text else []
        for index, _, arguments in made.calls:
            complete = arguments == "".join(self._script.calls[index].pieces)
            content.append(self._tool_use(index, json.loads(arguments) if complete else {}))
        return json.dumps({**self._message(content, finish), "usage": self._counts(len(ids))}).encode()

    def _block_stop(self) -> list[bytes]:
        return [messages_event("content_block_stop", index=self._blocks - 1)] if self._blocks else []

    def _tool_use(self, index: int, arguments: Any) -> dict[str, Any]:
        ident = f"toolu_{self.ident.removeprefix('msg_')}_{index}"
        return {"type": "tool_use", "id": ident, "name": self._script.calls[index].name, "input": arguments}

    def _reason(self, finish: Finish) -> str:
        if finish.reason == "length":
            return "max_tokens"
        return "tool_use" if self._script.calls else "end_turn"

    def _message(self, content: list[dict[str, Any]], finish: Finish | None) -> dict[str, Any]:
        return {
            "id": self.ident,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": self._reason(finish) if finish else None,
            "stop_sequence": None,
        }

    def _counts(self, count: int) -> dict[str, int]:
        return {"input_tokens": len(self.prompt_ids), "output_tokens": count}


def _status(finish: Finish) -> str:
    return "incomplete" if finish.reason == "length" else "completed"


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
