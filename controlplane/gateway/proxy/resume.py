"""Going on with a stream whose engine was lost, so that the client does not notice.

While all goes well a :class:`Tape` keeps the raw bytes that were relayed and nothing is parsed. When the
engine is lost, the tape tells exactly which tokens the client has seen, :func:`plan` decides how to go
on, and a :class:`Splice` shapes the other engine's stream into the one that was begun:

* **continue**: ``POST /v1/completions`` with the prompt's token ids and the ids already sent. Exact for
  greedy decoding, where the next token depends on the tokens before it only.
* **replay**: the request once more from its beginning, leaving out what the client has. For whatever
  depends on more than the tokens before (a seeded sampler, stop strings that may span the cut,
  penalties on output tokens).

In both, text that is generated a second time is compared with what was sent and left out; if it differs
the stream is not resumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from controlplane.core.routing.tier_table import Api
from controlplane.errors import RequestError
from controlplane.http.messages import error_value

FOLD_BYTES: Final = 1024 * 1024
"""Raw bytes that a tape keeps before it folds them into token ids and text."""

TOKEN_ID_MEMBERS: Final = re.compile(rb',"(?:prompt_)?token_ids":(?:\[[0-9, ]*\]|null)')
"""The members that the gateway asked for. Inside a JSON string the quotes would be escaped, so this can't
match text."""

DONE: Final = b"data: [DONE]\n\n"

_ONLY_CHAT: Final = frozenset(
    [
        "messages",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "max_completion_tokens",
        "stream_options",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "chat_template_kwargs",
        "response_format",
        "metadata",
        "models",
        "store",
        "documents",
        "include_reasoning",
        "reasoning_effort",
    ]
)
_PENALTIES: Final = ("presence_penalty", "frequency_penalty", "min_tokens", "logits_processors")
_GUIDED: Final = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice")

Policy = Literal["exact", "best_effort", "never"]
Kind = Literal["chat", "completion"]

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_STRANGE: Final = (msgspec.DecodeError, UnicodeDecodeError, AttributeError, TypeError)
"""What reading an event raises that is not what it should be."""


class NotResumable(Exception):
    """This stream can't be resumed; the text says why."""


@dataclass(slots=True)
class SentSoFar:
    """What the client has seen of one stream."""

    kind: Kind
    first: dict[str, Any] = field(default_factory=dict)
    """The first event's own members: its ``id``, ``created``, ``model`` … go on in the resumed part."""
    prompt_ids: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    text_chars: int = 0
    covered_tokens: int = 0
    """Tokens up to the last event that brought exactly one token and text: there text and ids agree."""
    covered_chars: int = 0
    texted_tokens: int = 0
    """Tokens up to the last event that brought text."""
    finish_reason: str | None = None
    usage_sent: bool = False
    done: bool = False
    readable: bool = True
    """False: an event was not what events of this kind are."""
    plain: bool = True
    """Only text of one choice was seen: no tool calls, log-probabilities or reasoning."""

    @property
    def whole_text(self) -> str:
        """All the text that the client has."""
        return "".join(self.text)

    def take(self, event: dict[str, Any]) -> None:
        """Account for one event."""
        if not self.first:
            self.first = {key: event[key] for key in ("id", "object", "created", "model") if key in event}
        choices = event.get("choices") or ()
        if event.get("usage") is not None and not choices:
            self.usage_sent = True
        prompt_ids = event.get("prompt_token_ids")
        for choice in choices:
            prompt_ids = prompt_ids or choice.get("prompt_token_ids")
            self._take_choice(choice)
        if prompt_ids is not None:
            self.prompt_ids = list(prompt_ids)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        if choice.get("index", 0) != 0 or choice.get("logprobs") is not None:
            self.plain = False
        if self.kind == "chat":
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            if any(delta[key] for key in delta if key not in ("role", "content")):
                self.plain = False
        else:
            text = choice.get("text") or ""
        ids = choice.get("token_ids") or ()
        self.token_ids.extend(ids)
        if text:
            self.text.append(text)
            self.text_chars += len(text)
            self.texted_tokens = len(self.token_ids)
            if len(ids) == 1:
                self.covered_tokens, self.covered_chars = len(self.token_ids), self.text_chars
        self.finish_reason = choice.get("finish_reason") or self.finish_reason


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


