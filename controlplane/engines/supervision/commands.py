"""What other threads want of a supervisor, waited for in its loop together with what happens there."""

from __future__ import annotations

import asyncio
from enum import Enum, auto


class SupervisorCommand(Enum):
    """What is wanted; to stop overrules to restart."""

    STOP = auto()
    RESTART = auto()


class CommandInbox:
    """Belongs to the supervisor's loop; other threads reach it through ``call_soon_threadsafe``."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._restart = asyncio.Event()
        self.reason = ""
        """Of the last wish to restart."""
        self.draining = False
        """A draining engine is not restarted."""

    def stop(self) -> None:
        """Stop for good."""
        self._stop.set()

    def restart(self, reason: str) -> None:
        """Replace the engine."""
        if not self.draining:
            self.reason = reason
            self._restart.set()

    def forget_restart(self) -> None:
        """The wish is being fulfilled."""
        self._restart.clear()

    @property
    def now(self) -> SupervisorCommand | None:
        """The wish that stands."""
        if self._stop.is_set():
            return SupervisorCommand.STOP
        return SupervisorCommand.RESTART if self._restart.is_set() else None

    async def wait(
        self, timeout_s: float | None, ended: asyncio.Event | None = None
    ) -> SupervisorCommand | None:
        """Until there is a wish, ``ended`` is set, or the time has passed; the wish that stands then."""
        events = [self._stop, self._restart, *([ended] if ended is not None else [])]
        if not any(event.is_set() for event in events):
            waits = [asyncio.ensure_future(event.wait()) for event in events]
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        return self.now
