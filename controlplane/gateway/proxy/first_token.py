"""Where the answer begins in a stream, its first event with content, and whether it is whole at the end.

Many engines open a stream before they have computed anything: with a comment, an event that only names the
role, ``response.created`` or ``message_start``. Until the first event with content the client has got nothing
that another engine could not send as well, so the gateway holds such events back, and a stream that is lost
before is tried elsewhere. Whatever is not known to be without content counts as content.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from controlplane.core.routing.tier_table import Api
from controlplane.gateway.proxy.engine_errors import parsed

MAX_PREAMBLE_BYTES: Final = 64 * 1024
"""A stream that has sent this much counts as begun, whatever it sent."""

# The usual first token: found without decoding the event.
_TEXT: Final = re.compile(rb'"(?:content|text|reasoning_content|reasoning)": ?"[^"]')
_DONE: Final = b"[DONE]"
_CHOICE_FRAME: Final = frozenset({
    "index", "stop_reason", "matched_stop", "content_filter_results", "native_finish_reason",
    "prompt_token_ids",
})  # fmt: skip
_OPENING: Final = frozenset({
    "response.created", "response.in_progress", "response.queued", "message_start", "ping",
})  # fmt: skip
_EMPTY_ITEMS: Final = frozenset({"message", "reasoning"})
_EMPTY_BLOCKS: Final = frozenset({"text", "thinking"})

_FINISHED: Final = {
    Api.CHAT: re.compile(rb'"finish_reason": ?"'),
    Api.COMPLETIONS: re.compile(rb'"finish_reason": ?"'),
    Api.MESSAGES: re.compile(rb'"stop_reason": ?"'),
}
_MESSAGE_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

_decode: Final = msgspec.json.Decoder().decode


def has_content(api: Api, events: bytes) -> bool:
    """Whether whole events contain content. True for a route whose streams are not known."""
    if api is Api.CHAT or api is Api.COMPLETIONS:
        if _TEXT.search(events) is not None:
            return True
        has: Callable[[str, dict[str, Any]], bool] = _chunk_has_content
    elif api is Api.RESPONSES or api is Api.MESSAGES:
        has = _event_has_content
    else:
        return True
    for name, data, _ in parsed(events):
        if data.strip() == _DONE:
            return True
        try:
            value = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return True
        if not isinstance(value, dict) or has(name, value):
            return True
    return False


def _chunk_has_content(name: str, chunk: dict[str, Any]) -> bool:
    """Whether a chunk of a chat or completion has content: text, reasoning, a tool call, a finish reason,
    token ids, log-probabilities or, at the end, usage."""
    choices = chunk.get("choices")
    if not choices:
        return bool(chunk.get("usage")) or "choices" not in chunk
    if not isinstance(choices, list):
        return True
    for choice in choices:
        if not isinstance(choice, dict):
            return True
        for member, value in choice.items():
            if member == "delta" and isinstance(value, dict):
                if any(part for key, part in value.items() if key != "role"):
                    return True
            elif value and member not in _CHOICE_FRAME:
                return True
    return False


def _event_has_content(name: str, event: dict[str, Any]) -> bool:
    """The same for an event of OpenAI's responses or Anthropic's messages."""
    kind = event.get("type") or name
    if kind in _OPENING or kind == "response.content_part.added":
        return False
    if kind == "response.output_item.added":
        item = event.get("item")
        return not isinstance(item, dict) or item.get("type") not in _EMPTY_ITEMS
    if kind == "content_block_start":
        block = event.get("content_block")
        if isinstance(block, dict) and block.get("type") in _EMPTY_BLOCKS:
            return bool(block.get("text") or block.get("thinking"))
    return True


def completed(rest: bytes) -> bytes:
    """The event in a stream's last bytes, after the last blank line, if it lacks only its blank line; else
    nothing."""
    for _, data, _ in parsed(rest):
        if data.strip() == _DONE:
            return rest.rstrip(b"\r\n") + b"\n\n"
        try:
            _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return b""
        return rest.rstrip(b"\r\n") + b"\n\n"
    return b""


def missing_end(api: Api, last: bytes) -> bytes | None:
    """The end that the engine left out of a stream whose answer is whole, as its last events show; None if it
    is not whole."""
    finished = _FINISHED.get(api)
    if finished is None or finished.search(last) is None:
        return None
    return _MESSAGE_STOP if api is Api.MESSAGES else b"data: [DONE]\n\n"
