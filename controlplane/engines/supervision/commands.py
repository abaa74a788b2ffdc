"""Commands that other threads give a supervisor, and the wait for them in its event loop."""

from __future__ import annotations

import asyncio
from enum import Enum, auto


class SupervisorCommand(Enum):
    """A command. STOP takes precedence over RESTART."""

    STOP = auto()
    RESTART = auto()


class CommandInbox:
    """A supervisor's pending commands.

    It belongs to the supervisor's event loop; other threads use it through ``call_soon_threadsafe``.
    """

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._restart = asyncio.Event()
        self.reason = ""
        """The reason given with the last restart command."""
        self.draining = False
        """Whether the engine is draining; then restart commands are ignored."""

    def stop(self) -> None:
        """Commands the supervisor to stop the engine and itself."""
        self._stop.set()

    def restart(self, reason: str) -> None:
        """Command the supervisor to replace the engine process."""
        if not self.draining:
            self.reason = reason
            self._restart.set()

    def clear_restart(self) -> None:
        """Remove a restart command, because it is being carried out or does not apply."""
        self._restart.clear()

    @property
    def pending(self) -> SupervisorCommand | None:
        """The command to carry out, if there is one."""
        if self._stop.is_set():
            return SupervisorCommand.STOP
        return SupervisorCommand.RESTART if self._restart.is_set() else None

    async def wait(
        self, timeout_s: float | None, ended: asyncio.Event | None = None
    ) -> SupervisorCommand | None:
        """Wait for a command, for ``ended`` or for ``timeout_s``; returns the command pending then."""
        events = [self._stop, self._restart, *([ended] if ended is not None else [])]
        if not any(event.is_set() for event in events):
            waits = [asyncio.ensure_future(event.wait()) for event in events]
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        return self.pending