class Tape:
    """The raw bytes of one stream as they were relayed, kept for the case that its engine is lost.

    Holds at most :data:`FOLD_BYTES` of raw bytes; what is older is folded into ids and text.
    """

    __slots__ = ("_raw", "_raw_bytes", "_seen")

    def __init__(self, kind: Kind) -> None:
        self._seen = SentSoFar(kind)
        self._raw: list[bytes] = []
        self._raw_bytes = 0

    def keep(self, data: bytes) -> None:
        """Keep whole events as the engine sent them, token ids included."""
        self._raw.append(data)
        self._raw_bytes += len(data)
        if self._raw_bytes > FOLD_BYTES:
            self.read()

    def read(self) -> SentSoFar:
        """What the client has seen so far."""
        raw, self._raw, self._raw_bytes = self._raw, [], 0
        try:
            for event in events(b"".join(raw)):
                if event is None:
                    self._seen.done = True
                else:
                    self._seen.take(event)
        except _STRANGE:
            self._seen.readable = False
        return self._seen


@dataclass(frozen=True, slots=True)
class Continuation:
    """How to go on: what to send where, and what of the answer the client already has."""

    method: Literal["continue", "replay", "finish"]
    path: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    skip_text: str = ""
    """Text at the start of the new stream that was sent before; it must come again."""
    sent_tokens: int = 0
    """Tokens of the answer that are part of the new request's prompt."""


def plan(body: bytes, seen: SentSoFar, policy: Policy, max_model_len: int | None = None) -> Continuation:
    """Decide how to go on with a lost stream.

    ``body`` is the request as it was sent to the engine, ``max_model_len`` (tokens) the engine's context
    length, needed where the request sets no limit of its own. Raises :class:`NotResumable`.
    """
    if policy == "never":
        raise NotResumable("the policy is never to resume")
    if seen.done or seen.finish_reason is not None:
        return Continuation("finish")
    if not seen.readable:
        raise NotResumable("what the engine sent can't be read")
    request = _decode(body)
    if not seen.plain:
        raise NotResumable("tool calls, log-probabilities or reasoning were already sent")
    for name in ("n", "best_of"):
        if request.get(name) not in (None, 1):
            raise NotResumable(f"'{name}' is over 1")
    if request.get("logprobs") or request.get("echo") or request.get("top_logprobs"):
        raise NotResumable("log-probabilities or an echo were asked for")

    greedy = request.get("temperature") == 0
    seeded = request.get("seed") is not None
    history = bool(
        request.get("stop")
        or any(request.get(name) for name in _PENALTIES)
        or any(request.get(name) for name in _GUIDED)
        or (request.get("tools") and request.get("tool_choice") != "none")
        or request.get("use_beam_search")
    )
    if greedy and not history and seen.prompt_ids is not None:
        skip = seen.whole_text[seen.covered_chars :]
        return _continue(request, seen, seen.covered_tokens, skip, max_model_len)
    if greedy or seeded:
        path = "/v1/chat/completions" if seen.kind == "chat" else "/v1/completions"
        return Continuation("replay", path, request, seen.whole_text)
    if policy == "exact":
        raise NotResumable("sampling without a seed can't be repeated (the policy is exact)")
    if history or seen.prompt_ids is None:
        raise NotResumable("sampling without a seed, with stop strings, tools, penalties or a grammar")
    return _continue(request, seen, seen.texted_tokens, "", max_model_len)


def _continue(
    request: dict[str, Any], seen: SentSoFar, tokens: int, skip_text: str, max_model_len: int | None
) -> Continuation:
    prompt = [*(seen.prompt_ids or ()), *seen.token_ids[:tokens]]
    body = {key: value for key, value in request.items() if key not in _ONLY_CHAT}
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if limit is None and seen.kind == "completion":
        limit = 16  # the default of the API
    if limit is not None:
        left = limit - tokens
    elif max_model_len is not None:
        left = max_model_len - len(prompt)
    else:
        raise NotResumable("the engine's context length is not known")
    if left <= 0:
        return Continuation("finish", sent_tokens=tokens)
    body |= {"prompt": prompt, "max_tokens": left, "stream": True, "return_token_ids": True}
    return Continuation("continue", "/v1/completions", body, skip_text, tokens)


