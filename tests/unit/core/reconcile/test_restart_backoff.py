from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.reconcile.restart_backoff import RestartPolicy, decide_restart

POLICY = RestartPolicy(max_restarts=3, window_s=100.0, backoff_initial_s=0.5, backoff_max_s=1.5)


@pytest.mark.parametrize(
    ("restarted_s", "now_s", "restart", "delay_s"),
    [
        ([], 0.0, True, 0.5),
        ([0.0], 1.0, True, 1.0),
        ([0.0, 1.0], 2.0, True, 1.5),
        ([0.0, 1.0, 2.0], 3.0, False, 0.0),
        ([0.0, 1.0, 2.0], 100.5, True, 1.5),
        ([0.0, 1.0, 2.0], 200.0, True, 0.5),
    ],
)
def test_backoff_doubles_inside_the_window_and_ends_at_the_limit(
    restarted_s: list[float], now_s: float, restart: bool, delay_s: float
) -> None:
    decision = decide_restart(POLICY, restarted_s, now_s)
    assert (decision.restart, decision.delay_s) == (restart, delay_s)
    assert decision.reason


def test_a_permanent_diagnosis_stops_at_once() -> None:
    decision = decide_restart(POLICY, [], 0.0, permanent=True)
    assert not decision.restart
    assert "would not help" in decision.reason


def test_no_restarts_allowed() -> None:
    policy = RestartPolicy(max_restarts=0, window_s=10, backoff_initial_s=1, backoff_max_s=1)
    decision = decide_restart(policy, [], 0.0)
    assert not decision.restart
    assert "max_restarts is 0" in decision.reason


@given(
    limit=st.integers(0, 20),
    losses=st.lists(st.floats(0, 1000), max_size=60),
    initial_s=st.floats(0, 10),
    most_s=st.floats(0.01, 60),
)
def test_never_more_restarts_in_a_window_than_allowed_and_never_a_longer_wait(
    limit: int, losses: list[float], initial_s: float, most_s: float
) -> None:
    policy = RestartPolicy(limit, 50.0, initial_s, most_s)
    restarted_s: list[float] = []
    for now_s in sorted(losses):
        decision = decide_restart(policy, restarted_s, now_s)
        assert 0 <= decision.delay_s <= most_s
        if decision.restart:
            restarted_s.append(now_s)
        assert sum(1 for at_s in restarted_s if now_s - at_s < 50.0) <= limit
