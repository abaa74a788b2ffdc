"""Server-sent events as far as a relay must know them: where one ends, which one is the last or an error.

Engines end an event with ``\\n\\n`` or with ``\\r\\n\\r\\n``. What marks an end or an error is looked for at
the start of a line or with its quotes: inside a JSON string both would be escaped, so that a model that
writes about events can't be taken for one.
"""

from __future__ import annotations

import re
from typing import Final

from controlplane.core.routing.tier_table import Api

# Patterns that begin with a literal: `re` skips to it, where one with `(?:^|\n)` tries every byte,
# which took more than half of a stream's time in the gateway.
_DONE: Final = re.compile(rb"data: ?\[DONE\]")
_LAST_EVENT: Final = {
    Api.CHAT: None,
    Api.COMPLETIONS: None,
    Api.RESPONSES: re.compile(rb'"type": ?"response\.(?:completed|incomplete|failed)"'),
    Api.MESSAGES: re.compile(rb'"type": ?"message_stop"'),
}
_ERROR: Final = {Api.RESPONSES: b"event: error", Api.MESSAGES: b"event: error"}
LINE_FEED: Final = 0x0A
_ERROR_DATA: Final = b'data: {"error"'
_ERROR_LINE: Final = re.compile(rb"(?:^|\n)event: error")


def events_end(data: bytes) -> int:
    """Where the last whole event of ``data`` ends; 0 if there is none."""
    end = data.rfind(b"\n\n")
    if end >= 0:
        return end + 2
    end = data.rfind(b"\n\r\n")
    return end + 3 if end >= 0 else 0


def has_end(api: Api, events: bytes) -> bool:
    """Is the last event of a whole stream among these? False where the route has no such mark."""
    if api not in _LAST_EVENT:
        return False
    for done in _DONE.finditer(events):
        if done.start() == 0 or events[done.start() - 1] == LINE_FEED:
            return True
    last_event = _LAST_EVENT[api]
    return last_event is not None and last_event.search(events) is not None


def is_end(api: Api, last: bytes) -> bool:
    """Do the last events of a stream say that it is whole? True where the route has no such mark."""
    return api not in _LAST_EVENT or has_end(api, last)


def has_error(api: Api, events: bytes) -> bool:
    """Did the engine write an error among these events?"""
    mark = _ERROR.get(api)
    if mark is None:
        return _ERROR_DATA in events
    return mark in events and _ERROR_LINE.search(events) is not None
