import itertools

import pytest

from controlplane.core.domain.endpoint import (
    ENDED,
    SERVING,
    TRANSITIONS,
    Endpoint,
    EndpointState,
    check_transition,
    transition,
)
from controlplane.errors import IllegalTransition

S = EndpointState


def endpoint(state: EndpointState = S.READY) -> Endpoint:
    return Endpoint(
        endpoint_id="balanced-1",
        tier="balanced",
        model="m",
        engine="simulated",
        base_url="http://127.0.0.1:1",
        state=state,
        concurrency_limit=10,
        phase="serving",
        since_unix_s=5.0,
        diagnosis="none",
    )


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
def test_an_illegal_move_raises_and_changes_nothing(current: EndpointState, new: EndpointState) -> None:
    before = endpoint(current)
    copy = endpoint(current)
    with pytest.raises(IllegalTransition, match=f"{current} can't become {new}"):
        transition(before, new, unix_s=9.0)
    assert before == copy


def test_whoever_misses_a_state_in_between_sees_a_legal_move() -> None:
    for first, second, third in itertools.product(S, S, S):
        if second in TRANSITIONS[first] and third in TRANSITIONS[second] and third != first:
            check_transition(first, third)


def test_a_move_stamps_the_time_and_keeps_what_is_not_said() -> None:
    moved = transition(endpoint(S.READY), S.RESTARTING, unix_s=9.0, diagnosis="killed by signal 9")
    assert (moved.state, moved.since_unix_s, moved.phase) == (S.RESTARTING, 9.0, "serving")
    assert moved.diagnosis == "killed by signal 9"


def test_staying_is_no_move_and_keeps_the_time() -> None:
    stayed = transition(endpoint(S.STARTING), S.STARTING, unix_s=9.0, phase="loading weights")
    assert (stayed.since_unix_s, stayed.phase) == (5.0, "loading weights")


def test_only_ready_endpoints_serve_and_nothing_leaves_stopped() -> None:
    assert {S.READY} == SERVING
    assert TRANSITIONS[S.STOPPED] == frozenset()
    assert {S.FAILED, S.STOPPED} == ENDED
