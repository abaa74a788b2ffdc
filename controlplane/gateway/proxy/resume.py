"""Resuming a stream whose engine was lost, so that the client does not notice.

A :class:`StreamRecorder` stores the raw bytes that were relayed, without parsing them. When the engine is
lost, they show exactly which tokens the client has (:class:`SentSoFar`), :func:`plan` decides how to
continue, and a :class:`Splice` turns another engine's stream into the rest of the first:

* **continue**: ``POST /v1/completions`` with the prompt's token ids and the ids already sent. Exact for
  greedy decoding, where the next token depends only on the tokens before it.
* **replay**: the request is sent again from its beginning, and what the client already has is left out. For
  requests whose next token depends on more than the tokens before it (a seeded sampler, stop strings that may
  span the loss, penalties on output tokens).

In both cases, text that is generated again is compared with the text that was sent, and left out. If they
differ, the stream is not resumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import msgspec

from controlplane.gateway.request_body import raw_members
from controlplane.gateway.request_context import StreamKind
from controlplane.gateway.stream_usage import ReportedUsage, response_usage
from controlplane.http.json_reader import InvalidJson

MAX_DECODED_BYTES: Final = 4096
"""A member of a request that is longer than this is not decoded."""
FOLD_BYTES: Final = 1024 * 1024
"""Raw bytes that a recorder stores before it folds them into token ids and text."""
MAX_TEXT_CHARS: Final = 4 * 1024 * 1024
"""A stream of more text than this is not resumed, and its text is not stored."""
MAX_TOKEN_IDS: Final = 2 * 1024 * 1024
"""The same for token ids, of the prompt or generated."""

TOKEN_ID_MEMBERS: Final = re.compile(rb',"(?:prompt_)?token_ids":(?:\[[0-9, ]*\]|null)')
"""Matches the members that only the gateway requested. Inside a JSON string quotes are escaped, so this can't
match generated text."""

DONE: Final = b"data: [DONE]\n\n"

_ONLY_CHAT: Final = frozenset({
    "messages", "tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens", "stream_options",
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs",
    "response_format", "metadata", "models", "store", "documents", "include_reasoning",
    "reasoning_effort",
})  # fmt: skip
_PENALTIES: Final = ("presence_penalty", "frequency_penalty", "min_tokens", "logits_processors")
_GUIDED: Final = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice")

_DECIDING: Final = frozenset({
    *_PENALTIES, *_GUIDED, "best_of", "echo", "logprobs", "max_completion_tokens", "max_tokens", "n", "seed",
    "stop", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "use_beam_search",
})  # fmt: skip
"""Members of a request that decide whether and how its stream is resumed."""

Policy = Literal["exact", "best_effort", "never"]

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_WHOLE_NUMBER: Final = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")


class NotResumable(Exception):
    """This stream can't be resumed; the message is the reason."""


class _WrongType(Exception):
    """A member of an engine's event has another type than the API gives it."""


_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_UNREADABLE: Final = (*_NOT_JSON, _WrongType)
"""What reading an event raises if the event is malformed."""


# -- typed readers of what an engine sent ----------------------------------------------------------


