"""Response bodies as vLLM 0.32 writes them: for OpenAI's three interfaces and for Anthropic's.

A :class:`WireFormat` turns the tokens of one response into its body, whole or as server-sent events. Most
events are built by joining prepared bytes, because gateways are benchmarked against this engine.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from controlplane.engines.simulated.batching import Finish

FINGERPRINT = "simulated"
DONE = b"data: [DONE]\n\n"


class WireFormat(ABC):
    """The body of one response. ``opening``, ``tokens`` and ``closing`` return the events, in this order."""

    def __init__(self, ident: str, model: str, created: int, prompt_ids: Sequence[int]) -> None:
        self.ident = ident
        self.model = model
        self.created = created
        self.prompt_ids = prompt_ids

    def opening(self) -> list[bytes]:
        """The events before the first token."""
        return []

    @abstractmethod
    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token."""

    @abstractmethod
    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The events after the last token."""

    @abstractmethod
    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body of a response that is not streamed."""

    def _usage(self, count: int) -> bytes:
        prompt = len(self.prompt_ids)
        return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}' % (
            prompt,
            prompt + count,
            count,
        )

    def _head(self, kind: bytes) -> bytes:
        return b'{"id":"%s","object":"%s","created":%d,"model":%s,"system_fingerprint":"simulated"' % (
            self.ident.encode(),
            kind,
            self.created,
            _quoted(self.model),
        )


class _ChoicesFormat(WireFormat):
    """What the two interfaces with ``choices`` share: the options, and how a stream ends."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[bytes]

    def __init__(
        self,
        ident: str,
        model: str,
        created: int,
        prompt_ids: Sequence[int],
        *,
        token_ids: bool = False,
        include_usage: bool = False,
    ) -> None:
        super().__init__(f"{self.id_prefix}-{ident}", model, created, prompt_ids)
        self._token_ids = token_ids
        self._include_usage = include_usage

    @cached_property
    def _chunk(self) -> bytes:
        return b"data: " + self._head(self.chunk_object)

    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The usage if the request asked for it, then the end."""
        if self._include_usage:
            return [self._chunk + b',"choices":[],"usage":' + self._usage(count) + b"}\n\n", DONE]
        return [DONE]


class ChatFormat(_ChoicesFormat):
    """``/v1/chat/completions``."""

    id_prefix = "chatcmpl"
    chunk_object = b"chat.completion.chunk"

    @cached_property
    def _before(self) -> bytes:
        return self._chunk + b',"choices":[{"index":0,"delta":{"content":"'

    def opening(self) -> list[bytes]:
        """The first events: vLLM's, in its order."""
        prompt = b""
        if self._token_ids:
            prompt = b',"prompt_token_ids":%s,"prompt_text":null' % _numbers(self.prompt_ids)
        return [
            self._chunk
            + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
            + b'"finish_reason":null}]'
            + prompt
            + b"}\n\n"
        ]

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token that has text to show."""
        before = self._before
        if self._token_ids:
            middle = b'"},"logprobs":null,"finish_reason":null,"token_ids":[%d]}]}\n\n'
            events = [before + text + middle % token for token, text in zip(ids, texts, strict=True)]
        else:
            after = b'"},"logprobs":null,"finish_reason":null}]}\n\n'
            events = [before + text + after for text in texts]
        if finish is not None:
            ending = b'"},"logprobs":null,' + _ending(finish)
            if self._token_ids:
                ending += b',"token_ids":' + _numbers(ids[-1:])
            events[-1:] = [before + b"".join(texts[-1:]) + ending + b"}]}\n\n"]
        return events

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece."""
        choice = (
            b',"choices":[{"index":0,"message":{"role":"assistant","content":"%s"},"logprobs":null,%s,'
            b'"token_ids":%s}],"usage":%s,"prompt_token_ids":%s}'
        )
        return self._head(b"chat.completion") + choice % (
            b"".join(texts),
            _ending(finish),
            _numbers(ids) if self._token_ids else b"null",
            self._usage(len(ids)),
            _numbers(self.prompt_ids) if self._token_ids else b"null",
        )


class CompletionFormat(_ChoicesFormat):
    """``/v1/completions``."""

    id_prefix = "cmpl"
    chunk_object = b"text_completion"

    _first = True

    @cached_property
    def _before(self) -> bytes:
        return self._chunk + b',"choices":[{"index":0,"text":"'

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token that has text to show."""
        events: list[bytes] = []
        last = len(texts) - 1
        for index, text in enumerate(texts):
            ending = _ending(finish) if finish is not None and index == last else _RUNNING
            extra = b""
            if self._token_ids:
                prompt = _numbers(self.prompt_ids) if self._first else b"null"
                extra = b',"prompt_token_ids":%s,"token_ids":[%d]' % (prompt, ids[index])
                self._first = False
            events.append(self._before + text + b'","logprobs":null,' + ending + extra + b"}]}\n\n")
        return events

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece."""
        choice = (
            b',"choices":[{"index":0,"text":"%s","logprobs":null,%s,"token_ids":%s,"prompt_token_ids":%s}],'
            b'"usage":%s}'
        )
        return self._head(b"text_completion") + choice % (
            b"".join(texts),
            _ending(finish),
            _numbers(ids) if self._token_ids else b"null",
            _numbers(self.prompt_ids) if self._token_ids else b"null",
            self._usage(len(ids)),
        )


