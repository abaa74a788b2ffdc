"""The breaker's table, and what opens and closes it."""

from __future__ import annotations

import pytest

from controlplane.core.routing.circuit_breaker import (
    TRANSITIONS,
    Breaker,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
)
from controlplane.errors import IllegalTransition

SETTINGS = BreakerSettings(
    consecutive_failures=3,
    failure_ratio=0.5,
    min_requests=10,
    window_s=10.0,
    open_initial_s=1.0,
    open_max_s=4.0,
    probe_timeout_s=30.0,
)


def tripped(now_s: float = 100.0) -> Breaker:
    breaker = Breaker(SETTINGS)
    for _ in range(3):
        breaker.failure(now_s)
    return breaker


@pytest.mark.parametrize("state", BreakerState)
@pytest.mark.parametrize("event", BreakerEvent)
def test_only_the_transitions_of_the_table_exist(state: BreakerState, event: BreakerEvent) -> None:
    breaker = Breaker(SETTINGS)
    breaker.state = state
    if (state, event) in TRANSITIONS:
        breaker._transition(event)
        assert breaker.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{state} has no transition '{event}'"):
            breaker._transition(event)
        assert breaker.state is state


def test_failures_in_a_row_open_it_and_a_success_between_starts_the_count_anew() -> None:
    breaker = Breaker(SETTINGS)
    for _ in range(2):
        breaker.failure(100.0)
    breaker.success(100.0)
    for _ in range(2):
        breaker.failure(100.0)
    assert breaker.state is BreakerState.CLOSED
    breaker.failure(100.0)
    assert breaker.state is BreakerState.OPEN
    assert breaker.blocked_until_s == 101.0


def test_a_refused_connection_opens_it_at_once() -> None:
    breaker = Breaker(SETTINGS)
    breaker.failure(100.0, weight=3)
    assert breaker.state is BreakerState.OPEN


def test_a_failing_share_opens_it_without_a_row() -> None:
    breaker = Breaker(SETTINGS)
    for _ in range(4):
        breaker.success(100.0)
        breaker.failure(100.0)
    assert breaker.state is BreakerState.CLOSED, "under min_requests"
    breaker.success(100.0)
    breaker.failure(100.0)
    assert breaker.state is BreakerState.OPEN


@pytest.mark.parametrize(("later_s", "state"), [(10.0, BreakerState.OPEN), (25.0, BreakerState.CLOSED)])
def test_old_failures_leave_the_window(later_s: float, state: BreakerState) -> None:
    """Just into the next bucket the older one still counts whole; two windows later it does not."""
    breaker = Breaker(SETTINGS)
    for moment in (100.0, 100.0 + later_s):
        for _ in range(3):
            breaker.success(moment)
            breaker.failure(moment)
    assert breaker.state is state


def test_one_probe_goes_through_and_decides() -> None:
    breaker = tripped()
    with pytest.raises(IllegalTransition):
        breaker.start(100.5)
    probe = breaker.start(101.0)
    assert probe == 1
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.blocked_until_s > 101.1, "one only"
    breaker.success(101.5, probe)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.blocked_until_s <= 101.5
    assert breaker.start(101.5) == 0


def test_each_failed_probe_doubles_the_pause_up_to_its_maximum() -> None:
    breaker, now_s, pauses = tripped(), 100.0, []
    for _ in range(4):
        pauses.append(breaker.blocked_until_s - now_s)
        now_s = breaker.blocked_until_s
        breaker.failure(now_s, breaker.start(now_s))
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    now_s = breaker.blocked_until_s
    breaker.success(now_s, breaker.start(now_s))
    for _ in range(3):
        breaker.failure(now_s)
    assert breaker.blocked_until_s - now_s == 1.0, "a passed probe starts over"


def test_requests_from_before_it_opened_do_not_count() -> None:
    breaker = tripped()
    breaker.success(100.2)
    breaker.failure(100.3)
    assert (breaker.state, breaker.blocked_until_s) == (BreakerState.OPEN, 101.0)
    probe = breaker.start(101.0)
    breaker.success(101.1, 0)
    breaker.failure(101.2, 0)
    breaker.abandoned(101.3, 0)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.failure(101.4, probe)
    assert breaker.state is BreakerState.OPEN


def test_an_abandoned_probe_lets_the_next_one_go_at_once() -> None:
    breaker = tripped()
    breaker.abandoned(101.2, breaker.start(101.0))
    assert breaker.blocked_until_s <= 101.2
    assert breaker.start(101.2) == 2


def test_a_probe_that_never_reports_does_not_block_the_endpoint_for_good() -> None:
    breaker = tripped()
    lost = breaker.start(101.0)
    assert breaker.blocked_until_s > 130.9
    probe = breaker.start(131.0)
    breaker.success(131.1, lost)
    assert breaker.state is BreakerState.HALF_OPEN, "the lost one's word comes too late"
    breaker.success(131.2, probe)
    assert breaker.state is BreakerState.CLOSED
