"""What to do about a failed attempt: try elsewhere, resume the stream, or give up with the right error.

:data:`RULES` says it for each kind of failure; :func:`next_step` applies the rule to where the request
stands (attempts so far, bytes sent, time and budget left).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class AttemptFailure(StrEnum):
    """How an attempt failed, as the gateway saw it."""

    REFUSED = "refused"
    """Nobody listens there: the request never reached an engine."""
    CONNECT_TIMEOUT = "connect_timeout"
    RESET = "reset"
    """The connection was lost before the answer's head."""
    UNAVAILABLE = "unavailable"
    """The engine answered 503."""
    BUSY = "busy"
    """The engine answered 429."""
    SERVER_ERROR = "server_error"
    """The engine answered another 5xx."""
    WRONG_REQUEST = "wrong_request"
    """The engine answered 4xx: it would do so anywhere."""
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105 (no password)
    TOKEN_TIMEOUT = "token_timeout"  # noqa: S105
    """The stream fell silent."""
    CUT = "cut"
    """The answer ended before its end."""
    STREAM_ERROR = "stream_error"
    """The engine wrote an error into its stream."""


class FailureRule(NamedTuple):
    """What one kind of failure means."""

    retry: bool
    """Another endpoint may do better."""
    breaker_weight: int
    """For :meth:`Lease.fail`; 0: the endpoint is not to blame."""
    lost: bool
    """The engine is gone, so this costs as much as it had in flight and no more: a request's first
    such retry needs no budget."""
    status: int
    """For the client, if no bytes were sent and there is nothing more to try."""
    code: str


RULES: Final[dict[AttemptFailure, FailureRule]] = {
    AttemptFailure.REFUSED: FailureRule(True, 3, True, 503, "no_endpoint"),
    AttemptFailure.CONNECT_TIMEOUT: FailureRule(True, 2, True, 503, "no_endpoint"),
    AttemptFailure.RESET: FailureRule(True, 1, True, 502, "endpoint_lost"),
    AttemptFailure.UNAVAILABLE: FailureRule(True, 1, False, 503, "no_endpoint"),
    AttemptFailure.BUSY: FailureRule(True, 0, False, 429, "queue_full"),
    AttemptFailure.SERVER_ERROR: FailureRule(True, 1, False, 502, "engine_error"),
    AttemptFailure.WRONG_REQUEST: FailureRule(False, 0, False, 400, "bad_request"),
    AttemptFailure.FIRST_TOKEN_TIMEOUT: FailureRule(True, 2, False, 504, "first_token_timeout"),
    AttemptFailure.TOKEN_TIMEOUT: FailureRule(True, 2, True, 502, "endpoint_lost"),
    AttemptFailure.CUT: FailureRule(True, 1, True, 502, "endpoint_lost"),
    AttemptFailure.STREAM_ERROR: FailureRule(True, 1, False, 502, "engine_error"),
}


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """How much is tried again."""

    max_attempts: int = 3
    """Attempts of one request that reached an engine, resumes included. Also what stops a request that kills
    whatever engine it meets."""
    max_refused: int = 10
    """Attempts beside them that reached nobody: a node that is lost takes many endpoints at once, and a
    request may meet several of them before the gateway knows."""
    budget_ratio: float = 0.2
    """Retries per request that comes in, on average."""
    budget_min_per_s: float = 10.0
    """Retries a second that are allowed whatever the traffic."""
    budget_burst: float = 100.0
    """Unused budget is kept up to this many retries."""
    pause_s: float = 0.25
    """A request that lost a second engine waits so long before it is tried again: what takes several
    engines down at once is known to everybody a moment later, and then it goes where one lives."""
    min_left_s: float = 0.05
    """With less than this until the deadline nothing is tried again."""


