"""What to do about a failed attempt: retry elsewhere, resume the stream, or give up with the right error.

:data:`RULES` has a rule for each kind of failure; :func:`next_step` applies it to the request's state
(attempts so far, bytes sent, time and retry budget left).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple


class AttemptFailure(StrEnum):
    """How an attempt failed, as the gateway saw it."""

    REFUSED = "refused"
    """No process listens at the address: the request never reached an engine."""
    CONNECT_TIMEOUT = "connect_timeout"
    RESET = "reset"
    """The connection was lost before the response's headers."""
    UNAVAILABLE = "unavailable"
    """The engine answered 503 or 529, or 408: it works, but not for this request now."""
    BUSY = "busy"
    """The engine answered 429."""
    SERVER_ERROR = "server_error"
    """The engine answered another 5xx, or something that is no valid response."""
    INVALID = "invalid"
    """The engine wrote an error with a client's status into its stream: any engine would."""
    GATEWAY = "gateway"
    """The gateway itself lacks file descriptors, ports or memory for a connection."""
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105 (no password)
    TOKEN_TIMEOUT = "token_timeout"  # noqa: S105
    """The stream stopped without an end."""
    TRUNCATED = "cut"
    """The connection was lost before the response was complete."""
    STREAM_ERROR = "stream_error"
    """The engine wrote an error into its stream."""


class FailureRule(NamedTuple):
    """What one kind of failure means."""

    breaker_weight: int
    """For :meth:`RequestSlot.fail`; 0 means that the endpoint is not to blame. Whether it is to blame for
    SERVER_ERROR and STREAM_ERROR may depend on what other engines say: see
    :mod:`controlplane.gateway.proxy.verdicts`."""
    lost: bool
    """Whether the engine is gone. Then only the requests that it had in flight are retried, so a request's
    first such retry needs no budget."""
    status: int
    """The client's status, if nothing was sent and nothing is left to try."""
    code: str


RULES: Final[dict[AttemptFailure, FailureRule]] = {
    AttemptFailure.REFUSED: FailureRule(3, True, 503, "no_endpoint"),
    AttemptFailure.CONNECT_TIMEOUT: FailureRule(2, True, 503, "no_endpoint"),
    AttemptFailure.RESET: FailureRule(1, True, 502, "endpoint_lost"),
    AttemptFailure.UNAVAILABLE: FailureRule(0, False, 503, "no_endpoint"),
    AttemptFailure.BUSY: FailureRule(0, False, 429, "queue_full"),
    AttemptFailure.SERVER_ERROR: FailureRule(1, False, 502, "engine_error"),
    AttemptFailure.FIRST_TOKEN_TIMEOUT: FailureRule(2, False, 504, "first_token_timeout"),
    AttemptFailure.TOKEN_TIMEOUT: FailureRule(2, True, 502, "endpoint_lost"),
    AttemptFailure.TRUNCATED: FailureRule(1, True, 502, "endpoint_lost"),
    AttemptFailure.STREAM_ERROR: FailureRule(1, False, 502, "engine_error"),
    AttemptFailure.INVALID: FailureRule(0, False, 400, "bad_request"),
    AttemptFailure.GATEWAY: FailureRule(0, False, 503, "gateway_exhausted"),
}

FINAL: Final = frozenset({AttemptFailure.INVALID, AttemptFailure.GATEWAY})
"""Failures that another attempt would not fix."""


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """How often requests are retried."""

    max_attempts: int = 3
    """Maximum number of a request's attempts that reach an engine, including resumes. This also stops a
    request that crashes every engine it reaches."""
    max_refused: int = 10
    """Maximum number of further attempts that reach no engine: when a node is lost, many endpoints are gone
    at once, and a request may try several of them before the gateway knows."""
    budget_ratio: float = 0.2
    """Retries per incoming request, on average."""
    budget_min_per_s: float = 10.0
    """Retries per second that are always allowed, even without traffic."""
    budget_burst: float = 100.0
    """Unused budget accumulates up to this many retries."""
    pause_s: float = 0.25
    """How long to wait before the retry of a request that lost a second engine. If a failure takes several
    engines down at once, the gateway knows a moment later, and sends the request to an engine that is
    alive."""
    min_left_s: float = 0.05
    """With less time than this before the deadline, there is no retry."""


class RetryBudget:
    """A token bucket that bounds retries to a share of the traffic, so that they don't overload engines that
    are already failing."""

    __slots__ = ("_at_s", "settings", "tokens")

    def __init__(self, settings: RetrySettings, now_s: float) -> None:
        self.settings = settings
        self.tokens = settings.budget_burst
        self._at_s = now_s

    def on_request(self) -> None:
        """Records that a request came in."""
        tokens = self.tokens + self.settings.budget_ratio
        self.tokens = tokens if tokens < self.settings.budget_burst else self.settings.budget_burst

    def spend(self, now_s: float) -> bool:
        """Takes one retry out of the budget; False if none is left."""
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(now_s, self._at_s)
        self.tokens = min(self.settings.budget_burst, self.tokens + passed_s * self.settings.budget_min_per_s)
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class RetryElsewhere(NamedTuple):
    """Send the request to another endpoint; if a part of its stream was sent, resume it there."""

    pause_s: float = 0.0
    """How long to wait before the attempt."""


class GiveUp(NamedTuple):
    """Respond to the client with this status, or with an error event if bytes were sent."""

    status: int
    code: str
    reason: str


class FailedAttempt(NamedTuple):
    """The state of a request when one of its attempts has failed."""

    number: int
    """Attempts made so far, from 1."""
    sent: bool
    """Whether bytes of the response have reached the client."""
    deadline_s: float
    refused: int = 0
    """Number of earlier attempts whose connection was refused."""
    losses: int = 0
    """Number of earlier attempts that were lost with their engine."""
    engine_status: int | None = None
    """The status of the engine's response, if there was one."""
    alike: bool = False
    """An earlier attempt was refused alike by another endpoint, so the request is to blame."""


def next_step(
    failure: AttemptFailure,
    attempt: FailedAttempt,
    settings: RetrySettings,
    budget: RetryBudget,
    now_s: float,
) -> RetryElsewhere | GiveUp:
    """What to do about a failed attempt. Spends from ``budget``, except the first time that the request loses
    its engine (see :class:`FailureRule`)."""
    rule = RULES[failure]
    status = attempt.engine_status or rule.status
    if failure in FINAL:
        return _given_up(attempt, rule, status, str(failure))
    if attempt.alike:
        return _given_up(attempt, rule, status, "two endpoints refused the request alike")
    refused = attempt.refused + (failure is AttemptFailure.REFUSED)
    if refused > settings.max_refused:
        return _given_up(attempt, rule, status, f"{refused} connections were refused")
    # With max_attempts=1 refused connections are not retried either.
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
    lost_again = rule.lost and attempt.losses > 0
    pause_s = min(settings.pause_s, attempt.deadline_s - now_s - settings.min_left_s) if lost_again else 0.0
    return RetryElsewhere(pause_s)


def _given_up(attempt: FailedAttempt, rule: FailureRule, status: int, reason: str) -> GiveUp:
    if attempt.sent:
        return GiveUp(502, "endpoint_lost", reason)
    return GiveUp(status, rule.code, reason)
