"""A gateway replica that ends."""

from __future__ import annotations

import asyncio

from tests.support.gateway import CHAT, chat_body, running
from tests.support.waiting import until_async


async def test_a_gateway_drains_what_runs() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=10)
        running_one = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=30)))
        await until_async(lambda: rig.gateway.info().in_flight)
        await rig.gateway.drain(5)
        status, headers, _ = await running_one
        assert status == 200
        assert headers["x-tier"] == "balanced"
