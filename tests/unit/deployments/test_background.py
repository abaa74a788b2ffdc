"""Background tasks end when they are cancelled, and a check finds those that ended by themselves."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from deployments import background as tasks
from deployments.background import BackgroundTasks
from tests.support.waiting import forever


def test_a_task_that_lost_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CANCEL_AGAIN_S", 0.01)
    lost: list[int] = []

    async def deaf() -> None:
        while len(lost) < 3:
            with contextlib.suppress(asyncio.CancelledError):
                await forever()
            lost.append(1)
        await forever()

    async def work() -> None:
        background = BackgroundTasks(deaf(), forever())
        await asyncio.sleep(0)
        await asyncio.wait_for(background.cancel(), 5)
        background.check()

    asyncio.run(work())
    assert len(lost) == 3


def test_a_task_that_ended_by_itself_is_raised_with_its_cause() -> None:
    async def fail() -> None:
        raise ValueError("no such thing")

    async def work() -> None:
        background = BackgroundTasks(fail())
        await asyncio.wait(background._tasks)
        with pytest.raises(RuntimeError, match="no such thing"):
            background.check()
        await background.cancel()

    asyncio.run(work())
