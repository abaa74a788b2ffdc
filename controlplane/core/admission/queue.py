"""The bounded queue in front of full tiers: which requests wait, which is next, which are rejected at once.

Order of service:

1. Higher priorities come first.
2. Within a priority, callers take turns by start-time fair queueing (P. Goyal, H. Vin, H. Cheng, 1996); each
   ticket takes one turn.
3. Among one caller's tickets, the earliest deadline comes first.
4. Against starvation: once the oldest ticket of a lower priority has waited longer than ``age_after_s``, it
   gets a share (``aged_ratio``) of the slots that higher priorities would take. A priority that grows with
   age would not do: under lasting overload, age would lift every low ticket above the high ones.

Tickets that the same endpoints can serve are in the same lane, so a lane whose tiers are full never
holds up another. All operations are O(log n) in tickets (amortised), times the number of lanes in use for
:meth:`AdmissionQueue.next`. Tickets that left are removed from the heaps lazily.

A queued ticket leaves the queue exactly once: returned by ``next`` or by ``expire``, removed by ``leave``, or
evicted by the ``offer`` of another ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from controlplane.core.admission.fair_queue import (
    PRIORITIES,
    RANK_OF,
    CallerQueue,
    CallerTurns,
    Lane,
    PriorityBand,
    PriorityQueue,
    Queued,
    Rate,
    Rejected,
    RejectReason,
    Ticket,
    TicketState,
    compact_heap,
    compacted,
)
from controlplane.core.domain.request import Priority

__all__ = [
    "AdmissionQueue",
    "AdmissionSettings",
    "Queued",
    "RejectReason",
    "Rejected",
    "Ticket",
    "TicketState",
]

_DUE: Final = 1.0 - 1e-9
"""The credit at which the oldest ticket is due: in floating point, ten times a tenth is just below 1."""


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """The settings of the queue."""

    capacity: int = 1000
    """Maximum number of waiting tickets, all priorities together."""
    age_after_s: float = 5.0
    """A ticket that has waited longer than this is aged."""
    aged_ratio: float = 0.05
    """Share of the slots that goes to aged tickets of lower priorities."""
    retry_after_min_s: float = 1.0
    retry_after_max_s: float = 120.0
    """Bounds of ``Retry-After``."""


class AdmissionQueue:
    """The queue of one gateway replica."""

    def __init__(self, settings: AdmissionSettings | None = None) -> None:
        self.settings = settings or AdmissionSettings()
        self._lanes: dict[Hashable, Lane] = {}
        self._bands = tuple(PriorityBand() for _ in PRIORITIES)
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._expired: list[Ticket] = []
        self._arrivals: dict[tuple[int, ...], tuple[Rate, ...]] = {}
        self._sequence = 0
        self._live = 0

    def __len__(self) -> int:
        """Number of waiting tickets."""
        return self._live

    def __bool__(self) -> bool:
        """Whether tickets wait, or :meth:`expire` has expired ones to return."""
        return bool(self._live or self._expired)

    def depth(self, priority: Priority) -> int:
        """Number of waiting tickets of that priority."""
        return self._bands[RANK_OF[priority]].live

    def waiting(self) -> list[Ticket]:
        """All waiting tickets, in no particular order."""
        return [entry[2] for entry in self._deadlines if entry[2].state is TicketState.WAITING]

    def offer(
        self, ticket: Ticket, now_s: float, rates_per_s: Sequence[float | None] = ()
    ) -> Queued | Rejected:
        """Queues a ticket or rejects it.

        ``rates_per_s[tier]`` is how many requests per second a tier finishes when it is full. None or a
        missing entry means unknown; then no ticket is rejected for its predicted wait. The prediction is a
        mean. Raises ValueError if the ticket was offered before.
        """
        if ticket.state is not TicketState.NEW:
            raise ValueError(f"this ticket is {ticket.state}: offer a new one")
        if ticket.deadline_s <= now_s:
            return Rejected(RejectReason.TOO_LATE, self.settings.retry_after_min_s)
        self._collect_expired(now_s)
        wait_s = self.predict_wait_s(ticket, now_s, rates_per_s)
        self.note_arrival(ticket.tiers, ticket.priority, now_s)
        if wait_s is not None:
            spare_s = ticket.deadline_s - ticket.needs_s - now_s
            if wait_s > spare_s:
                return Rejected(RejectReason.WOULD_MISS_DEADLINE, self._bounded(wait_s - spare_s), wait_s)
        victim: Ticket | None = None
        if self._live >= self.settings.capacity:
            victim = self._victim(ticket)
            if victim is None:
                return Rejected(RejectReason.FULL, self._bounded(wait_s or 0.0), wait_s)
            self._take_out(victim, TicketState.EVICTED)
        self._put_in(ticket)
        if victim is None:
            return Queued()
        return Queued(victim, self._bounded(self.predict_wait_s(victim, now_s, rates_per_s) or 0.0))

    def next(self, now_s: float, can_run: Callable[[Hashable, Priority], bool]) -> Ticket | None:
        """Removes and returns the ticket to serve next; None if none can run.

        ``can_run(lane_key, priority)`` says whether an endpoint has room for such a ticket now; it is called
        at most once for each lane and priority. A ticket that is served because of its age runs if there is
        room for high priority. Expired tickets are never returned.
        """
        self._collect_expired(now_s)
        runnable: list[tuple[PriorityQueue, int]] = []
        aged: list[tuple[PriorityQueue, int, Ticket]] = []
        for lane in self._lanes.values():
            if not can_run(lane.key, Priority.HIGH):
                continue
            for rank, priority_queue in enumerate(lane.priority_queues):
                if not priority_queue.live:
                    continue
                if not rank or can_run(lane.key, PRIORITIES[rank]):
                    runnable.append((priority_queue, rank))
                if (
                    rank
                    and now_s - (oldest := priority_queue.oldest()).arrived_s >= self.settings.age_after_s
                ):
                    aged.append((priority_queue, rank, oldest))
        due = [entry for entry in aged if entry[0].credit >= _DUE]
        if due:
            priority_queue, _, ticket = min(due, key=lambda entry: entry[2].arrived_s)
            priority_queue.credit -= 1.0
        elif runnable:
            ticket = self._first(runnable)
        else:
            return None
        passed_over = [priority_queue for priority_queue, rank, _ in aged if rank > ticket.rank]
        for priority_queue in passed_over:
            priority_queue.credit += self.settings.aged_ratio / len(passed_over)
        self._charge(ticket)
        self._take_out(ticket, TicketState.SERVED)
        return ticket

    def leave(self, ticket: Ticket) -> bool:
        """The client left. True if the ticket was waiting."""
        if ticket.state is not TicketState.WAITING:
            return False
        self._take_out(ticket, TicketState.LEFT)
        return True

    def expire(self, now_s: float) -> list[Ticket]:
        """Removes the tickets whose deadline has passed; returns those that were not returned before."""
        self._collect_expired(now_s)
        expired, self._expired = self._expired, []
        return expired

    def predict_wait_s(
        self, ticket: Ticket, now_s: float, rates_per_s: Sequence[float | None]
    ) -> float | None:
        """How long a new ticket like this would wait, in seconds; None if unknown.

        It is served in turn or because of its age, whichever comes first. In turn, it waits for the tickets
        of higher priority and those of its own priority that take their turn before it, at the rate that
        arrivals of higher priority and aged tickets of lower priority leave. By age, it waits for the tickets
        of its own priority, at the aged tickets' share of the rate. A lane that shares only some of its tiers
        counts in proportion.
        """
        known = [rates_per_s[tier] if tier < len(rates_per_s) else None for tier in ticket.tiers]
        rate = sum(value for value in known if value is not None)
        if rate <= 0.0 or any(value is None for value in known):
            return None
        rank = ticket.rank
        higher = same = lower = higher_per_s = 0.0
        for lane in self._lanes.values():
            part = _overlap(lane.tiers, ticket.tiers, rates_per_s)
            if part:
                higher += part * sum(one.live for one in lane.priority_queues[:rank])
                same += part * lane.priority_queues[rank].live
                lower += part * sum(one.live for one in lane.priority_queues[rank + 1 :])
        for tiers, arrivals in self._arrivals.items():
            part = _overlap(tiers, ticket.tiers, rates_per_s)
            if part:
                higher_per_s += part * sum(kind.per_s(now_s) for kind in arrivals[:rank])
        to_aged = self.settings.aged_ratio if lower else 0.0
        left_per_s = (rate - higher_per_s) * (1.0 - to_aged)
        ahead = higher + min(same, self._turns_before(ticket))
        in_turn_s = (ahead + 1.0) / left_per_s if left_per_s > 0.0 else inf
        aged_per_s = rate * self.settings.aged_ratio / (len(PRIORITIES) - 1)
        if not rank or aged_per_s <= 0.0:
            return in_turn_s
        return min(in_turn_s, max(self.settings.age_after_s, (same + 1.0) / aged_per_s))

    def _turns_before(self, ticket: Ticket) -> float:
        """Tickets of its own priority whose turn comes before it."""
        band = self._bands[ticket.rank]
        active = sum(len(group) for group in band.by_count.values())
        turns = band.callers.get(ticket.caller)
        if turns is None or not turns.count:
            return active
        lane = self._lanes.get(ticket.lane_key)
        own = lane.priority_queues[ticket.rank].caller_queues.get(ticket.caller) if lane else None
        first = own is not None and (not own.heap or ticket.deadline_s < own.heap[0][0])
        return active * (1 if first else turns.count)

    def note_arrival(self, tiers: tuple[int, ...], priority: Priority, now_s: float) -> None:
        """Counts the arrival of a request that starts at once without a ticket, for predictions.
        :meth:`offer` counts the others."""
        arrivals = self._arrivals.get(tiers)
        if arrivals is None:
            if len(self._arrivals) >= 64:  # Clients can send any list of models: start over rather than grow.
                self._arrivals.clear()
            arrivals = self._arrivals[tiers] = tuple(Rate() for _ in PRIORITIES)
        arrivals[RANK_OF[priority]].add(now_s)

    def _bounded(self, wait_s: float) -> float:
        return min(max(wait_s, self.settings.retry_after_min_s), self.settings.retry_after_max_s)

    # -- the order -------------------------------------------------------------------------------

    def _first(self, runnable: list[tuple[PriorityQueue, int]]) -> Ticket:
        """The first ticket by priority, turn and deadline."""
        highest = min(rank for _, rank in runnable)
        band = self._bands[highest]
        heads = [priority_queue.head(band) for priority_queue, rank in runnable if rank == highest]
        return min(heads)[4].heap[0][2]

    def _charge(self, ticket: Ticket) -> None:
        """Ends the turn of the ticket's caller."""
        band = self._bands[ticket.rank]
        turns = band.callers[ticket.caller]
        # A caller whose lane was full for long gets one turn at once, not all the turns that it missed.
        start = max(turns.tag, band.virtual)
        band.virtual = start
        turns.tag = start + 1.0

    def _victim(self, newcomer: Ticket) -> Ticket | None:
        """The ticket to evict for a newcomer: in the lowest priority, the youngest ticket of the caller that
        has the most. At equal priority only if that caller then still has at least as many tickets as the
        newcomer's."""
        for rank in range(len(PRIORITIES) - 1, newcomer.rank - 1, -1):
            band = self._bands[rank]
            if not band.live:
                continue
            if rank == newcomer.rank:
                own = band.callers.get(newcomer.caller)
                if band.largest < (own.count if own else 0) + 2:
                    return None
            name = next(iter(band.by_count[band.largest]))
            recent = band.callers[name].recent
            while recent[-1].state is not TicketState.WAITING:
                recent.pop()
            return recent[-1]
        return None

    # -- putting in and taking out ---------------------------------------------------------------

    def _put_in(self, ticket: Ticket) -> None:
        self._sequence += 1
        sequence = self._sequence
        ticket.state = TicketState.WAITING
        lane = self._lanes.get(ticket.lane_key)
        if lane is None:
            lane = self._lanes[ticket.lane_key] = Lane(ticket.lane_key, ticket.tiers)
        band = self._bands[ticket.rank]
        turns = band.callers.get(ticket.caller)
        if turns is None:
            self._forget_callers(band)
            turns = band.callers[ticket.caller] = CallerTurns(band.virtual)
        elif not turns.count:
            turns.tag = max(turns.tag, band.virtual)
        same_priority = lane.priority_queues[ticket.rank]
        same_caller = same_priority.caller_queues.get(ticket.caller)
        if same_caller is None:
            same_caller = same_priority.caller_queues[ticket.caller] = CallerQueue(ticket.caller)
        ticket.lane, ticket.caller_queue, ticket.caller_turns = lane, same_caller, turns
        heappush(same_caller.heap, (ticket.deadline_s, sequence, ticket))
        same_caller.live += 1
        same_priority.live += 1
        lane.live += 1
        self._live += 1
        band.recount(ticket.caller, turns, 1)
        same_priority.recent.append(ticket)
        turns.recent.append(ticket)
        heappush(self._deadlines, (ticket.deadline_s, sequence, ticket))
        if same_caller.heap[0][1] == sequence:
            same_priority.announce(same_caller, band)

    def _take_out(self, ticket: Ticket, state: TicketState) -> None:
        lane, same_caller, turns = ticket.lane, ticket.caller_queue, ticket.caller_turns
        assert lane is not None
        assert same_caller is not None
        assert turns is not None
        ticket.state = state
        ticket.lane = ticket.caller_queue = ticket.caller_turns = None
        band = self._bands[ticket.rank]
        same_priority = lane.priority_queues[ticket.rank]
        same_caller.live -= 1
        same_priority.live -= 1
        lane.live -= 1
        self._live -= 1
        band.recount(ticket.caller, turns, -1)
        if not same_caller.live:
            same_caller.version += 1
            del same_priority.caller_queues[ticket.caller]
        elif same_caller.heap[0][2] is ticket:
            same_priority.announce(same_caller, band)
        elif len(same_caller.heap) > 2 * same_caller.live + 8:
            compact_heap(same_caller.heap)
        if not lane.live:
            del self._lanes[lane.key]
        if len(same_priority.recent) > 2 * same_priority.live + 8:
            same_priority.recent = compacted(same_priority.recent)
        if len(same_priority.heads) > 4 * len(same_priority.caller_queues) + 16:
            same_priority.heads = [entry for entry in same_priority.heads if entry[3] == entry[4].version]
            heapify(same_priority.heads)
        if len(turns.recent) > 2 * turns.count + 8:
            turns.recent = compacted(turns.recent)
        if len(self._deadlines) > 2 * self._live + 64:
            compact_heap(self._deadlines)

    def _collect_expired(self, now_s: float) -> None:
        heap = self._deadlines
        while heap and (heap[0][2].state is not TicketState.WAITING or heap[0][0] <= now_s):
            ticket = heappop(heap)[2]
            if ticket.state is TicketState.WAITING:
                self._take_out(ticket, TicketState.EXPIRED)
                self._expired.append(ticket)

    def _forget_callers(self, band: PriorityBand) -> None:
        """Drops the callers without a waiting ticket, once there are many."""
        if len(band.callers) > 2 * self.settings.capacity + 64:
            band.callers = {name: turns for name, turns in band.callers.items() if turns.count}


def _overlap(tiers: tuple[int, ...], own: tuple[int, ...], rates_per_s: Sequence[float | None]) -> float:
    """The share of the work for ``tiers`` that falls on the tiers ``own``."""
    if tiers == own:
        return 1.0
    whole = part = 0.0
    for tier in tiers:
        rate = (rates_per_s[tier] if tier < len(rates_per_s) else None) or 0.0
        whole += rate
        if tier in own:
            part += rate
    return part / whole if whole else float(any(tier in own for tier in tiers))
