"""The tokens of a request as its engine reports them.

Numbers that can't be right are ignored, because counters only grow: a wrong number could not be subtracted
later. Streams of chat and completions have usage only if the request asks for it, so the gateway asks, and
removes the extra event if the client did not ask.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from controlplane.core.routing.tier_table import Api
from controlplane.http.json_reader import UNREADABLE, InvalidJson, reader

MAX_TOKENS: Final = 10_000_000
"""More tokens of one request are not believed, nor negative or fractional ones: the count is then missing."""
USAGE_APIS: Final = frozenset({Api.CHAT, Api.COMPLETIONS})
"""The routes whose streams have usage only with ``stream_options``."""
USAGE_MARK: Final = b'"usage"'
"""Every event with usage has these bytes; within a JSON string the quotes would be escaped."""

_WHOLE_NUMBER: Final = re.compile(rb"([0-9]{1,9})(?:\.0*)?")
_OBJECT: Final = re.compile(rb'"usage"\s*:\s*\{')
_NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DATA: Final = re.compile(rb"^data:(.*)$", re.MULTILINE)
_ASKED: Final = b',"stream_options":{"include_usage":true}}'
_MISSING: Final = (b"", b"null")


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
    """A response, or an event; in an event of ``/v1/messages`` or ``/v1/responses``, usage may be one level
    deeper."""

    usage: msgspec.Raw = msgspec.Raw()
    message: msgspec.Raw = msgspec.Raw()
    response: msgspec.Raw = msgspec.Raw()


class _UsageEvent(msgspec.Struct, gc=False):
    choices: list[msgspec.Raw] | None = None
    usage: msgspec.Raw = msgspec.Raw()


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: msgspec.Raw = msgspec.Raw()


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _PlainUsage(msgspec.Struct, gc=False):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None


class _PlainHolder(msgspec.Struct, gc=False):
    """A response whose usage can be right; nearly every response."""

    usage: _PlainUsage | None = None


_plain = msgspec.json.Decoder(_PlainHolder).decode
_holder = reader(_Holder)
_usage = reader(_Usage)
_usage_event = reader(_UsageEvent)
_stream_options = reader(_StreamOptions)
_members = reader(dict[str, msgspec.Raw])


def whole_number(value: msgspec.Raw | bytes) -> int | None:
    """A JSON value that is a whole number and not negative, of at most nine digits; None for any other."""
    found = _WHOLE_NUMBER.fullmatch(value)
    return int(found[1]) if found is not None else None


def response_usage(body: bytes) -> ReportedUsage:
    """The usage of a whole response, or of one event's data. Never raises."""
    try:
        plain = _plain(body).usage
    except UNREADABLE:
        plain = None
    if plain is not None:
        prompt = plain.input_tokens if plain.prompt_tokens is None else plain.prompt_tokens
        generated = plain.output_tokens if plain.completion_tokens is None else plain.completion_tokens
        return ReportedUsage(prompt, generated)
    return _unusual_usage(body)


def _unusual_usage(body: bytes) -> ReportedUsage:
    """The usage of a response that has none where most have it, or one that can't be right."""
    try:
        holder = _holder(body)
        if not holder.usage:
            inner = bytes(holder.message or holder.response)
            if inner.startswith(b"{"):
                holder = _holder(inner)
        if _is_missing(holder.usage):
            return ReportedUsage()
        usage = _usage(holder.usage)
    except InvalidJson:
        return ReportedUsage(wrong=_OBJECT.search(body) is not None)
    prompt, prompt_wrong = _tokens(usage.prompt_tokens, usage.input_tokens)
    generated, generated_wrong = _tokens(usage.completion_tokens, usage.output_tokens)
    return ReportedUsage(prompt, generated, prompt_wrong or generated_wrong)


def _tokens(*names: msgspec.Raw) -> tuple[int | None, bool]:
    """The first of these numbers that is there, and whether it can't be right."""
    value = next((value for value in names if not _is_missing(value)), None)
    if value is None:
        return None, False
    number = whole_number(value)
    return (number, False) if number is not None and number <= MAX_TOKENS else (None, True)


