"""A client of the HTTP server that sends bytes as they are."""

from __future__ import annotations

import asyncio

from tests.support.waiting import loop_turns


async def talk(port: int, *pieces: bytes) -> bytes:
    """All that the server sends until it closes the connection; each piece reaches it by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await loop_turns()
    data = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    return data
