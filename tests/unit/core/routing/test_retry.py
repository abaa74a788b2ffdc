"""What is tried again, resumed, or given up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.routing.retry import (
    FINAL,
    RULES,
    AttemptFailure,
    FailedAttempt,
    GiveUp,
    RetryBudget,
    RetryElsewhere,
    RetrySettings,
    next_step,
)

NOW_S = 10.0
SETTINGS = RetrySettings(max_attempts=3, budget_ratio=0.2, budget_min_per_s=1.0, budget_burst=2.0)
FRESH = FailedAttempt(number=1, sent=False, deadline_s=100.0)
STREAMING = FailedAttempt(number=1, sent=True, deadline_s=100.0)


def budget(tokens: float = 2.0) -> RetryBudget:
    made = RetryBudget(SETTINGS, NOW_S)
    made.tokens = tokens
    return made


def test_every_failure_has_a_rule() -> None:
    assert set(RULES) == set(AttemptFailure)


@pytest.mark.parametrize("attempt", [FRESH, STREAMING])
@pytest.mark.parametrize("failure", [failure for failure in AttemptFailure if failure not in FINAL])
def test_a_first_failure_is_retried_elsewhere(failure: AttemptFailure, attempt: FailedAttempt) -> None:
    assert next_step(failure, attempt, SETTINGS, budget(), NOW_S) == RetryElsewhere()


@pytest.mark.parametrize("failure", sorted(FINAL))
def test_a_failure_that_no_other_endpoint_would_mend_is_final(failure: AttemptFailure) -> None:
    tokens = budget()
    step = next_step(failure, FRESH, SETTINGS, tokens, NOW_S)
    assert isinstance(step, GiveUp)
    assert step.code == RULES[failure].code
    assert tokens.tokens == budget().tokens
    assert RULES[failure].breaker_weight == 0


def test_a_request_that_two_endpoints_refused_alike_is_not_tried_a_third_time() -> None:
    failed = FRESH._replace(number=2, engine_status=500, alike=True)
    step = next_step(AttemptFailure.SERVER_ERROR, failed, SETTINGS, budget(), NOW_S)
    assert isinstance(step, GiveUp)
    assert step.status == 500


@pytest.mark.parametrize("failure", [AttemptFailure.BUSY, AttemptFailure.UNAVAILABLE])
def test_back_pressure_opens_no_breaker(failure: AttemptFailure) -> None:
    assert RULES[failure].breaker_weight == 0


def test_giving_up_keeps_the_engines_own_status() -> None:
    failed = FRESH._replace(number=3, engine_status=500)
    step = next_step(AttemptFailure.SERVER_ERROR, failed, SETTINGS, budget(), NOW_S)
    assert isinstance(step, GiveUp)
    assert (step.status, step.code) == (500, "engine_error")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (AttemptFailure.CONNECT_TIMEOUT, 503, "no_endpoint"),
        (AttemptFailure.RESET, 502, "endpoint_lost"),
        (AttemptFailure.BUSY, 429, "queue_full"),
        (AttemptFailure.FIRST_TOKEN_TIMEOUT, 504, "first_token_timeout"),
    ],
)
def test_the_last_attempt_gives_the_failures_own_status(
    failure: AttemptFailure, status: int, code: str
) -> None:
    step = next_step(failure, FRESH._replace(number=3), SETTINGS, budget(), NOW_S)
    assert step == GiveUp(status, code, f"{failure} at the last of 3 attempts")


def test_attempts_that_reached_no_engine_are_counted_apart() -> None:
    settings = replace(SETTINGS, max_refused=4, budget_burst=100.0)
    plenty = RetryBudget(settings, NOW_S)
    for refused in range(4):
        attempt = FRESH._replace(number=refused + 1, refused=refused)
        assert isinstance(next_step(AttemptFailure.REFUSED, attempt, settings, plenty, NOW_S), RetryElsewhere)
    last = next_step(AttemptFailure.REFUSED, FRESH._replace(number=5, refused=4), settings, plenty, NOW_S)
    assert last == GiveUp(503, "no_endpoint", "5 connections were refused")
    reached = FRESH._replace(number=4, refused=2)
    assert isinstance(next_step(AttemptFailure.RESET, reached, settings, plenty, NOW_S), RetryElsewhere)
    assert isinstance(
        next_step(AttemptFailure.RESET, reached._replace(number=5), settings, plenty, NOW_S), GiveUp
    )


def test_attempts_are_bounded_for_streams_too() -> None:
    step = next_step(AttemptFailure.TRUNCATED, STREAMING._replace(number=3), SETTINGS, budget(), NOW_S)
    assert step == GiveUp(502, "endpoint_lost", "cut at the last of 3 attempts")


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (
            FRESH._replace(deadline_s=10.04),
            GiveUp(408, "deadline_exceeded", "cut with no time left to try again"),
        ),
        (
            STREAMING._replace(deadline_s=10.04),
            GiveUp(502, "endpoint_lost", "cut with no time left to resume"),
        ),
    ],
)
def test_without_time_left_there_is_no_retry(attempt: FailedAttempt, expected: GiveUp) -> None:
    assert next_step(AttemptFailure.TRUNCATED, attempt, SETTINGS, budget(), NOW_S) == expected


@pytest.mark.parametrize(
    ("failure", "losses", "goes_on"),
    [
        (AttemptFailure.SERVER_ERROR, 0, False),
        (AttemptFailure.FIRST_TOKEN_TIMEOUT, 0, False),
        (AttemptFailure.REFUSED, 0, True),
        (AttemptFailure.REFUSED, 1, False),
        (AttemptFailure.TRUNCATED, 0, True),
        (AttemptFailure.TRUNCATED, 1, False),
    ],
)
def test_without_budget_only_a_first_loss_is_retried(
    failure: AttemptFailure, losses: int, goes_on: bool
) -> None:
    step = next_step(failure, FRESH._replace(losses=losses), SETTINGS, budget(0.0), NOW_S)
    assert isinstance(step, RetryElsewhere) is goes_on
    if isinstance(step, GiveUp):
        assert step.reason == f"{failure}; the retry budget is used up"


@pytest.mark.parametrize(
    ("failure", "losses", "deadline_s", "pause_s"),
    [
        (AttemptFailure.TRUNCATED, 0, 100.0, 0.0),
        (AttemptFailure.TRUNCATED, 1, 100.0, SETTINGS.pause_s),
        (AttemptFailure.REFUSED, 1, 100.0, SETTINGS.pause_s),
        (AttemptFailure.SERVER_ERROR, 1, 100.0, 0.0),
        (AttemptFailure.TRUNCATED, 1, NOW_S + 0.15, 0.1),
    ],
)
def test_a_request_that_loses_a_second_engine_pauses_inside_its_deadline(
    failure: AttemptFailure, losses: int, deadline_s: float, pause_s: float
) -> None:
    for attempt in (FRESH, STREAMING):
        at = attempt._replace(number=2, losses=losses, deadline_s=deadline_s)
        step = next_step(failure, at, SETTINGS, budget(), NOW_S)
        assert isinstance(step, RetryElsewhere)
        assert step.pause_s == pytest.approx(pause_s)


def test_the_budget_is_a_share_of_the_traffic_and_a_rate_on_top() -> None:
    tokens = budget(0.0)
    assert not tokens.spend(NOW_S)
    for _ in range(5):
        tokens.on_request()
    assert tokens.spend(NOW_S)
    assert not tokens.spend(NOW_S)
    assert not tokens.spend(NOW_S + 0.9)
    assert tokens.spend(NOW_S + 1.01)
    for _ in range(100):
        tokens.on_request()
    assert tokens.tokens == SETTINGS.budget_burst


def test_a_first_loss_costs_no_budget() -> None:
    tokens = budget(2.0)
    next_step(AttemptFailure.TRUNCATED, STREAMING, SETTINGS, tokens, NOW_S)
    assert tokens.tokens == 2.0
    next_step(AttemptFailure.SERVER_ERROR, FRESH, SETTINGS, tokens, NOW_S)
    assert tokens.tokens == 1.0