class StreamUsage:
    """Finds the usage of one stream. It keeps only the first and the last events that have some, and reads
    them once the stream has ended."""

    __slots__ = ("_first", "_last")

    def __init__(self) -> None:
        self._first = b""
        self._last = b""

    def add(self, events: bytes, mark: int = 0) -> None:
        """Whole events that contain :data:`USAGE_MARK`, at ``mark`` for the first time."""
        found = _OBJECT.search(events, mark)
        if found is not None:
            begin = events.rfind(b"\n", 0, found.start()) + 1
            if self._first:
                self._last = events[begin:]
            else:
                self._first = events[begin:]

    def read(self) -> ReportedUsage:
        """The usage of the whole stream. Figures only grow during a stream, so the largest ones are those of
        the whole."""
        prompt = generated = None
        wrong = False
        events = self._first + self._last
        read_to = 0
        for found in _OBJECT.finditer(events):
            if found.start() < read_to:
                continue
            begin = events.rfind(b"\n", 0, found.start()) + 1
            read_to = events.find(b"\n", found.start())
            data = _DATA.match(events, begin, read_to)
            usage = response_usage(data[1]) if data is not None else ReportedUsage()
            prompt = _larger(prompt, usage.prompt)
            generated = _larger(generated, usage.generated)
            wrong = wrong or usage.wrong
        return ReportedUsage(prompt, generated, wrong)


def _larger(a: int | None, b: int | None) -> int | None:
    return b if a is None or (b is not None and b > a) else a


def asks_usage(stream_options: msgspec.Raw) -> bool:
    """Whether a request with these ``stream_options`` asks for usage, or has some that can't be extended."""
    if _is_missing(stream_options):
        return False
    try:
        include = bytes(_stream_options(stream_options).include_usage)
    except InvalidJson:
        return True
    return include not in (b"", b"null", b"false")


def ask_usage(stream_options: msgspec.Raw) -> dict[str, Any]:
    """``stream_options`` that ask for usage, for a client that does not."""
    members: dict[str, Any] = {}
    if not _is_missing(stream_options):
        members.update(_members(stream_options))
    members.pop("continuous_usage_stats", None)  # without effect before, because there was no usage
    return {**members, "include_usage": True}


def spliced(body: bytes) -> bytes:
    """``body``, a JSON object with some members but no ``stream_options``, with those that ask for usage.
    Much faster than encoding the body again."""
    return body.rstrip()[:-1] + _ASKED


def without_usage_events(events: bytes) -> bytes:
    """Whole events without those that only carry usage."""
    mark = events.find(USAGE_MARK)
    if mark < 0:
        return events
    remaining = []
    copied_to = 0
    for found in _NO_CHOICES.finditer(events, _bounds(events, mark)[0]):
        begin, end = _bounds(events, found.start())
        if begin >= copied_to and _only_usage(events[begin:end]):
            remaining.append(events[copied_to:begin])
            copied_to = end
    return b"".join((*remaining, events[copied_to:])) if copied_to else events


def _bounds(events: bytes, offset: int) -> tuple[int, int]:
    """Where the event at ``offset`` begins and ends."""
    begin = events.rfind(b"\n\n", 0, offset)
    begin = begin + 2 if begin >= 0 else 0
    with_return = events.rfind(b"\n\r\n", max(begin - 1, 0), offset)
    if with_return >= 0:
        begin = with_return + 3
    end = events.find(b"\n\n", offset)
    end = end + 2 if end >= 0 else len(events)
    with_return = events.find(b"\n\r\n", offset, end)
    return begin, with_return + 3 if with_return >= 0 else end


def _only_usage(event: bytes) -> bool:
    data = _DATA.search(event)
    if data is None or USAGE_MARK not in event:
        return False
    try:
        found = _usage_event(data[1])
    except InvalidJson:
        return False
    return found.choices == [] and not _is_missing(found.usage)


def _is_missing(value: msgspec.Raw) -> bool:
    return bytes(value) in _MISSING
