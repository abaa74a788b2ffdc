"""How the tickets of an :class:`controlplane.core.admission.queue.AdmissionQueue` stand: lanes, rows and
lines.

A *lane* holds the tickets that the same endpoints can serve, a *row* those of one priority in a lane, a
*line* those of one caller in a row. A *band* is one priority across all lanes: there callers take turns.
Tickets that left stay in the heaps and deques until they come to the front or become too many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, Final, NamedTuple, TypeAlias

from controlplane.core.domain.request import Priority

_ARRIVAL_MEMORY_S: Final = 10.0


class Caller:
    """One caller inside a priority."""

    __slots__ = ("count", "recent", "tag")

    def __init__(self, tag: float) -> None:
        self.tag = tag
        """The start tag of its next ticket."""
        self.count = 0
        self.recent: deque[Ticket] = deque()
        """In order of arrival; may hold tickets that left."""


class CallerQueue:
    """One caller's tickets in one lane and priority, the earliest deadline first."""

    __slots__ = ("caller", "heap", "live", "version")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.heap: list[tuple[float, int, Ticket]] = []
        self.live = 0
        self.version = 0
        """Entries of the lane's heap with another version are void."""


Head: TypeAlias = tuple[float, float, int, int, CallerQueue]
"""Caller's tag, deadline, sequence number, version, line: sequence numbers differ, lines are never
compared."""


class PriorityQueue:
    """The lines of one lane and priority."""

    __slots__ = ("credit", "heads", "lines", "live", "recent")

    def __init__(self) -> None:
        self.recent: deque[Ticket] = deque()
        """In order of arrival; may hold tickets that left."""
        self.credit = 0.0
        """Grows while higher priorities are served past its aged tickets; at 1 the oldest is due."""
        self.lines: dict[str, CallerQueue] = {}
        self.heads: list[Head] = []
        """Each line's first ticket; entries of an old version are void."""
        self.live = 0

    def oldest(self) -> Ticket:
        """The longest waiting ticket of a row that is not empty."""
        recent = self.recent
        while recent[0].state is not TicketState.WAITING:
            recent.popleft()
        return recent[0]

    def head(self, band: PriorityBand) -> Head:
        """The first entry of a row that is not empty, after throwing out or renewing what is no longer
        true: a caller that was served in another lane has another tag."""
        heads = self.heads
        while True:
            entry = heads[0]
            line = entry[4]
            if entry[3] == line.version:
                if entry[0] == band.callers[line.caller].tag:
                    return entry
                heappop(heads)
                self.announce(line, band)
            else:
                heappop(heads)

    def announce(self, line: CallerQueue, band: PriorityBand) -> None:
        """Enters a line with its present first ticket."""
        _drop_dead(line.heap)
        line.version += 1
        if line.heap:
            deadline_s, sequence, _ = line.heap[0]
            heappush(self.heads, (band.callers[line.caller].tag, deadline_s, sequence, line.version, line))


class Lane:
    """Tickets that the same endpoints can serve."""

    __slots__ = ("key", "live", "rows", "tiers")

    def __init__(self, key: Hashable, tiers: tuple[int, ...]) -> None:
        self.key = key
        self.tiers = tiers
        self.rows = tuple(PriorityQueue() for _ in BANDS)
        self.live = 0


class PriorityBand:
    """All callers of one priority."""

    __slots__ = ("by_count", "callers", "largest", "live", "virtual")

    def __init__(self) -> None:
        self.callers: dict[str, Caller] = {}
        self.by_count: dict[int, dict[str, None]] = {}
        """Callers by how many tickets they have waiting."""
        self.largest = 0
        self.live = 0
        self.virtual = 0.0
        """The tag of what was served last."""

    def recount(self, name: str, caller: Caller, change: int) -> None:
        """A ticket of ``name`` more (1) or less (-1)."""
        old, new = caller.count, caller.count + change
        caller.count = new
        self.live += change
        if old:
            group = self.by_count[old]
            del group[name]
            if not group:
                del self.by_count[old]
        if new:
            self.by_count.setdefault(new, {})[name] = None
        if new > self.largest or (old == self.largest and old not in self.by_count):
            self.largest = new  # Counts change by one, so ``new`` is the next there is.