class RetryBudget:
    """A token bucket that keeps retries a bounded share of the traffic, so that a failing fleet is not
    finished off by its clients' second tries."""

    __slots__ = ("_at_s", "settings", "tokens")

    def __init__(self, settings: RetrySettings, now_s: float) -> None:
        self.settings = settings
        self.tokens = settings.budget_burst
        self._at_s = now_s

    def on_request(self) -> None:
        """A request came in."""
        tokens = self.tokens + self.settings.budget_ratio
        self.tokens = tokens if tokens < self.settings.budget_burst else self.settings.budget_burst

    def spend(self, now_s: float) -> bool:
        """Takes one retry out; False if there is none left."""
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(now_s, self._at_s)
        self.tokens = min(self.settings.budget_burst, self.tokens + passed_s * self.settings.budget_min_per_s)
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class RetryElsewhere(NamedTuple):
    """Place the request again, with the failed endpoint excluded. Nothing reached the client yet."""

    reason: str
    pause_s: float = 0.0
    """Not before this long from now."""


class Resume(NamedTuple):
    """Go on with the stream on another endpoint of the same model."""

    reason: str
    pause_s: float = 0.0
    """Not before this long from now."""


class GiveUp(NamedTuple):
    """Tell the client: with this status, or with an error event if bytes were sent."""

    status: int
    code: str
    reason: str


Step = RetryElsewhere | Resume | GiveUp


class FailedAttempt(NamedTuple):
    """Where a request stands when an attempt of it has failed."""

    number: int
    """Attempts made so far, from 1."""
    sent: bool
    """Bytes of the answer have reached the client."""
    deadline_s: float
    refused: int = 0
    """Earlier ones among them that reached nobody."""
    losses: int = 0
    """Earlier attempts of this request that were lost with their engine."""
    not_resumable: str = ""
    """Why the stream can't go on elsewhere; empty if it can. Only asked once bytes were sent."""
    engine_status: int | None = None
    """What the engine answered, if it did."""


def next_step(
    failure: AttemptFailure,
    attempt: FailedAttempt,
    settings: RetrySettings,
    budget: RetryBudget,
    now_s: float,
) -> Step:
    """What to do about a failed attempt; spends from ``budget`` if the step needs it.

    The first time that a request's engine is lost, no budget is needed, see :class:`FailureRule`.
    """
    rule = RULES[failure]
    status = attempt.engine_status or rule.status
    if not rule.retry:
        return GiveUp(status, rule.code, f"{failure}: it would fail anywhere")
    if attempt.sent and attempt.not_resumable:
        return GiveUp(502, "endpoint_lost", f"{failure} after tokens were sent; {attempt.not_resumable}")
    refused = attempt.refused + (failure is AttemptFailure.REFUSED)
    if refused > settings.max_refused:
        return _given_up(attempt, rule, status, f"{refused} connections were refused")
    # Who wants one attempt wants nothing tried again.
    reached = attempt.number - refused if settings.max_attempts > 1 else attempt.number
    if reached >= settings.max_attempts:
        return _given_up(attempt, rule, status, f"{failure} at the last of {settings.max_attempts} attempts")
    if now_s + settings.min_left_s >= attempt.deadline_s:
        if attempt.sent:
            return GiveUp(502, "endpoint_lost", f"{failure} with no time left to resume")
        return GiveUp(408, "deadline_exceeded", f"{failure} with no time left to try again")
    free = rule.lost and attempt.losses == 0
    if not free and not budget.spend(now_s):
        return _given_up(attempt, rule, status, f"{failure}; the retry budget is used up")
    again = rule.lost and attempt.losses > 0
    pause_s = min(settings.pause_s, attempt.deadline_s - now_s - settings.min_left_s) if again else 0.0
    if attempt.sent:
        return Resume(str(failure), pause_s)
    return RetryElsewhere(str(failure), pause_s)


def _given_up(attempt: FailedAttempt, rule: FailureRule, status: int, reason: str) -> GiveUp:
    if attempt.sent:
        return GiveUp(502, "endpoint_lost", reason)
    return GiveUp(status, rule.code, reason)
