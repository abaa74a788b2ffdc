"""The bounded queue in front of full tiers: who waits, who goes next, and who is told at once to go.

Order of service:

1. the higher priority first;
2. inside a priority callers take turns, by start-time fair queueing (P. Goyal, H. Vin, H. Cheng, 1996),
   a ticket's ``cost`` being what a turn takes;
3. among one caller's tickets the earliest deadline first;
4. against starvation, of the slots that go past a lower priority whose oldest ticket has waited longer
   than ``age_after_s``, a share (``aged_ratio``) goes to that oldest ticket. It is a share and not a
   growing priority: with the latter, at lasting overload the low tickets' age would in the end lift all
   of them over the high.

Tickets that can be served by the same endpoints stand in the same lane, so that a lane whose tiers are
full never holds up another. All operations are O(log n) in tickets (amortised), times the number of
lanes in use for :meth:`AdmissionQueue.next`. What left is taken out of the heaps lazily.

A ticket that is offered ends exactly once: handed out by ``next``, given back by ``expire``, taken out
by ``leave``, or evicted by another's ``offer``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from controlplane.core.admission.fair_queue import (
    BAND_OF,
    BANDS,
    Caller,
    CallerQueue,
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
"""Ten times a tenth is a little less than one."""


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """The queue's bounds."""

    capacity: int = 1000
    """Tickets in all."""
    age_after_s: float = 5.0
    aged_ratio: float = 0.05
    """Share of the slots that goes to lower priorities while their oldest waits longer than that."""
    retry_after_min_s: float = 1.0
    retry_after_max_s: float = 120.0
    """``Retry-After`` is kept inside these."""