def _object(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _WrongType
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _WrongType
    return value


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_TOKEN_IDS:
        raise _WrongType
    if not all(type(item) is int and item >= 0 for item in value):
        raise _WrongType
    return value


def _string(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _WrongType
    return value


# -- typed readers of what the client sent, as leniently as engines read it ------------------------


def request_members(body: bytes) -> dict[str, Any]:
    """The members of a request's body. Those that decide nothing here, and long ones, are not decoded: they
    are only sent again. Raises :class:`NotResumable`."""
    try:
        return {
            name: _decode(value) if name in _DECIDING and len(bytes(value)) <= MAX_DECODED_BYTES else value
            for name, value in raw_members(body).items()
        }
    except (InvalidJson, *_NOT_JSON) as error:
        raise NotResumable(f"the request can't be read again: {error}") from None


def _whole_number(request: dict[str, Any], name: str) -> int | None:
    """A member that is a whole number, also as ``"100"`` or ``100.0``; None if it is null or missing."""
    value = request.get(name)
    if value is None:
        return None
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return int(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise NotResumable(f"'{name}' is not a whole number")


def _number(request: dict[str, Any], name: str) -> float | None:
    value = request.get(name)
    if value is None:
        return None
    if isinstance(value, str | int | float):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise NotResumable(f"'{name}' is not a number")


@dataclass(slots=True)
class SentSoFar:
    """What the client has received of one stream."""

    kind: StreamKind
    first: dict[str, Any] = field(default_factory=dict)
    """The first event's ``id``, ``object``, ``created`` and ``model``, which the resumed part repeats."""
    prompt_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    text_chars: int = 0
    covered_tokens: int = 0
    """Tokens up to the last event that had exactly one token and text; up to there, text and token ids are
    known to agree."""
    covered_chars: int = 0
    """Length of the text up to that event."""
    texted_tokens: int = 0
    """Tokens up to the last event with text."""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    """The usage that the engine reported for the whole answer, if it did."""
    usage_sent: bool = False
    done: bool = False
    """``[DONE]`` was sent."""
    readable: bool = True
    """False once an event was malformed."""
    too_long: bool = False
    """More was sent than is stored; only the stream's end is still followed."""
    plain: bool = True
    """Only text of one choice was sent: no tool calls, log-probabilities or reasoning."""

    @property
    def whole_text(self) -> str:
        """All the text that the client has received."""
        return "".join(self.text)

    def add_event(self, event: dict[str, Any]) -> None:
        """Account for an event that was relayed."""
        if not self.first:
            self.first = {key: event[key] for key in ("id", "object", "created", "model") if key in event}
        choices = _objects(event.get("choices"))
        if event.get("usage") is not None:
            self.usage = _object(event["usage"])
            self.usage_sent = self.usage_sent or not choices
        self.add_prompt(event, choices)
        for choice in choices:
            if choice.get("index", 0) != 0 or choice.get("logprobs") is not None:
                self.plain = False
            text, others = _content(choice)
            self.add(_ids(choice.get("token_ids")), text, _string(choice.get("finish_reason")), others)

    def add_prompt(self, event: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        """Take the prompt's token ids from the first event that has them, itself or in its ``choices``."""
        if self.prompt_ids is None:
            for holder in (event, *choices):
                ids = holder.get("prompt_token_ids")
                if ids is not None:
                    self.prompt_ids = _ids(ids)
                    return

    def add(self, token_ids: Sequence[int], text: str, finish_reason: str, others: dict[str, Any]) -> None:
        """Account for the content of one choice of an event: token ids, text, and ``others``."""
        self.token_ids.extend(token_ids)
        if others:
            self.plain = False
        if text:
            self.text.append(text)
            self.text_chars += len(text)
            self.texted_tokens = len(self.token_ids)
            if len(token_ids) == 1:
                self.covered_tokens, self.covered_chars = len(self.token_ids), self.text_chars
        self.finish_reason = finish_reason or self.finish_reason

    def tokens(self) -> ReportedUsage:
        """The tokens of the whole stream: as the engine reported them, or else those that were sent."""
        if self.usage is not None:
            return response_usage(_encode({"usage": self.usage}))
        return ReportedUsage(len(self.prompt_ids or ()), len(self.token_ids) or len(self.text))

    def drop_content(self) -> None:
        """Drop the text and the token ids, because they became too many."""
        self.too_long = True
        self.token_ids = []
        self.text = []
        self.text_chars = self.covered_tokens = self.covered_chars = self.texted_tokens = 0

    def rewind(self, tokens: int) -> None:
        """Drop the token ids after the first ``tokens``, because they are generated again. The text stays;
        usage is that of the lost stream."""
        self.usage = None
        del self.token_ids[tokens:]
        if self.covered_tokens > tokens:
            self.covered_tokens = self.covered_chars = 0


def _content(choice: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of an event of either API, and the other content of its ``delta``; that includes ``content``
    that is not a string (Mistral and GLM send lists of parts)."""
    delta = _object(choice.get("delta"))
    others = {key: value for key, value in delta.items() if value and key not in ("role", "content")}
    content = delta.get("content")
    if content and not isinstance(content, str):
        others["content"] = content
        content = None
    return _string(choice.get("text")) or content or "", others


def events(data: bytes) -> Iterator[dict[str, Any] | None]:
    """The events of whole server-sent-event blocks; None for ``[DONE]``. Comments are left out."""
    for line in data.splitlines():
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            yield None
        elif payload:
            event = _decode(payload)
            if isinstance(event, dict):
                yield event


class StreamRecorder:
    """Stores the relayed part of one stream, in case its engine is lost.

    Holds at most :data:`FOLD_BYTES` of raw bytes and the last events; older ones are folded into token ids
    and text, of which at most :data:`MAX_TOKEN_IDS` and :data:`MAX_TEXT_CHARS` are stored.
    """

    __slots__ = ("_raw", "_raw_bytes", "_sent")

    def __init__(self, kind: StreamKind) -> None:
        self._sent = SentSoFar(kind)
        self._raw: list[bytes] = []
        self._raw_bytes = 0

    def add(self, data: bytes) -> None:
        """Store whole events as the engine sent them, token ids included."""
        self._raw.append(data)
        self._raw_bytes += len(data)
        if self._raw_bytes > FOLD_BYTES:
            self.sent()

    def sent(self) -> SentSoFar:
        """What the client has received so far."""
        raw, self._raw, self._raw_bytes = self._raw, [], 0
        try:
            for event in events(b"".join(raw)):
                if event is None:
                    self._sent.done = True
                else:
                    self._sent.add_event(event)
        except _UNREADABLE:
            self._sent.readable = False
        if self._sent.text_chars > MAX_TEXT_CHARS or len(self._sent.token_ids) > MAX_TOKEN_IDS:
            self._sent.drop_content()
        return self._sent


@dataclass(frozen=True, slots=True)
class Continuation:
    """How to continue a stream: the request for the other engine, and the part of its response that the
    client already has."""

    method: Literal["continue", "replay", "finish"]
    path: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    skip_text: str = ""
    """Text that was already sent; the new stream must begin with it."""
    sent_tokens: int = 0
    """Generated tokens that are part of the new request's prompt."""
    needs_context_length: bool = False
    """The client set no token limit, so the engine's context length limits the response; see
    :meth:`limited`."""

    def limited(self, max_model_len: int | None) -> Continuation:
        """The same continuation, limited to the tokens that are left in the engine's context length. Raises
        :class:`NotResumable` if ``max_model_len`` is None."""
        if max_model_len is None:
            raise NotResumable("the engine's context length is not known")
        left = max_model_len - len(self.body["prompt"])
        if left <= 0:
            return Continuation("finish")
        return replace(self, body={**self.body, "max_tokens": left}, needs_context_length=False)


def plan(body: bytes, sent: SentSoFar, policy: Policy) -> Continuation:
    """Decide how to continue a lost stream; ``body`` is the request as the client sent it. Raises
    :class:`NotResumable`."""
    if policy == "never":
        raise NotResumable("the policy is never to resume")
    if sent.done or sent.finish_reason is not None:
        return Continuation("finish")
    if not sent.readable:
        raise NotResumable("the engine's events can't be read")
    if sent.too_long:
        raise NotResumable("too much of it was sent already")
    request = request_members(body)
    if not sent.plain:
        raise NotResumable("tool calls, log-probabilities or reasoning were already sent")
    for name in ("n", "best_of"):
        if _whole_number(request, name) not in (None, 1):
            raise NotResumable(f"'{name}' is not 1")
    if request.get("logprobs") or request.get("echo") or request.get("top_logprobs"):
        raise NotResumable("log-probabilities or an echo were asked for")

    greedy = _number(request, "temperature") == 0
    seeded = request.get("seed") is not None
    depends_on_history = bool(
        request.get("stop")
        or any(request.get(name) for name in _PENALTIES)
        or any(request.get(name) for name in _GUIDED)
        or (request.get("tools") and request.get("tool_choice") != "none")
        or request.get("use_beam_search")
    )
    if greedy and not depends_on_history and sent.prompt_ids is not None:
        return _continue(request, sent, sent.covered_tokens, sent.whole_text[sent.covered_chars :])
    if greedy or seeded:
        path = "/v1/chat/completions" if sent.kind == "chat" else "/v1/completions"
        return Continuation("replay", path, request, sent.whole_text)
    if policy == "exact":
        raise NotResumable("sampling without a seed can't be repeated (the policy is exact)")
    if depends_on_history or sent.prompt_ids is None:
        raise NotResumable("sampling without a seed, with stop strings, tools, penalties or a grammar")
    return _continue(request, sent, sent.texted_tokens, "")


def _continue(request: dict[str, Any], sent: SentSoFar, tokens: int, skip_text: str) -> Continuation:
    body = {key: value for key, value in request.items() if key not in _ONLY_CHAT}
    prompt = [*(sent.prompt_ids or ()), *sent.token_ids[:tokens]]
    body |= {"prompt": prompt, "stream": True, "return_token_ids": True}
    limit = _whole_number(request, "max_completion_tokens")
    if limit is None:
        limit = _whole_number(request, "max_tokens")
    if limit is None and sent.kind == "completion":
        limit = 16  # the default of the API
    if limit is None:
        return Continuation("continue", "/v1/completions", body, skip_text, tokens, needs_context_length=True)
    left = limit - tokens
    if left <= 0:
        return Continuation("finish")
    return Continuation("continue", "/v1/completions", {**body, "max_tokens": left}, skip_text, tokens)


class Splice:
    """Turns another engine's stream into the rest of the interrupted one.

    :meth:`feed` takes whole events of the other engine and returns the bytes for the client. ``sent`` is
    updated, so that the stream can also be resumed after a second loss.
    """

    def __init__(
        self, continuation: Continuation, sent: SentSoFar, stream_options: dict[str, Any] | None
    ) -> None:
        self._continuation = continuation
        self._sent = sent
        options = stream_options or {}
        self._include_usage = bool(options.get("include_usage"))
        self._each_usage = bool(options.get("continuous_usage_stats"))
        self._skip = continuation.skip_text
        if continuation.method != "finish":
            sent.rewind(continuation.sent_tokens)

    def feed(self, data: bytes) -> bytes:
        """The bytes for the client from whole events. Raises :class:`NotResumable` if the text differs."""
        out: list[bytes] = []
        try:
            for event in events(data):
                if event is None:
                    out.append(self.finish())
                else:
                    out += self._event(event)
        except _UNREADABLE:
            raise NotResumable("the other engine's events can't be read") from None
        return b"".join(out)

    def finish(self) -> bytes:
        """The part of the stream's end that the client does not have yet."""
        sent = self._sent
        parts: list[bytes] = []
        if sent.finish_reason is None:
            parts.append(self._shape("", "length"))
            sent.finish_reason = "length"
        if self._include_usage and not sent.usage_sent:
            sent.usage_sent = True
            parts.append(sse_event({**sent.first, "choices": [], "usage": self._usage()}))
        if not sent.done:
            sent.done = True
            parts.append(DONE)
        return b"".join(parts)

    def _event(self, event: dict[str, Any]) -> Iterator[bytes]:
        sent = self._sent
        if event.get("error"):
            raise NotResumable("the other engine answered with an error")
        choices = _objects(event.get("choices"))
        sent.add_prompt(event, choices)
        if event.get("usage") is not None and self._continuation.method == "replay":
            # A replay is a complete response, so the engine's count is right.
            sent.usage = _object(event["usage"])
        for choice in choices:
            text, others = _content(choice)
            finish_reason = _string(choice.get("finish_reason"))
            text = self._without_sent(text)
            if finish_reason and self._skip:
                raise NotResumable("the other engine's text ends before what was sent")
            sent.add(_ids(choice.get("token_ids")), text, finish_reason, others)
            if text or finish_reason or others:
                yield self._shape(text, finish_reason or None, others, choice.get("stop_reason"))

    def _without_sent(self, text: str) -> str:
        """The part of the newly generated text that the client does not have yet."""
        if not self._skip:
            return text
        length = min(len(self._skip), len(text))
        if text[:length] != self._skip[:length]:
            raise NotResumable("the other engine's text differs from what was sent")
        self._skip = self._skip[length:]
        return text[length:]

    def _shape(
        self,
        text: str,
        finish_reason: str | None,
        others: dict[str, Any] | None = None,
        stop_reason: Any = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self._sent.kind == "chat":
            choice["delta"] = {**({"content": text} if text else {}), **(others or {})}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish_reason}
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        event = {**self._sent.first, "choices": [choice]}
        if self._each_usage:
            event["usage"] = self._usage()
        return sse_event(event)

    def _usage(self) -> dict[str, Any]:
        if self._sent.usage is not None:
            return self._sent.usage
        prompt, completion = len(self._sent.prompt_ids or ()), len(self._sent.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def sse_event(event: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(event) + b"\n\n"
