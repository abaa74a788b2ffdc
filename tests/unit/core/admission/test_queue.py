"""The queue: order, fairness, ageing, bounds, predictions."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest

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

NOW_S = 100.0
LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


def ticket(priority: Priority = NORMAL, name: str = "", **fields: Any) -> Ticket:
    values: dict[str, Any] = {
        "lane_key": "lane",
        "tiers": (0,),
        "caller": "",
        "arrived_s": NOW_S,
        "deadline_s": NOW_S + 60.0,
        "payload": name,
    }
    return Ticket(priority=priority, **{**values, **fields})


def anything(lane: Hashable, priority: Priority) -> bool:
    return True


def queue_of(*tickets: Ticket, **settings: Any) -> AdmissionQueue:
    queue = AdmissionQueue(AdmissionSettings(**settings))
    for one in tickets:
        assert isinstance(queue.offer(one, one.arrived_s), Queued)
    return queue


def drained(queue: AdmissionQueue, now_s: float = NOW_S) -> list[Any]:
    names = []
    while (one := queue.next(now_s, anything)) is not None:
        assert one.state is TicketState.SERVED
        names.append(one.payload)
    return names


def served(queue: AdmissionQueue, may_go: Callable[[Hashable, Priority], bool]) -> Any:
    """The payload of the next ticket, which there must be."""
    ticket = queue.next(NOW_S, may_go)
    assert ticket is not None
    return ticket.payload


def test_the_higher_priority_first() -> None:
    queue = queue_of(ticket(LOW, "l"), ticket(NORMAL, "n"), ticket(HIGH, "h"))
    assert [queue.depth(priority) for priority in (HIGH, NORMAL, LOW)] == [1, 1, 1]
    assert drained(queue) == ["h", "n", "l"]
    assert len(queue) == 0


def test_the_earliest_deadline_first_among_equals() -> None:
    queue = queue_of(*(ticket(name=str(d), deadline_s=NOW_S + d) for d in (30, 10, 50, 20, 40)))
    assert drained(queue) == ["10", "20", "30", "40", "50"]


def test_equal_deadlines_in_order_of_arrival() -> None:
    queue = queue_of(*(ticket(name=str(i)) for i in range(5)))
    assert drained(queue) == ["0", "1", "2", "3", "4"]


def test_callers_take_turns() -> None:
    queue = queue_of(
        *(ticket(name=f"a{i}", caller="a", deadline_s=NOW_S + 10 + i) for i in range(4)),
        *(ticket(name=f"b{i}", caller="b", deadline_s=NOW_S + 30 + i) for i in range(2)),
    )
    assert drained(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_caller_that_returns_at_once_gets_no_more_than_its_turn() -> None:
    queue = queue_of(*(ticket(name="a", caller="a") for _ in range(10)))
    served = []
    for _ in range(8):
        if queue.depth(NORMAL) == sum(1 for one in queue.waiting() if one.caller == "a"):
            queue.offer(ticket(name="b", caller="b", deadline_s=NOW_S + 1), NOW_S)
        one = queue.next(NOW_S, anything)
        assert one is not None
        served.append(one.payload)
    assert served.count("a") == 4


def test_a_saturated_lane_does_not_hold_up_another() -> None:
    queue = queue_of(ticket(HIGH, "full", lane_key="full"), ticket(LOW, "free", lane_key="free"))
    one = queue.next(NOW_S, lambda lane, priority: lane == "free")
    assert one is not None
    assert one.payload == "free"
    assert queue.next(NOW_S, lambda lane, priority: lane == "free") is None
    assert drained(queue) == ["full"]


def test_turns_count_across_lanes() -> None:
    queue = queue_of(
        *(ticket(name="a", caller="a", lane_key=lane, deadline_s=NOW_S + 5) for lane in ("x", "x", "y", "y")),
        *(ticket(name="b", caller="b", lane_key="y") for _ in range(2)),
    )
    assert drained(queue)[:4] == ["a", "b", "a", "b"]


def test_a_caller_whose_lane_was_closed_gets_one_turn_and_not_all_that_it_missed() -> None:
    queue = queue_of(
        *(ticket(name="a", caller="a", lane_key="x", deadline_s=NOW_S + 5) for _ in range(4)),
        *(ticket(name="b", caller="b", lane_key="y") for _ in range(8)),
    )
    for _ in range(4):
        assert served(queue, lambda lane, priority: lane == "y") == "b"
    assert drained(queue) == ["a", "a", "b", "a", "b", "a", "b", "b"]


def test_the_aged_get_their_share_and_the_oldest_of_them_first() -> None:
    old = [ticket(LOW, f"old{i}", arrived_s=NOW_S - 20 + i) for i in range(2)]
    queue = queue_of(*old, *(ticket(HIGH, "h") for _ in range(20)), age_after_s=5.0, aged_ratio=0.25)
    order = drained(queue)
    assert [index for index, name in enumerate(order) if name.startswith("old")] == [4, 9]
    assert [name for name in order if name != "h"] == ["old0", "old1"]


def test_no_ticket_is_aged_before_the_time() -> None:
    queue = queue_of(
        ticket(LOW, "l"), *(ticket(HIGH, "h") for _ in range(40)), age_after_s=5.0, aged_ratio=0.5
    )
    assert drained(queue, NOW_S + 4.9)[-1] == "l"


def test_the_share_is_for_all_the_aged_together() -> None:
    lows = [ticket(LOW, "aged", lane_key=lane, arrived_s=NOW_S - 20) for lane in "abcde" for _ in range(30)]
    highs = [ticket(HIGH, "h", lane_key=lane) for lane in "abcde" for _ in range(60)]
    queue = queue_of(*lows, *highs, age_after_s=5.0, aged_ratio=0.1)
    first = [served(queue, anything) for _ in range(275)]
    assert first.count("aged") == 25


def test_an_aged_ticket_may_take_a_slot_that_is_reserved_for_high() -> None:
    def only_high(lane: Hashable, priority: Priority) -> bool:
        return priority is HIGH

    old = ticket(LOW, "old", arrived_s=NOW_S - 20)
    queue = queue_of(old, *(ticket(HIGH, "h") for _ in range(3)), age_after_s=5.0, aged_ratio=0.5)
    assert [served(queue, only_high) for _ in range(4)] == ["h", "h", "old", "h"]
    assert queue.next(NOW_S, only_high) is None


def test_a_full_queue_says_when_to_retry() -> None:
    queue = queue_of(*(ticket() for _ in range(4)), capacity=4)
    result = queue.offer(ticket(), NOW_S, [0.5])
    assert result == Rejected(RejectReason.FULL, 10.0, 10.0)
    assert len(queue) == 4


@pytest.mark.parametrize(("rate", "expected_s"), [(None, 2.0), (1000.0, 2.0), (0.001, 30.0)])
def test_retry_after_stays_in_its_bounds(rate: float | None, expected_s: float) -> None:
    far = NOW_S + 1e9
    queue = queue_of(
        *(ticket(deadline_s=far) for _ in range(3)), capacity=3, retry_after_min_s=2.0, retry_after_max_s=30.0
    )
    result = queue.offer(ticket(deadline_s=far), NOW_S, [rate])
    assert isinstance(result, Rejected)
    assert (result.reason, result.retry_after_s) == (RejectReason.FULL, expected_s)


def test_the_more_important_evicts_the_youngest_of_the_least_important() -> None:
    low = [ticket(LOW, f"l{i}") for i in range(2)]
    queue = queue_of(*low, ticket(NORMAL, "n"), capacity=3)
    result = queue.offer(ticket(HIGH, "h"), NOW_S, [1.0])
    assert isinstance(result, Queued)
    assert result.evicted is low[1]
    assert result.retry_after_s >= 1.0
    assert low[1].state is TicketState.EVICTED
    assert drained(queue) == ["h", "n", "l0"]


def test_the_same_priority_evicts_only_from_a_caller_with_more() -> None:
    hog = [ticket(name=f"a{i}", caller="a") for i in range(3)]
    queue = queue_of(*hog, ticket(name="b0", caller="b"), capacity=4)
    result = queue.offer(ticket(name="b1", caller="b"), NOW_S)
    assert isinstance(result, Queued)
    assert result.evicted is hog[2]
    assert isinstance(queue.offer(ticket(name="b2", caller="b"), NOW_S), Rejected), "two each is fair"
    assert isinstance(queue.offer(ticket(LOW, caller="c"), NOW_S), Rejected), "never one more important"


@pytest.mark.parametrize(("needs_s", "let_in"), [(0.0, True), (4.0, True), (5.0, True), (6.0, False)])
def test_a_ticket_that_would_miss_its_deadline_is_rejected_at_once(needs_s: float, let_in: bool) -> None:
    """Four ahead and itself at one a second: five seconds to wait, and ten until the deadline."""
    queue = queue_of(*(ticket(deadline_s=NOW_S + 9.0) for _ in range(4)))
    newcomer = ticket(deadline_s=NOW_S + 10.0, needs_s=needs_s)
    assert queue.predict_wait_s(newcomer, NOW_S, [1.0]) == 5.0
    result = queue.offer(newcomer, NOW_S, [1.0])
    if let_in:
        assert result == Queued()
    else:
        assert result == Rejected(RejectReason.WOULD_MISS_DEADLINE, 1.0, 5.0)
    assert len(queue) == 4 + let_in


def test_shedding_says_by_how_much_it_was_too_late() -> None:
    queue = queue_of(*(ticket(deadline_s=NOW_S + 19.0) for _ in range(49)))
    result = queue.offer(ticket(deadline_s=NOW_S + 20.0), NOW_S, [1.0])
    assert result == Rejected(RejectReason.WOULD_MISS_DEADLINE, 30.0, 50.0)


def test_a_passed_deadline_is_too_late() -> None:
    result = AdmissionQueue().offer(ticket(deadline_s=NOW_S), NOW_S, [1.0])
    assert isinstance(result, Rejected)
    assert result.reason is RejectReason.TOO_LATE


@pytest.mark.parametrize(
    ("newcomer", "rates", "wait_s"),
    [
        pytest.param(ticket(HIGH), [2.0], 1.5 / 0.95, id="behind the two high"),
        pytest.param(ticket(NORMAL), [2.0], 5.0 / (2.0 - 0.2) / 0.95, id="and two normal"),
        pytest.param(ticket(NORMAL, caller="new"), [2.0], 4.0 / (2.0 - 0.2) / 0.95, id="a new caller's turn"),
        pytest.param(
            ticket(NORMAL, deadline_s=NOW_S + 1), [2.0], 4.0 / (2.0 - 0.2) / 0.95, id="an urgent one"
        ),
        pytest.param(ticket(LOW), [2.0], 6.0 / (2.0 - 0.4), id="behind all"),
        pytest.param(ticket(HIGH), [None], None, id="unknown"),
        pytest.param(ticket(HIGH), [], None, id="missing"),
        pytest.param(ticket(HIGH, tiers=(0, 1)), [2.0, None], None, id="one unknown"),
        pytest.param(ticket(HIGH, tiers=(1,)), [2.0, 4.0], 0.25, id="another tier"),
        pytest.param(ticket(HIGH, tiers=(0, 1)), [2.0, 2.0], 0.75 / 0.95, id="two tiers drain it"),
    ],
)
def test_predicted_waits(newcomer: Ticket, rates: list[float | None], wait_s: float | None) -> None:
    queue = queue_of(
        *(ticket(HIGH) for _ in range(2)), *(ticket(NORMAL) for _ in range(2)), ticket(LOW), aged_ratio=0.05
    )
    predicted = queue.predict_wait_s(newcomer, NOW_S, rates)
    assert predicted == (None if wait_s is None else pytest.approx(wait_s))


def test_under_lasting_higher_load_low_waits_for_its_share() -> None:
    queue = queue_of(*(ticket(HIGH) for _ in range(30)), aged_ratio=0.1, age_after_s=5.0)
    assert queue.predict_wait_s(ticket(LOW), NOW_S, [2.0]) == pytest.approx(1.0 / (2.0 * 0.1 / 2))
    assert queue.predict_wait_s(ticket(LOW), NOW_S, [100.0]) == pytest.approx(31.0 / (100.0 - 3.0))


def test_arrivals_are_forgotten() -> None:
    queue = queue_of(ticket(NORMAL))
    for _ in range(10):
        queue.note_arrival((0,), HIGH, NOW_S)
    waits = [queue.predict_wait_s(ticket(NORMAL), NOW_S + later_s, [2.0]) for later_s in (0.0, 5.0, 10.0)]
    assert waits == [pytest.approx(2.0 / rate) for rate in (1.0, 1.5, 2.0)]


def test_expired_tickets_are_returned_once_and_never_served() -> None:
    late, later = ticket(name="late", deadline_s=NOW_S + 1), ticket(name="later", deadline_s=NOW_S + 3)
    queue = queue_of(late, later)
    one = queue.next(NOW_S + 1, anything)
    assert one is later
    assert queue.expire(NOW_S + 1) == [late]
    assert late.state is TicketState.EXPIRED
    assert queue.expire(NOW_S + 10) == []


def test_a_queue_with_expired_tickets_to_return_is_not_empty() -> None:
    queue = queue_of(ticket(deadline_s=NOW_S + 1))
    assert queue.next(NOW_S + 2, anything) is None
    assert len(queue) == 0
    assert queue
    queue.expire(NOW_S + 2)
    assert not queue


def test_expired_tickets_make_room() -> None:
    queue = queue_of(ticket(deadline_s=NOW_S + 1), capacity=1)
    assert isinstance(queue.offer(ticket(), NOW_S + 2), Queued)
    assert len(queue.expire(NOW_S + 2)) == 1


def test_a_client_that_leaves_makes_room() -> None:
    first, second = ticket(name="1"), ticket(name="2")
    queue = queue_of(first, second, capacity=2)
    assert queue.leave(first)
    assert not queue.leave(first)
    assert first.state is TicketState.LEFT
    assert isinstance(queue.offer(ticket(name="3"), NOW_S), Queued)
    assert drained(queue) == ["2", "3"]
    assert not queue.leave(second)


def test_a_ticket_can_be_offered_once() -> None:
    one = ticket()
    queue = queue_of(one)
    with pytest.raises(ValueError, match="this ticket is waiting"):
        queue.offer(one, NOW_S)


def test_tickets_that_left_do_not_accumulate_in_the_heaps() -> None:
    queue = queue_of(*(ticket(caller="stays", deadline_s=NOW_S + 1e6) for _ in range(3)))
    for i in range(3000):
        one = ticket(caller=f"caller{i}" if i % 2 else "stays", deadline_s=NOW_S + 1e5)
        queue.offer(one, NOW_S)
        queue.leave(one)
    normal = queue._lanes["lane"].priority_queues[1]
    band = queue._bands[1]
    assert len(queue._deadlines) < 100
    assert max(len(normal.heads), len(normal.recent), len(normal.caller_queues["stays"].heap)) < 100
    assert len(band.callers["stays"].recent) < 100
    assert len(queue.waiting()) == 3


def test_idle_callers_are_dropped_once_there_are_many() -> None:
    queue = queue_of(capacity=10)
    for i in range(500):
        queue.offer(ticket(caller=f"caller{i}"), NOW_S)
        assert queue.next(NOW_S, anything) is not None
    assert len(queue._bands[1].callers) <= 2 * 10 + 64 + 1


def test_kinds_of_arrivals_are_bounded() -> None:
    queue = AdmissionQueue()
    for i in range(200):
        queue.note_arrival((i,), NORMAL, NOW_S)
    assert len(queue._arrivals) <= 64
