"""Server-sent events, as far as a relay needs them: where an event ends, and which is the last.

Engines end an event with ``\\n\\n`` or with ``\\r\\n\\r\\n``; returns without a line feed, which the
specification allows, become line feeds (:class:`EventBuffer`). The marks of an end are matched
at the start of a line or together with their quotes. Within a JSON string both would be escaped, so generated
text that contains such a mark does not match.
"""

from __future__ import annotations

import re
from typing import Final

from controlplane.core.routing.tier_table import Api

# Patterns that begin with a literal, because `re` skips to it. A pattern with `(?:^|\n)` tries every byte,
# which took more than half of a stream's time in the gateway.
_DONE: Final = re.compile(rb"data: ?\[DONE\]")
_LAST_EVENT: Final = {
    Api.CHAT: None,
    Api.COMPLETIONS: None,
    Api.RESPONSES: re.compile(rb'"type": ?"response\.(?:completed|incomplete|failed)"'),
    Api.MESSAGES: re.compile(rb'"type": ?"message_stop"'),
}
_USUAL_END: Final = b"\ndata: [DONE]\n\n"
LINE_FEED: Final = 0x0A
_LONE_RETURN: Final = re.compile(rb"\r(?!\n)")
MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""The largest event of an engine's stream. The largest that engines send are a prompt's token ids and whole
responses: megabytes."""


def events_end(data: bytes) -> int:
    """The offset after the last complete event in ``data``; 0 if there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
    line_feeds, with_returns = data.rfind(b"\n\n"), data.rfind(b"\n\r\n")
    if line_feeds > with_returns:
        return line_feeds + 2
    return with_returns + 3 if with_returns >= 0 else 0


def has_end(api: Api, events: bytes) -> bool:
    """Whether ``events`` include the last event of a complete stream. False for a route without such an
    event."""
    if api not in _LAST_EVENT:
        return False
    if events.endswith(_USUAL_END):
        return True
    for done in _DONE.finditer(events):
        if done.start() == 0 or events[done.start() - 1] == LINE_FEED:
            return True
    last_event = _LAST_EVENT[api]
    return last_event is not None and last_event.search(events) is not None


def is_end(api: Api, last: bytes) -> bool:
    """Whether the last events of a stream show that it is complete. True for a route without such an
    event."""
    return api not in _LAST_EVENT or has_end(api, last)


class EventTooLarge(Exception):
    """An event of a stream is over :data:`MAX_EVENT_BYTES`."""

    def __init__(self) -> None:
        super().__init__(f"an event of the engine's stream is over {MAX_EVENT_BYTES} bytes")


class EventBuffer:
    """Splits a stream into whole events, in time that is linear in its length. Holds at most
    :data:`MAX_EVENT_BYTES` of the event that is not whole yet. Lines that end with ``\\r`` get ``\\n``."""

    __slots__ = ("_held", "_return")

    def __init__(self) -> None:
        self._held = bytearray()
        self._return = b""
        """A return that ``data`` ended with: a line feed may follow."""

    def feed(self, data: bytes) -> bytes:
        """The events that ``data`` completes; ``b""`` if there are none. Raises :class:`EventTooLarge`."""
        if self._return or b"\r" in data:
            data = self._without_lone_returns(data)
        held = self._held
        if not held and data.endswith(b"\n\n"):  # the usual case
            return data
        end = events_end(data)
        if not held:
            if end == len(data):
                return data
            if end:
                held += data[end:]
                return data[:end]
        else:
            if not end:  # the blank line may span two pieces
                seam = bytes(held[-2:])
                end = max(events_end(seam + data[:2]) - len(seam), 0)
            if end:
                whole = bytes(held) + data[:end]
                self._held = bytearray(data[end:])
                return whole
        if len(held) + len(data) > MAX_EVENT_BYTES:
            raise EventTooLarge
        held += data
        return b""

    def rest(self) -> bytes:
        """The bytes behind the last whole event; they are removed."""
        rest = bytes(self._held) + self._return
        self._held, self._return = bytearray(), b""
        return rest

    def _without_lone_returns(self, data: bytes) -> bytes:
        data, self._return = self._return + data, b""
        if data.endswith(b"\r") and not data.endswith(b"\r\r"):
            data, self._return = data[:-1], b"\r"
        return _LONE_RETURN.sub(b"\n", data)