class AdmissionQueue:
    """The queue of one gateway replica."""

    def __init__(self, settings: AdmissionSettings | None = None) -> None:
        self.settings = settings or AdmissionSettings()
        self._lanes: dict[Hashable, Lane] = {}
        self._bands = tuple(PriorityBand() for _ in BANDS)
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._expired: list[Ticket] = []
        self._arrivals: dict[tuple[int, ...], tuple[Rate, ...]] = {}
        self._sequence = 0
        self._live = 0

    def __len__(self) -> int:
        """Tickets that wait."""
        return self._live

    def __bool__(self) -> bool:
        """Is there anything to do: tickets that wait, or expired ones that :meth:`expire` must give back?"""
        return bool(self._live or self._expired)

    def depth(self, priority: Priority) -> int:
        """Tickets of that priority that wait."""
        return self._bands[BAND_OF[priority]].live

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, in no order that matters."""
        return [entry[2] for entry in self._deadlines if entry[2].state is TicketState.WAITING]

    def next_deadline_s(self) -> float:
        """When the next waiting ticket expires; infinity if none waits."""
        heap = self._deadlines
        while heap and heap[0][2].state is not TicketState.WAITING:
            heappop(heap)
        return heap[0][0] if heap else inf

    def offer(
        self, ticket: Ticket, now_s: float, rates_per_s: Sequence[float | None] = ()
    ) -> Queued | Rejected:
        """Lets a ticket in, or says why not.

        ``rates_per_s[tier]`` is how many requests a second a tier finishes when full; None or missing:
        unknown, then nothing is shed. The prediction is a mean: a ticket is shed if that says that it
        would be served too late. Raises ValueError if the ticket was offered before.
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
            return Queued(wait_s)
        return Queued(wait_s, victim, self._bounded(self.predict_wait_s(victim, now_s, rates_per_s) or 0.0))

    def next(self, now_s: float, can_run: Callable[[Hashable, Priority], bool]) -> Ticket | None:
        """Hands out the ticket that goes next, or None if none can run.

        ``can_run(lane, priority)`` says whether an endpoint has room for such a ticket now; it is asked
        at most once for each lane and priority. A ticket that goes by age needs room for high priority
        only. What has expired is never handed out.
        """
        self._collect_expired(now_s)
        runnable: list[tuple[PriorityQueue, int]] = []
        aged: list[tuple[PriorityQueue, int, Ticket]] = []
        for lane in self._lanes.values():
            if not can_run(lane.key, Priority.HIGH):
                continue
            for band, row in enumerate(lane.rows):
                if not row.live:
                    continue
                if not band or can_run(lane.key, BANDS[band]):
                    runnable.append((row, band))
                if band and now_s - (oldest := row.oldest()).arrived_s >= self.settings.age_after_s:
                    aged.append((row, band, oldest))
        due = [entry for entry in aged if entry[0].credit >= _DUE]
        if due:
            row, _, ticket = min(due, key=lambda entry: entry[2].arrived_s)
            row.credit -= 1.0
        elif runnable:
            ticket = self._first(runnable)
        else:
            return None
        passed_over = [row for row, band, _ in aged if band > ticket.band]
        for row in passed_over:
            row.credit += self.settings.aged_ratio / len(passed_over)
        self._charge(ticket)
        self._take_out(ticket, TicketState.SERVED)
        return ticket

    def leave(self, ticket: Ticket) -> bool:
        """The client went. True if the ticket was waiting."""
        if ticket.state is not TicketState.WAITING:
            return False
        self._take_out(ticket, TicketState.LEFT)
        return True

    def expire(self, now_s: float) -> list[Ticket]:
        """Takes out the tickets whose deadline has passed, and gives back those not given back before."""
        self._collect_expired(now_s)
        expired, self._expired = self._expired, []
        return expired

    def predict_wait_s(
        self, ticket: Ticket, now_s: float, rates_per_s: Sequence[float | None]
    ) -> float | None:
        """How long a new ticket like this would wait; None: unknown.

        By the order of service: the tickets of higher priority, and in its own as many as take their
        turn before it, over the rate that what arrives with higher priority, and the aged of lower
        priority, leave. Or by age, if that is sooner: its own priority's tickets over the share that
        goes to the aged. A lane that shares only some of its tiers counts in proportion.
        """
        known = [rates_per_s[tier] if tier < len(rates_per_s) else None for tier in ticket.tiers]
        rate = sum(value for value in known if value is not None)
        if rate <= 0.0 or any(value is None for value in known):
            return None
        band = ticket.band
        higher = same = lower = higher_per_s = 0.0
        for lane in self._lanes.values():
            part = _overlap(lane.tiers, ticket.tiers, rates_per_s)
            if part:
                higher += part * sum(row.live for row in lane.rows[:band])
                same += part * lane.rows[band].live
                lower += part * sum(row.live for row in lane.rows[band + 1 :])
        for tiers, arrivals in self._arrivals.items():
            part = _overlap(tiers, ticket.tiers, rates_per_s)
            if part:
                higher_per_s += part * sum(kind.per_s(now_s) for kind in arrivals[:band])
        to_aged = self.settings.aged_ratio if lower else 0.0
        left_per_s = (rate - higher_per_s) * (1.0 - to_aged)
        ahead = higher + min(same, self._turns_before(ticket))
        in_turn_s = (ahead + 1.0) / left_per_s if left_per_s > 0.0 else inf
        aged_per_s = rate * self.settings.aged_ratio / (len(BANDS) - 1)
        if not band or aged_per_s <= 0.0:
            return in_turn_s
        return min(in_turn_s, max(self.settings.age_after_s, (same + 1.0) / aged_per_s))

    def _turns_before(self, ticket: Ticket) -> float:
        """Tickets of its own priority that go before it, by turns among its callers."""
        band = self._bands[ticket.band]
        active = sum(len(group) for group in band.by_count.values())
        caller = band.callers.get(ticket.caller)
        if caller is None or not caller.count:
            return active
        lane = self._lanes.get(ticket.lane)
        line = lane.rows[ticket.band].lines.get(ticket.caller) if lane else None
        first = line is not None and (not line.heap or ticket.deadline_s < line.heap[0][0])
        return active * (1 if first else caller.count)

    def note_arrival(self, tiers: tuple[int, ...], priority: Priority, now_s: float) -> None:
        """A request came; what was offered is noted already. Of what starts without waiting, predictions
        need to know while others wait."""
        arrivals = self._arrivals.get(tiers)
        if arrivals is None:
            if len(self._arrivals) >= 64:  # Client-made lists of models: forget rather than grow.
                self._arrivals.clear()
            arrivals = self._arrivals[tiers] = tuple(Rate() for _ in BANDS)
        arrivals[BAND_OF[priority]].add(now_s)

    def _bounded(self, wait_s: float) -> float:
        return min(max(wait_s, self.settings.retry_after_min_s), self.settings.retry_after_max_s)

    # The order.

    def _first(self, runnable: list[tuple[PriorityQueue, int]]) -> Ticket:
        """By priority, turn and deadline."""
        highest = min(band for _, band in runnable)
        heads = [row.head(self._bands[band]) for row, band in runnable if band == highest]
        return min(heads)[4].heap[0][2]

    def _charge(self, ticket: Ticket) -> None:
        """Its caller's turn is over."""
        band = self._bands[ticket.band]
        caller = band.callers[ticket.caller]
        # A caller whose lane was closed for long gets one turn at once, not all that it missed.
        start = max(caller.tag, band.virtual)
        band.virtual = start
        caller.tag = start + ticket.cost

    def _victim(self, newcomer: Ticket) -> Ticket | None:
        """Who goes for a newcomer: of the lowest priority the youngest ticket of the caller that has the
        most. At equal priority only if that caller would still have at least as many as the newcomer's."""
        for index in range(len(BANDS) - 1, newcomer.band - 1, -1):
            band = self._bands[index]
            if not band.live:
                continue
            if index == newcomer.band:
                own = band.callers.get(newcomer.caller)
                if band.largest < (own.count if own else 0) + 2:
                    return None
            name = next(iter(band.by_count[band.largest]))
            recent = band.callers[name].recent
            while recent[-1].state is not TicketState.WAITING:
                recent.pop()
            return recent[-1]
        return None

    # Putting in and taking out.

    def _put_in(self, ticket: Ticket) -> None:
        self._sequence += 1
        sequence = self._sequence
        ticket.state = TicketState.WAITING
        lane = self._lanes.get(ticket.lane)
        if lane is None:
            lane = self._lanes[ticket.lane] = Lane(ticket.lane, ticket.tiers)
        band = self._bands[ticket.band]
        caller = band.callers.get(ticket.caller)
        if caller is None:
            self._forget_callers(band)
            caller = band.callers[ticket.caller] = Caller(band.virtual)
        elif not caller.count:
            caller.tag = max(caller.tag, band.virtual)
        row = lane.rows[ticket.band]
        line = row.lines.get(ticket.caller)
        if line is None:
            line = row.lines[ticket.caller] = CallerQueue(ticket.caller)
        ticket.in_lane, ticket.in_line, ticket.in_caller = lane, line, caller
        heappush(line.heap, (ticket.deadline_s, sequence, ticket))
        line.live += 1
        row.live += 1
        lane.live += 1
        self._live += 1
        band.recount(ticket.caller, caller, 1)
        row.recent.append(ticket)
        caller.recent.append(ticket)
        heappush(self._deadlines, (ticket.deadline_s, sequence, ticket))
        if line.heap[0][1] == sequence:
            row.announce(line, band)

    def _take_out(self, ticket: Ticket, state: TicketState) -> None:
        lane, line, caller = ticket.in_lane, ticket.in_line, ticket.in_caller
        assert lane is not None
        assert line is not None
        assert caller is not None
        ticket.state = state
        ticket.in_lane = ticket.in_line = ticket.in_caller = None
        band = self._bands[ticket.band]
        row = lane.rows[ticket.band]
        line.live -= 1
        row.live -= 1
        lane.live -= 1
        self._live -= 1
        band.recount(ticket.caller, caller, -1)
        if not line.live:
            line.version += 1
            del row.lines[ticket.caller]
        elif line.heap[0][2] is ticket:
            row.announce(line, band)
        elif len(line.heap) > 2 * line.live + 8:
            compact_heap(line.heap)
        if not lane.live:
            del self._lanes[lane.key]
        if len(row.recent) > 2 * row.live + 8:
            row.recent = compacted(row.recent)
        if len(row.heads) > 4 * len(row.lines) + 16:
            row.heads = [entry for entry in row.heads if entry[3] == entry[4].version]
            heapify(row.heads)
        if len(caller.recent) > 2 * caller.count + 8:
            caller.recent = compacted(caller.recent)
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
        """Forgets the callers that wait for nothing, once they are many."""
        if len(band.callers) > 2 * self.settings.capacity + 64:
            band.callers = {name: caller for name, caller in band.callers.items() if caller.count}


def _overlap(tiers: tuple[int, ...], mine: tuple[int, ...], rates_per_s: Sequence[float | None]) -> float:
    """The share of the work of tickets for ``tiers`` that falls on the tiers ``mine``."""
    if tiers == mine:
        return 1.0
    whole = part = 0.0
    for tier in tiers:
        rate = (rates_per_s[tier] if tier < len(rates_per_s) else None) or 0.0
        whole += rate
        if tier in mine:
            part += rate
    return part / whole if whole else float(any(tier in mine for tier in tiers))
