"""Server-sent events, as far as a relay needs them: where an event ends, and which is the last or an error.

Engines end an event with ``\\n\\n`` or with ``\\r\\n\\r\\n``. The marks of an end and of an error are matched
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
_ERROR: Final = {Api.RESPONSES: b"event: error", Api.MESSAGES: b"event: error"}
LINE_FEED: Final = 0x0A
_ERROR_DATA: Final = b'data: {"error"'
_ERROR_LINE: Final = re.compile(rb"(?:^|\n)event: error")


def events_end(data: bytes) -> int:
    """The offset after the last complete event in ``data``; 0 if there is none."""
    end = data.rfind(b"\n\n")
    if end >= 0:
        return end + 2
    end = data.rfind(b"\n\r\n")
    return end + 3 if end >= 0 else 0


def has_end(api: Api, events: bytes) -> bool:
    """Whether ``events`` include the last event of a complete stream. False for a route without such an
    event."""
    if api not in _LAST_EVENT:
        return False
    for done in _DONE.finditer(events):
        if done.start() == 0 or events[done.start() - 1] == LINE_FEED:
            return True
    last_event = _LAST_EVENT[api]
    return last_event is not None and last_event.search(events) is not None


def is_end(api: Api, last: bytes) -> bool:
    """Whether the last events of a stream show that it is complete. True for a route without such an
    event."""
    return api not in _LAST_EVENT or has_end(api, last)


def has_error(api: Api, events: bytes) -> bool:
    """Whether ``events`` include an error from the engine."""
    mark = _ERROR.get(api)
    if mark is None:
        return _ERROR_DATA in events
    return mark in events and _ERROR_LINE.search(events) is not None
