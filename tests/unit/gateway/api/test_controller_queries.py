"""Queries to the controller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from controlplane.errors import BadRequest, ControllerUnreachable, TierplaneError
from controlplane.gateway.api.controller_queries import query_controller


class Controller:
    """Returns what ``respond`` returns for each query's name and arguments."""

    def __init__(self, respond: Callable[..., Awaitable[Any]]) -> None:
        self._respond = respond

    async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return await getattr(self, name)(**arguments)

    async def plane_report(self, window_minutes: float) -> Any:
        return await self._respond("plane_report", window_minutes)

    async def gpus(self) -> Any:
        return await self._respond("gpus")

    async def nodes(self) -> Any:
        return await self._respond("nodes")

    async def scaling(self) -> Any:
        return await self._respond("scaling")


async def test_a_query_goes_to_the_controller_and_its_result_is_returned() -> None:
    async def echo(name: str, *args: Any) -> Any:
        return name, args

    result = await query_controller(Controller(echo), lambda queries: queries.plane_report(60.0))
    assert result == ("plane_report", (60.0,))


async def test_an_unreachable_controller_is_a_503_with_retry_after() -> None:
    async def away(name: str, *args: Any) -> Any:
        raise TierplaneError("the controller is gone")

    for controller in (None, Controller(away)):
        with pytest.raises(ControllerUnreachable) as raised:
            await query_controller(controller, lambda queries: queries.gpus())
        assert (raised.value.status, raised.value.code) == (503, "controller_unavailable")
        assert raised.value.retry_after_s


async def test_a_controller_that_is_slow_is_not_waited_for() -> None:
    cancelled = asyncio.Event()

    async def slow(name: str, *args: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ControllerUnreachable, match=r"0\.01 s"):
        await query_controller(Controller(slow), lambda queries: queries.gpus(), timeout_s=0.01)
    assert cancelled.is_set()


async def test_a_bad_query_stays_a_client_error() -> None:
    async def refuse(name: str, *args: Any) -> Any:
        raise BadRequest("no such window")

    with pytest.raises(BadRequest):
        await query_controller(Controller(refuse), lambda queries: queries.gpus())