class Rate:
    """Events a second, older ones counting less and less."""

    __slots__ = ("_count", "_since_s")

    def __init__(self) -> None:
        self._count = 0.0
        self._since_s = -inf

    def add(self, now_s: float) -> None:
        """One happened."""
        self._count = self._left(now_s) + 1.0
        self._since_s = now_s

    def per_s(self, now_s: float) -> float:
        """How many there are a second at present."""
        return self._left(now_s) / _ARRIVAL_MEMORY_S

    def _left(self, now_s: float) -> float:
        passed_s = now_s - self._since_s
        return self._count * max(0.0, 1.0 - passed_s / _ARRIVAL_MEMORY_S) if passed_s != inf else 0.0


def _drop_dead(heap: list[tuple[float, int, Ticket]]) -> None:
    while heap and heap[0][2].state is not TicketState.WAITING:
        heappop(heap)


def compact_heap(heap: list[tuple[float, int, Ticket]]) -> None:
    """Throws out all tickets that left."""
    heap[:] = [entry for entry in heap if entry[2].state is TicketState.WAITING]
    heapify(heap)


def compacted(tickets: deque[Ticket]) -> deque[Ticket]:
    """The tickets that still wait."""
    return deque(ticket for ticket in tickets if ticket.state is TicketState.WAITING)


BANDS: Final = (Priority.HIGH, Priority.NORMAL, Priority.LOW)
"""A priority's band is its index here: the most important first."""
BAND_OF: Final = {priority: band for band, priority in enumerate(BANDS)}


class TicketState(StrEnum):
    """How a ticket stands."""

    NEW = "new"
    WAITING = "waiting"
    SERVED = "served"
    EXPIRED = "expired"
    LEFT = "left"
    EVICTED = "evicted"


class Ticket:
    """One waiting request. Identity counts; ``payload`` is the caller's own."""

    __slots__ = (
        "arrived_s",
        "band",
        "caller",
        "cost",
        "deadline_s",
        "in_caller",
        "in_lane",
        "in_line",
        "lane",
        "needs_s",
        "payload",
        "state",
        "tiers",
    )

    def __init__(
        self,
        *,
        lane: Hashable,
        tiers: Sequence[int],
        priority: Priority,
        caller: str,
        arrived_s: float,
        deadline_s: float,
        needs_s: float = 0.0,
        cost: float = 1.0,
        payload: Any = None,
    ) -> None:
        self.lane = lane
        """Tickets with equal lanes can be served by the same endpoints."""
        self.tiers = tuple(sorted(tiers))
        """Ranks of the tiers that may serve it; for predicting the wait."""
        self.band = BAND_OF[priority]
        self.caller = caller
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.needs_s = needs_s
        """How long before its deadline it must be served to be of any use."""
        self.cost = cost
        self.payload = payload
        self.state = TicketState.NEW
        self.in_lane: Lane | None = None
        self.in_line: CallerQueue | None = None
        self.in_caller: Caller | None = None

    @property
    def priority(self) -> Priority:
        """Its priority."""
        return BANDS[self.band]


class RejectReason(StrEnum):
    """Why a ticket was not let in."""

    FULL = "full"
    """The queue is full of what is not less important (429)."""
    WOULD_MISS_DEADLINE = "hopeless"
    """It would not be served before its deadline (429)."""
    TOO_LATE = "too_late"
    """Its deadline has passed (408)."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        return 408 if self is RejectReason.TOO_LATE else 429


class Queued(NamedTuple):
    """The ticket waits."""

    wait_s: float | None
    """The predicted wait; None: nothing is known yet of how fast the tiers are."""
    evicted: Ticket | None = None
    """Who had to go for it: to be answered 429 with ``retry_after_s``."""
    retry_after_s: float = 0.0


class Rejected(NamedTuple):
    """The ticket was not let in."""

    reason: RejectReason
    retry_after_s: float
    """When a retry would find a place, as far as the observed speed tells."""
    wait_s: float | None = None
