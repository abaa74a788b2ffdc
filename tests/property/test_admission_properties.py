"""Whatever happens to the queue: it keeps its bound, loses nobody, serves nobody twice, starves nobody."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane.core.admission.fair_queue import PRIORITIES
from controlplane.core.admission.queue import (
    AdmissionQueue,
    AdmissionSettings,
    Queued,
    Rejected,
    RejectReason,
    Ticket,
    TicketState,
)
from controlplane.core.domain.request import Priority

LANES = ("x", "y", "z")
ORDER = {priority: rank for rank, priority in enumerate(PRIORITIES)}


def make(priority: Priority, caller: str, lane: str, now_s: float, timeout_s: float, **more: Any) -> Ticket:
    return Ticket(
        lane_key=lane,
        tiers=(LANES.index(lane),),
        priority=priority,
        caller=caller,
        arrived_s=now_s,
        deadline_s=now_s + timeout_s,
        **more,
    )


class Life(RuleBasedStateMachine):
    """Every offered ticket is in exactly one place at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.waiting: dict[Ticket, None] = {}  # in order of arrival
        self.ended: dict[Ticket, TicketState] = {}
        self.expired_unreported: set[Ticket] = set()

    @initialize(capacity=st.integers(1, 12), aged_ratio=st.sampled_from([0.0, 0.05, 0.5]))
    def start(self, capacity: int, aged_ratio: float) -> None:
        self.capacity = capacity
        self.queue = AdmissionQueue(
            AdmissionSettings(capacity=capacity, age_after_s=3.0, aged_ratio=aged_ratio)
        )

    def end(self, ticket: Ticket, state: TicketState) -> None:
        assert ticket in self.waiting, "ended twice, or never let in"
        assert ticket.state is state
        del self.waiting[ticket]
        self.ended[ticket] = state

    def note_expiries(self) -> None:
        for ticket in [one for one in self.waiting if one.state is TicketState.EXPIRED]:
            assert ticket.deadline_s <= self.now_s
            self.end(ticket, TicketState.EXPIRED)
            self.expired_unreported.add(ticket)

    @rule(
        priority=st.sampled_from(list(Priority)),
        caller=st.sampled_from("abcd"),
        lane=st.sampled_from(LANES),
        timeout_s=st.sampled_from([0.0, 1.0, 2.5, 10.0, 10.0]),
        rate=st.sampled_from([None, 0.1, 5.0]),
    )
    def offer(self, priority: Priority, caller: str, lane: str, timeout_s: float, rate: float | None) -> None:
        ticket = make(priority, caller, lane, self.now_s, timeout_s)
        result = self.queue.offer(ticket, self.now_s, [rate] * 3)
        self.note_expiries()
        if isinstance(result, Queued):
            assert ticket.state is TicketState.WAITING
            if result.evicted is not None:
                assert ORDER[result.evicted.priority] >= ORDER[priority], "never a more important one"
                assert not any(ORDER[one.priority] > ORDER[result.evicted.priority] for one in self.waiting)
                self.end(result.evicted, TicketState.EVICTED)
            self.waiting[ticket] = None
        else:
            assert ticket.state is TicketState.NEW
            assert result.retry_after_s >= 1.0
            if result.reason is RejectReason.FULL:
                assert len(self.waiting) == self.capacity
                assert not any(ORDER[one.priority] > ORDER[priority] for one in self.waiting)
            if result.reason is RejectReason.WOULD_MISS_DEADLINE:
                assert result.wait_s is not None
                assert result.wait_s > timeout_s

    @rule(open_lanes=st.sets(st.sampled_from(LANES)), reserved=st.booleans())
    def next(self, open_lanes: set[str], reserved: bool) -> None:
        calls: list[tuple[Hashable, Priority]] = []

        def can_run(lane: Hashable, priority: Priority) -> bool:
            calls.append((lane, priority))
            return lane in open_lanes and (priority is Priority.HIGH or not reserved)

        ticket = self.queue.next(self.now_s, can_run)
        self.note_expiries()
        assert len(calls) == len(set(calls))
        could = [one for one in self.waiting if one.lane_key in open_lanes]
        if not reserved:
            assert (ticket is None) == (not could), "a ticket that can run is never left lying"
        if ticket is not None:
            assert ticket.lane_key in open_lanes
            assert ticket.deadline_s > self.now_s
            best = min((ORDER[one.priority] for one in could), default=0)
            aged = self.now_s - ticket.arrived_s >= 3.0
            assert ORDER[ticket.priority] == best or aged
            if not aged:
                rivals = [
                    one
                    for one in could
                    if (one.caller, one.priority, one.lane_key)
                    == (ticket.caller, ticket.priority, ticket.lane_key)
                ]
                assert ticket.deadline_s == min(one.deadline_s for one in rivals)
            self.end(ticket, TicketState.SERVED)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(list(self.waiting)))
        assert self.queue.leave(ticket)
        self.end(ticket, TicketState.LEFT)
        assert not self.queue.leave(ticket)

    @rule(passed_s=st.sampled_from([0.0, 0.5, 2.0, 7.0]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s
        for ticket in self.queue.expire(self.now_s):
            if ticket in self.expired_unreported:
                self.expired_unreported.remove(ticket)
            else:
                self.end(ticket, TicketState.EXPIRED)
        assert not self.expired_unreported, "an expired ticket was not given back"
        assert all(ticket.deadline_s > self.now_s for ticket in self.waiting)

    @invariant()
    def bounded_and_complete(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.waiting) <= self.capacity
        assert set(self.queue.waiting()) == set(self.waiting)
        for priority in Priority:
            assert self.queue.depth(priority) == sum(one.priority is priority for one in self.waiting)
        for ticket, state in self.ended.items():
            assert ticket.state is state

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        while (ticket := self.queue.next(self.now_s, lambda lane, priority: True)) is not None:
            self.note_expiries()
            self.end(ticket, TicketState.SERVED)
        self.note_expiries()
        assert not self.waiting
        assert set(self.queue.expire(self.now_s)) == self.expired_unreported


Life.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(1.0, 100.0)), min_size=1, max_size=40),
)
def test_the_earliest_deadline_first_within_each_caller(tickets: list[tuple[str, float]]) -> None:
    queue = AdmissionQueue()
    for caller, timeout_s in tickets:
        queue.offer(make(Priority.NORMAL, caller, "x", 0.0, timeout_s), 0.0)
    served: dict[str, list[float]] = {}
    while (ticket := queue.next(0.0, lambda lane, priority: True)) is not None:
        served.setdefault(ticket.caller, []).append(ticket.deadline_s)
    assert sum(map(len, served.values())) == len(tickets)
    for deadlines in served.values():
        assert deadlines == sorted(deadlines)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.data())
