"""The client of engines: one connection, one exchange after the other."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from controlplane.gateway.proxy.upstream import UpstreamConnection
from tests.support.waiting import loop_turns

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class _Wire:
    """The transport of a connection whose engine is the test."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.aborted = False
        self.reading = True

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def connected() -> tuple[UpstreamConnection, _Wire]:
    wire = _Wire()
    connection = UpstreamConnection(asyncio.get_running_loop())
    connection.connection_made(cast(Any, wire))
    return connection, wire


async def test_a_cancelled_exchange_takes_no_wakeup_from_the_next_one() -> None:
    connection, _ = connected()
    connection.send(b"first")
    first = asyncio.ensure_future(connection.head())
    free = asyncio.Event()

    async def next_exchange() -> int:
        await free.wait()
        assert connection.reusable
        connection.send(b"second")
        return await connection.head()

    second = asyncio.ensure_future(next_exchange())
    await loop_turns()
    free.set()
    connection.data_received(OK)  # whole, in the turn in which the first exchange is cancelled
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    connection.data_received(OK)
    assert await asyncio.wait_for(second, 5) == 200


async def test_a_connection_whose_reading_is_paused_carries_no_other_request() -> None:
    connection, wire = connected()
    connection.send(b"first")
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + b"x" * 400_000)
    assert not wire.reading and not connection.reusable
    assert len(await connection.read()) == 400_000
    assert wire.reading and connection.reusable
