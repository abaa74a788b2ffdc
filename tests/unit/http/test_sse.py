"""Where events end, however the bytes of a stream are cut."""

from __future__ import annotations

import pytest

from controlplane.http.sse import MAX_EVENT_BYTES, EventBuffer, EventTooLarge, events_end

MIXED = b"data: a\n\ndata: b\r\n\r\ndata: c\n\r\n: comment\n\ndata: d\n\nevent: e"


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", 0),
        (b"data: a", 0),
        (b"data: a\n", 0),
        (b"data: a\n\n", 9),
        (b"data: a\r\n\r\n", 11),
        (b"data: a\n\ndata: b\r\n\r\nx", 20),
        (b"data: a\r\n\r\ndata: b\n\nx", 20),
    ],
)
def test_the_end_of_the_last_event(data: bytes, end: int) -> None:
    assert events_end(data) == end


@pytest.mark.parametrize("size", range(1, len(MIXED) + 1))
def test_events_are_whole_however_they_arrive(size: int) -> None:
    buffer = EventBuffer()
    blocks = [buffer.feed(MIXED[at : at + size]) for at in range(0, len(MIXED), size)]
    assert all(events_end(block) == len(block) for block in blocks)
    assert b"".join(blocks) + buffer.rest() == MIXED
    assert b"".join(blocks).endswith(b"data: d\n\n")
    assert buffer.rest() == b""


def test_an_event_without_an_end_is_bounded() -> None:
    buffer = EventBuffer()
    piece = b"x" * 65536
    for _ in range(MAX_EVENT_BYTES // len(piece)):
        assert buffer.feed(piece) == b""
    with pytest.raises(EventTooLarge, match="over 16777216 bytes"):
        buffer.feed(piece)
