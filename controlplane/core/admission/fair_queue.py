"""The tickets of an :class:`controlplane.core.admission.queue.AdmissionQueue`, and the structures that order
them.

A :class:`Lane` holds the tickets that the same endpoints can serve. Each lane has a :class:`PriorityQueue`
per priority, and each of those a :class:`CallerQueue` per caller. A :class:`PriorityBand` spans all lanes:
the callers of one priority take turns in it. Tickets that left stay in the heaps and deques until they reach
the front or outnumber the waiting ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, Final, NamedTuple, TypeAlias

from controlplane.core.domain.request import Priority

PRIORITIES: Final = (Priority.HIGH, Priority.NORMAL, Priority.LOW)
"""Highest priority first; ``Ticket.rank`` is an index into it."""
RANK_OF: Final = {priority: rank for rank, priority in enumerate(PRIORITIES)}

_ARRIVAL_MEMORY_S: Final = 10.0
"""How long an arrival counts in a :class:`Rate`, with falling weight."""


class TicketState(StrEnum):
    """The state of a ticket."""

    NEW = "new"
    WAITING = "waiting"
    SERVED = "served"
    EXPIRED = "expired"
    LEFT = "left"
    EVICTED = "evicted"


class Ticket:
    """One waiting request. Tickets are compared by identity."""

    __slots__ = (
        "arrived_s",
        "caller",
        "caller_queue",
        "caller_turns",
        "deadline_s",
        "lane",
        "lane_key",
        "needs_s",
        "payload",
        "rank",
        "state",
        "tiers",
    )

    def __init__(
        self,
        *,
        lane_key: Hashable,
        tiers: Sequence[int],
        priority: Priority,
        caller: str,
        arrived_s: float,
        deadline_s: float,
        needs_s: float = 0.0,
        payload: Any = None,
    ) -> None:
        self.lane_key = lane_key
        """Tickets with equal keys can be served by the same endpoints."""
        self.tiers = tuple(sorted(tiers))
        """Ranks of the tiers that may serve it, to predict the wait."""
        self.rank = RANK_OF[priority]
        """Index of its priority in :data:`PRIORITIES`."""
        self.caller = caller
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.needs_s = needs_s
        """It must be served at least this long before its deadline to be of any use."""
        self.payload = payload
        """Data of the queue's user; the queue does not read it."""
        self.state = TicketState.NEW
        # Set while it waits.
        self.lane: Lane | None = None
        self.caller_queue: CallerQueue | None = None
        self.caller_turns: CallerTurns | None = None

    @property
    def priority(self) -> Priority:
        """Its priority."""
        return PRIORITIES[self.rank]


class RejectReason(StrEnum):
    """Why the queue rejected a ticket; a label of ``tierplane_shed_requests_total``."""

    FULL = "full"
    """The queue is full of tickets that may not be evicted for this one."""
    WOULD_MISS_DEADLINE = "hopeless"
    """With the predicted wait, it would not be served before its deadline."""
    TOO_LATE = "too_late"
    """Its deadline has passed."""


class Queued(NamedTuple):
    """The ticket waits."""

    evicted: Ticket | None = None
    """The ticket that was removed to make room; its client may retry after ``retry_after_s``."""
    retry_after_s: float = 0.0


class Rejected(NamedTuple):
    """The ticket was not queued."""

    reason: RejectReason
    retry_after_s: float
    """After this time, a retry would be queued, according to the observed speed of the tiers."""
    wait_s: float | None = None
    """The predicted wait, if it is known."""


class CallerTurns:
    """One caller's turns within a priority, across all lanes."""

    __slots__ = ("count", "recent", "tag")

    def __init__(self, tag: float) -> None:
        self.tag = tag
        """The start tag of its next ticket."""
        self.count = 0
        """Its waiting tickets."""
        self.recent: deque[Ticket] = deque()
        """In order of arrival; may hold tickets that left."""


class CallerQueue:
    """One caller's tickets in one lane and priority, the earliest deadline first."""

    __slots__ = ("caller", "heap", "live", "version")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.heap: list[tuple[float, int, Ticket]] = []
        """Deadline, sequence number, ticket; may hold tickets that left."""
        self.live = 0
        """Tickets in it that wait."""
        self.version = 0
        """Entries of ``PriorityQueue.heads`` with another version are void."""


Head: TypeAlias = tuple[float, float, int, int, CallerQueue]
"""Caller's tag, deadline, sequence number, version, caller queue. Sequence numbers differ, so caller queues
are never compared."""


