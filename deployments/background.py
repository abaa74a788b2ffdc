"""Background tasks of a replica, and a check that they still run."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

CANCEL_AGAIN_S = 0.2
"""How long a cancelled coroutine may take before it is cancelled again."""


class BackgroundTasks:
    """Coroutines that run until they are cancelled."""

    def __init__(self, *coroutines: Coroutine[Any, Any, Any]) -> None:
        self._tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]

    def check(self) -> None:
        """Raise RuntimeError if a task has ended."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                error = task.exception()
                raise RuntimeError(f"a background task ended: {error!r}") from error

    async def cancel(self) -> None:
        """Cancel all tasks and wait until they have ended.

        A task may have to be cancelled more than once: before Python 3.12 ``asyncio.wait_for`` loses a
        cancellation that arrives at the same moment as the awaited result.
        """
        pending = {task for task in self._tasks if not task.done()}
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
        await asyncio.gather(*self._tasks, return_exceptions=True)