class ResponsesFormat(WireFormat):
    """``/v1/responses``: events with names and sequence numbers."""

    def __init__(
        self,
        ident: str,
        model: str,
        created: int,
        prompt_ids: Sequence[int],
        *,
        request_fields: Mapping[str, Any],
    ) -> None:
        super().__init__(f"resp_{ident}", model, created, prompt_ids)
        self._request_fields = request_fields
        self._message = f"msg_{ident}"
        self._sequence = 0
        self._texts: list[bytes] = []

    def opening(self) -> list[bytes]:
        """The first events: vLLM's, in its order."""
        started = self._response("in_progress", [], None, None)
        item = {"id": self._message, "content": [], "role": "assistant", "type": "message"}
        return [
            self._event("response.created", response=started),
            self._event("response.in_progress", response=started),
            self._event("response.output_item.added", output_index=0, item={**item, "status": "in_progress"}),
            self._event("response.content_part.added", **self._position(), part=_part("")),
        ]

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token that has text to show."""
        self._texts += texts
        return [
            self._event(
                "response.output_text.delta",
                **self._position(),
                delta=json.loads(b'"' + text + b'"'),
                logprobs=[],
            )
            for text in texts
            if text
        ]

    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The last events."""
        text = json.loads(b'"' + b"".join(self._texts) + b'"')
        item = self._item(text)
        status = "incomplete" if finish.reason == "length" else "completed"
        return [
            self._event("response.output_text.done", **self._position(), text=text, logprobs=[]),
            self._event("response.content_part.done", **self._position(), part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event("response.completed", response=self._response(status, [item], count, finish)),
        ]

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece."""
        text = json.loads(b'"' + b"".join(texts) + b'"')
        status = "incomplete" if finish.reason == "length" else "completed"
        return json.dumps(self._response(status, [self._item(text)], len(ids), finish)).encode()

    def _position(self) -> dict[str, Any]:
        return {"content_index": 0, "item_id": self._message, "output_index": 0}

    def _item(self, text: str) -> dict[str, Any]:
        return {
            "id": self._message,
            "content": [_part(text)],
            "role": "assistant",
            "status": "completed",
            "type": "message",
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], count: int | None, finish: Finish | None
    ) -> dict[str, Any]:
        prompt = len(self.prompt_ids)
        truncated = finish is not None and finish.reason == "length"
        usage = count is not None and {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + count,
        }
        return {
            "id": self.ident,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": status,
            "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if truncated else None,
            "instructions": self._request_fields.get("instructions"),
            "metadata": {"engine": FINGERPRINT},
            "parallel_tool_calls": self._request_fields.get("parallel_tool_calls") is not False,
            "temperature": self._request_fields.get("temperature", 1.0),
            "tool_choice": self._request_fields.get("tool_choice") or "auto",
            "tools": self._request_fields.get("tools") or [],
            "top_p": self._request_fields.get("top_p", 1.0),
            "max_output_tokens": self._request_fields.get("max_output_tokens"),
            "previous_response_id": None,
            "truncation": "disabled",
            "usage": usage or None,
        }

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = {**fields, "sequence_number": self._sequence, "type": name}
        self._sequence += 1
        return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class MessagesFormat(WireFormat):
    """Anthropic's ``/v1/messages``."""

    def opening(self) -> list[bytes]:
        """The first events: vLLM's, in its order."""
        message = {**self._message([], None), "usage": self._counts(0)}
        return [
            messages_event("message_start", message=message),
            messages_event("content_block_start", content_block={"type": "text", "text": ""}, index=0),
        ]

    def tokens(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish | None) -> list[bytes]:
        """One event for each token that has text to show."""
        return [
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":'
            b'{"type":"text_delta","text":"' + text + b'"},"index":0}\n\n'
            for text in texts
            if text
        ]

    def closing(self, count: int, finish: Finish) -> list[bytes]:
        """The last events."""
        delta = {"stop_reason": _stop_reason(finish), "stop_sequence": finish.stop_string}
        return [
            messages_event("content_block_stop", index=0),
            messages_event("message_delta", delta=delta, usage=self._counts(count)),
            messages_event("message_stop"),
        ]

    def whole(self, ids: Sequence[int], texts: Sequence[bytes], finish: Finish) -> bytes:
        """The body in one piece."""
        text = json.loads(b'"' + b"".join(texts) + b'"')
        message = self._message([{"type": "text", "text": text}], finish)
        return json.dumps({**message, "usage": self._counts(len(ids))}).encode()

    def _message(self, content: list[dict[str, Any]], finish: Finish | None) -> dict[str, Any]:
        return {
            "id": f"msg_{self.ident}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": _stop_reason(finish) if finish else None,
            "stop_sequence": finish.stop_string if finish else None,
        }

    def _counts(self, count: int) -> dict[str, int]:
        return {"input_tokens": len(self.prompt_ids), "output_tokens": count}


_RUNNING = b'"finish_reason":null,"stop_reason":null'


def _ending(finish: Finish) -> bytes:
    stop = b"null" if finish.stop_string is None else json.dumps(finish.stop_string).encode()
    return b'"finish_reason":"%s","stop_reason":%s' % (finish.reason.encode(), stop)


@lru_cache(maxsize=16)
def _quoted(text: str) -> bytes:
    return json.dumps(text).encode()


def _numbers(ids: Sequence[int]) -> bytes:
    return b"[" + ",".join(map(str, ids)).encode() + b"]"


def _part(text: str) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": []}


def _stop_reason(finish: Finish) -> str:
    if finish.stop_string is not None:
        return "stop_sequence"
    return "max_tokens" if finish.reason == "length" else "end_turn"


def messages_event(name: str, **fields: Any) -> bytes:
    """One event of Anthropic's interface."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields}, separators=(',', ':'))}\n\n".encode()