class PriorityQueue:
    """The caller queues of one lane and priority."""

    __slots__ = ("caller_queues", "credit", "heads", "live", "recent")

    def __init__(self) -> None:
        self.recent: deque[Ticket] = deque()
        """In order of arrival; may hold tickets that left."""
        self.credit = 0.0
        """Grows while higher priorities are served before its aged tickets; at 1 the oldest is due."""
        self.caller_queues: dict[str, CallerQueue] = {}
        self.heads: list[Head] = []
        """A heap of each caller queue's first ticket; entries of an old version are void."""
        self.live = 0
        """Tickets in it that wait."""

    def oldest(self) -> Ticket:
        """The ticket that has waited longest; call it only while tickets wait."""
        recent = self.recent
        while recent[0].state is not TicketState.WAITING:
            recent.popleft()
        return recent[0]

    def head(self, band: PriorityBand) -> Head:
        """The first valid entry of ``heads``; call it only while tickets wait. Drops void entries and renews
        outdated ones: the tag of a caller that was served in another lane has changed."""
        heads = self.heads
        while True:
            entry = heads[0]
            caller_queue = entry[4]
            if entry[3] == caller_queue.version:
                if entry[0] == band.callers[caller_queue.caller].tag:
                    return entry
                heappop(heads)
                self.announce(caller_queue, band)
            else:
                heappop(heads)

    def announce(self, caller_queue: CallerQueue, band: PriorityBand) -> None:
        """Enters a caller queue's current first ticket into ``heads``, in place of an earlier entry."""
        heap = caller_queue.heap
        while heap and heap[0][2].state is not TicketState.WAITING:
            heappop(heap)
        caller_queue.version += 1
        if heap:
            deadline_s, sequence, _ = heap[0]
            tag = band.callers[caller_queue.caller].tag
            heappush(self.heads, (tag, deadline_s, sequence, caller_queue.version, caller_queue))


class Lane:
    """Tickets that the same endpoints can serve."""

    __slots__ = ("key", "live", "priority_queues", "tiers")

    def __init__(self, key: Hashable, tiers: tuple[int, ...]) -> None:
        self.key = key
        self.tiers = tiers
        self.priority_queues = tuple(PriorityQueue() for _ in PRIORITIES)
        self.live = 0
        """Tickets in it that wait."""


class PriorityBand:
    """All callers of one priority."""

    __slots__ = ("by_count", "callers", "largest", "live", "virtual")

    def __init__(self) -> None:
        self.callers: dict[str, CallerTurns] = {}
        self.by_count: dict[int, dict[str, None]] = {}
        """Number of waiting tickets → the callers that have this number."""
        self.largest = 0
        """The largest number of waiting tickets that any caller has."""
        self.live = 0
        """Waiting tickets of this priority."""
        self.virtual = 0.0
        """The start tag of the ticket served last: the virtual time of fair queueing."""

    def recount(self, name: str, turns: CallerTurns, change: int) -> None:
        """Counts one ticket of the caller ``name`` more (1) or fewer (-1)."""
        old, new = turns.count, turns.count + change
        turns.count = new
        self.live += change
        if old:
            group = self.by_count[old]
            del group[name]
            if not group:
                del self.by_count[old]
        if new:
            self.by_count.setdefault(new, {})[name] = None
        if new > self.largest or (old == self.largest and old not in self.by_count):
            self.largest = new  # Counts change by one, so no count lies between ``new`` and ``old``.


class Rate:
    """Events per second; an event's weight falls to 0 over :data:`_ARRIVAL_MEMORY_S`."""

    __slots__ = ("_count", "_since_s")

    def __init__(self) -> None:
        self._count = 0.0
        self._since_s = -inf

    def add(self, now_s: float) -> None:
        """Counts one event."""
        self._count = self._left(now_s) + 1.0
        self._since_s = now_s

    def per_s(self, now_s: float) -> float:
        """The rate now."""
        return self._left(now_s) / _ARRIVAL_MEMORY_S

    def _left(self, now_s: float) -> float:
        passed_s = now_s - self._since_s
        return self._count * max(0.0, 1.0 - passed_s / _ARRIVAL_MEMORY_S) if passed_s != inf else 0.0


def compact_heap(heap: list[tuple[float, int, Ticket]]) -> None:
    """Removes the tickets that no longer wait, in place."""
    heap[:] = [entry for entry in heap if entry[2].state is TicketState.WAITING]
    heapify(heap)


def compacted(tickets: deque[Ticket]) -> deque[Ticket]:
    """The tickets that still wait, in the same order."""
    return deque(ticket for ticket in tickets if ticket.state is TicketState.WAITING)