class Splice:
    """Shapes a resumed stream into the events of the one that was begun.

    ``feed`` takes whole events of the other engine and gives what the client gets. ``seen`` goes on being
    what the client has seen, so that a second loss can be resumed, too.
    """

    def __init__(self, how: Continuation, seen: SentSoFar, stream_options: dict[str, Any] | None) -> None:
        self._how = how
        self._seen = seen
        options = stream_options or {}
        self._include_usage = bool(options.get("include_usage"))
        self._each_usage = bool(options.get("continuous_usage_stats"))
        self._skip = how.skip_text
        self._engine_usage: dict[str, Any] | None = None
        if how.method == "continue":
            del seen.token_ids[how.sent_tokens :]
        elif how.method == "replay":
            seen.token_ids.clear()
            seen.covered_tokens = seen.covered_chars = 0
        self._ids = seen.token_ids

    def feed(self, data: bytes) -> bytes:
        """The client's share of whole events; raises :class:`NotResumable` if the text differs."""
        out: list[bytes] = []
        try:
            for event in events(data):
                if event is None:
                    out.append(self.finish())
                else:
                    out += self._event(event)
        except _STRANGE:
            raise NotResumable("what the other engine sent can't be read") from None
        return b"".join(out)

    def finish(self) -> bytes:
        """The end of the stream, as far as the client does not have it."""
        seen = self._seen
        parts: list[bytes] = []
        if seen.finish_reason is None:
            parts.append(self._shape("", "length"))
            seen.finish_reason = "length"
        if self._include_usage and not seen.usage_sent:
            seen.usage_sent = True
            parts.append(_sse({**seen.first, "choices": [], "usage": self._usage()}))
        if not seen.done:
            seen.done = True
            parts.append(DONE)
        return b"".join(parts)

    def _event(self, event: dict[str, Any]) -> Iterator[bytes]:
        seen = self._seen
        if "error" in event:
            raise NotResumable("the other engine answered with an error")
        if seen.prompt_ids is None:
            seen.prompt_ids = event.get("prompt_token_ids")
        if event.get("usage") is not None and self._how.method == "replay":
            self._engine_usage = event["usage"]  # a replay is a whole answer: the engine counts right
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            ids = choice.get("token_ids") or ()
            self._ids.extend(ids)
            if self._skip:
                length = min(len(self._skip), len(text))
                if text[:length] != self._skip[:length]:
                    raise NotResumable("the other engine's text differs from what was sent")
                self._skip, text = self._skip[length:], text[length:]
            finish = choice.get("finish_reason")
            if finish and self._skip:
                raise NotResumable("the other engine's text ends before what was sent")
            others = {key: delta[key] for key in delta if key not in ("role", "content") and delta[key]}
            if others:
                seen.plain = False
            if text:
                seen.text.append(text)
                seen.text_chars += len(text)
                seen.texted_tokens = len(self._ids)
                if len(ids) == 1 and not self._skip:
                    seen.covered_tokens, seen.covered_chars = len(self._ids), seen.text_chars
            if finish:
                seen.finish_reason = finish
            if text or finish or others:
                yield self._shape(text, finish, others, choice.get("stop_reason"))

    def _shape(
        self, text: str, finish: str | None, others: dict[str, Any] | None = None, stop_reason: Any = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self._seen.kind == "chat":
            choice["delta"] = {**({"content": text} if text else {}), **(others or {})}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish}
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        event = {**self._seen.first, "choices": [choice]}
        if self._each_usage:
            event["usage"] = self._usage()
        return _sse(event)

    def _usage(self) -> dict[str, Any]:
        if self._engine_usage is not None:
            return self._engine_usage
        prompt, completion = len(self._seen.prompt_ids or ()), len(self._ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def error_event(error: RequestError, api: Api) -> bytes:
    """The event that tells a client that its stream ends here without being whole.

    No ``[DONE]`` follows: a client that overlooks the error must not take the stream for whole.
    """
    if api is Api.MESSAGES:
        value = {"type": "error", "error": {"type": "api_error", "message": error.message}}
        return b"event: error\n" + _sse(value)
    if api is Api.RESPONSES:
        told: dict[str, Any] = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\n" + _sse(told)
    return _sse(error_value(error))


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + _encode(event) + b"\n\n"
