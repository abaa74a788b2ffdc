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


RETURNS = (
    b"data: a\r\rdata: b\r\n\ndata: c\n\r\ndata: d\r\n\rdata: e\r\r\ndata: f\n\rid: 1\rdata: g\r\rdata: h\r\r"
)


@pytest.mark.parametrize("size", range(1, len(RETURNS) + 1))
def test_events_may_end_with_any_mix_of_returns_and_line_feeds(size: int) -> None:
    buffer = EventBuffer()
    blocks = [buffer.feed(RETURNS[at : at + size]) for at in range(0, len(RETURNS), size)]
    assert buffer.rest() == b""
    found = [event.strip() for block in blocks for event in block.replace(b"\r\n", b"\n").split(b"\n\n")]
    names = [b"data: a", b"data: b", b"data: c", b"data: d", b"data: e", b"data: f"]
    assert [event for event in found if event] == [*names, b"id: 1\ndata: g", b"data: h"]


def test_an_event_that_ends_with_returns_does_not_wait_for_the_next() -> None:
    buffer = EventBuffer()
    assert buffer.feed(b"data: a\r\r") == b"data: a\n\n"
    assert buffer.feed(b"data: b\r") == b""
    assert buffer.feed(b"\r") == b"data: b\n\n"
