"""The tokens of a request as its engine reports them, read with care: an engine's numbers are added to counters
that only grow, and a wrong one can't be taken back.

Streams of chat and completions have usage only if it is asked for. So the gateway asks, and takes the extra event
out again for a client that did not.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

import msgspec

from controlplane.core.routing.tier_table import Api
from controlplane.http.json_reader import InvalidJson, reader

MAX_TOKENS: Final = 10_000_000
"""Tokens of one request over this are not believed, nor negative or fractional ones: the count is then missing."""
USAGE_APIS: Final = frozenset({Api.CHAT, Api.COMPLETIONS})
"""The routes whose streams have usage only with ``stream_options``."""
USAGE_MARK: Final = b'"usage"'
"""Every event with usage has these bytes; within a JSON string the quotes would be escaped."""

_WHOLE_NUMBER: Final = re.compile(rb"([0-9]{1,9})(?:\.0*)?")
_OBJECT: Final = re.compile(rb'"usage"\s*:\s*\{')
_NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_EVENT: Final = re.compile(rb".*?(?:\n\n|\n\r\n|\Z)", re.DOTALL)
_DATA: Final = re.compile(rb"^data:(.*)$", re.MULTILINE)
_ASKED: Final = b',"stream_options":{"include_usage":true}}'
_NULL: Final = b"null"


class ReportedUsage(NamedTuple):
    """The tokens of one response; None for what the engine did not report, or not as a number that can be
    right."""

    prompt: int | None = None
    generated: int | None = None
    wrong: bool = False
    """The engine reported something that can't be right."""


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: msgspec.Raw = msgspec.Raw()
    completion_tokens: msgspec.Raw = msgspec.Raw()
    input_tokens: msgspec.Raw = msgspec.Raw()
    output_tokens: msgspec.Raw = msgspec.Raw()


class _Holder(msgspec.Struct, gc=False):
    """A response, or an event; the usage of an event of ``/v1/messages`` or ``/v1/responses`` may be one level
    deeper."""

    usage: msgspec.Raw = msgspec.Raw()
    message: msgspec.Raw = msgspec.Raw()
    response: msgspec.Raw = msgspec.Raw()


class _UsageEvent(msgspec.Struct, gc=False):
    choices: list[msgspec.Raw] | None = None
    usage: msgspec.Raw = msgspec.Raw()


_holder = reader(_Holder)
_usage = reader(_Usage)
_usage_event = reader(_UsageEvent)
_options = reader(dict[str, Any])


def whole_number(value: msgspec.Raw | bytes) -> int | None:
    """A JSON value that is a whole number and not negative, of at most nine digits; None for any other."""
    found = _WHOLE_NUMBER.fullmatch(value)
    return int(found[1]) if found is not None else None


def response_usage(body: bytes) -> ReportedUsage:
    """The usage of a whole response, or of one event's data. Never raises."""
    try:
        holder = _holder(body)
        if not holder.usage:
            inner = holder.message or holder.response
            if bytes(inner[:1]) == b"{":
                holder = _holder(inner)
        if not holder.usage or holder.usage == _NULL:
            return ReportedUsage()
        usage = _usage(holder.usage)
    except InvalidJson:
        return ReportedUsage(wrong=_OBJECT.search(body) is not None)
    prompt = _tokens(usage.prompt_tokens, usage.input_tokens)
    generated = _tokens(usage.completion_tokens, usage.output_tokens)
    wrong = prompt is _WRONG or generated is _WRONG
    return ReportedUsage(
        None if prompt is _WRONG else prompt, None if generated is _WRONG else generated, wrong
    )
