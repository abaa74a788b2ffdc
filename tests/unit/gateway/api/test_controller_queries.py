"""Pages that the controller answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.errors import BadRequest, ControllerUnreachable, TierplaneError
from controlplane.gateway.api.controller_queries import ask_controller


async def test_the_question_goes_to_the_controller_and_its_answer_comes_back() -> None:
    async def ask(method: str, *args: Any) -> Any:
        return method, args

    assert await ask_controller(ask, "report", 60.0) == ("report", (60.0,))


async def test_a_controller_that_is_away_is_a_503_that_says_when_to_ask_again() -> None:
    async def away(method: str, *args: Any) -> Any:
        raise TierplaneError("the controller is gone")

    for ask in (None, away):
        with pytest.raises(ControllerUnreachable) as raised:
            await ask_controller(ask, "report")
        assert (raised.value.status, raised.value.code) == (503, "controller_unavailable")
        assert raised.value.retry_after_s


async def test_a_controller_that_is_slow_is_not_waited_for() -> None:
    cancelled = asyncio.Event()

    async def slow(method: str, *args: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(ControllerUnreachable, match=r"0\.01 s"):
        await ask_controller(slow, "report", timeout_s=0.01)
    assert cancelled.is_set()


async def test_what_was_asked_wrongly_stays_the_askers_fault() -> None:
    async def refuse(method: str, *args: Any) -> Any:
        raise BadRequest("no such window")

    with pytest.raises(BadRequest):
        await ask_controller(refuse, "report")