def test_callers_that_wait_are_served_alike(callers: list[str], data: st.DataObject) -> None:
    """While two callers both wait, neither is more than one ticket ahead, whatever lanes they are in."""
    queue = AdmissionQueue()
    for caller in callers:
        lane = data.draw(st.sampled_from(LANES))
        queue.offer(make(Priority.NORMAL, caller, lane, 0.0, 60.0), 0.0)
    left = {caller: callers.count(caller) for caller in set(callers)}
    served = dict.fromkeys(left, 0)
    while (ticket := queue.next(0.0, lambda lane, priority: True)) is not None:
        served[ticket.caller] += 1
        left[ticket.caller] -= 1
        waiting = [served[caller] for caller, count in left.items() if count]
        assert not waiting or max(waiting) - min(waiting) <= 1


def only(lane: str) -> Callable[[Hashable, Priority], bool]:
    return lambda key, priority: key == lane


@pytest.mark.parametrize("ratio", [0.05, 0.25])
@settings(deadline=None, max_examples=30)
@given(lanes=st.lists(st.sampled_from(LANES), min_size=1, max_size=3), data=st.data())
def test_low_priority_is_served_however_much_high_comes(
    ratio: float, lanes: list[str], data: st.DataObject
) -> None:
    """With endless high priority, an aged low ticket is passed over a bounded number of times."""
    queue = AdmissionQueue(AdmissionSettings(age_after_s=1.0, aged_ratio=ratio))
    lows = [make(Priority.LOW, "l", lane, 0.0, 1e6) for lane in lanes]
    for low in lows:
        queue.offer(low, 0.0)
    bound = int(len(set(lanes)) / ratio + len(lanes)) * len(lanes) + len(LANES)
    passes = dict.fromkeys(lows, 0)
    for _ in range(bound * len(LANES)):
        lane = data.draw(st.sampled_from(LANES)) if len(set(lanes)) > 1 else lanes[0]
        queue.offer(make(Priority.HIGH, "h", lane, 2.0, 1e6), 2.0)
        ticket = queue.next(2.0, only(lane))
        assert ticket is not None
        for low in lows:
            passes[low] += low.lane_key == lane and low.state is TicketState.WAITING
    assert all(count <= bound for count in passes.values()), passes


@given(
    st.lists(st.sampled_from(list(Priority)), max_size=30),
    st.sampled_from(list(Priority)),
    st.floats(0.1, 100.0),
)
def test_more_important_requests_never_wait_longer(
    waiting: list[Priority], priority: Priority, rate: float
) -> None:
    queue = AdmissionQueue()
    for one in waiting:
        queue.offer(make(one, "", "x", 0.0, 1e9), 0.0)
    waits = {one: queue.predict_wait_s(make(one, "", "x", 0.0, 1e9), 0.0, [rate]) for one in Priority}
    high, low = waits[Priority.HIGH], waits[priority]
    assert high is not None
    assert low is not None
    assert high > 0.0
    if not queue.depth(Priority.LOW):
        assert high <= low or low >= 5.0


@given(st.integers(1, 20), st.floats(0.1, 50.0))
def test_a_retry_after_the_stated_time_is_queued(capacity: int, rate: float) -> None:
    """Honest: with nobody else coming, the queue served at the observed rate has room by then."""
    queue = AdmissionQueue(AdmissionSettings(capacity=capacity, retry_after_max_s=1e6))
    for _ in range(capacity):
        queue.offer(make(Priority.NORMAL, "", "x", 0.0, 1e9), 0.0)
    result = queue.offer(make(Priority.NORMAL, "", "x", 0.0, 1e9), 0.0, [rate])
    assert isinstance(result, Rejected)
    for _ in range(min(capacity, int(result.retry_after_s * rate + 1e-6))):
        queue.next(0.0, lambda lane, priority: True)
    assert isinstance(
        queue.offer(make(Priority.NORMAL, "", "x", 0.0, 1e9), result.retry_after_s, [rate]), Queued
    )
