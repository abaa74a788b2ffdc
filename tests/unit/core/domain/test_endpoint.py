from __future__ import annotations

import itertools

import pytest

from controlplane.core.domain.endpoint import (
    ENDED,
    SERVING,
    TRANSITIONS,
    EndpointState,
    check_transition,
)
from controlplane.errors import IllegalTransition

S = EndpointState


def test_the_table_names_every_state() -> None:
    assert set(TRANSITIONS) == set(S)


@pytest.mark.parametrize(
    ("current", "new"),
    [
        (S.READY, S.STARTING),
        (S.RESTARTING, S.STARTING),
        (S.DRAINING, S.READY),
        (S.DRAINING, S.RESTARTING),
        (S.FAILED, S.STARTING),
        (S.DRAINING, S.FAILED),
        (S.STOPPED, S.STARTING),
        (S.STOPPED, S.READY),
        (S.STOPPED, S.FAILED),
    ],
)
def test_an_illegal_transition_raises(current: EndpointState, new: EndpointState) -> None:
    with pytest.raises(IllegalTransition, match=f"{current} can't become {new}"):
        check_transition(current, new)


def test_an_observer_that_misses_a_state_sees_a_legal_transition() -> None:
    for first, second, third in itertools.product(S, S, S):
        if second in TRANSITIONS[first] and third in TRANSITIONS[second] and third != first:
            check_transition(first, third)


def test_staying_is_always_legal() -> None:
    for state in S:
        check_transition(state, state)


def test_only_ready_endpoints_serve_and_nothing_leaves_stopped() -> None:
    assert {S.READY} == SERVING
    assert TRANSITIONS[S.STOPPED] == frozenset()
    assert {S.FAILED, S.STOPPED} == ENDED
