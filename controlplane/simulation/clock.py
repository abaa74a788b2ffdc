"""Virtual time. Events run in the order of their times; events at the same time in the order of
scheduling."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any


class VirtualClock:
    """Runs callbacks in the order of their times, without waiting."""

    __slots__ = ("_events", "_sequence", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._sequence = 0

    def at(self, when_s: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Schedule ``call(argument)`` at ``when_s``, or now if ``when_s`` has passed."""
        self._sequence += 1
        heappush(self._events, (when_s, self._sequence, call, argument))

    @property
    def next_s(self) -> float:
        """Time of the next event; infinite if there is none."""
        return self._events[0][0] if self._events else inf

    def run_until(self, until_s: float) -> None:
        """Run every event up to ``until_s``, and set the time to it."""
        events = self._events
        while events and events[0][0] <= until_s:
            when_s, _, call, argument = heappop(events)
            self.now_s = max(self.now_s, when_s)
            call(argument)
        self.now_s = max(self.now_s, until_s)
