"""Single requests and sessions as the log of requests has them: who was served where, how fast and at what
cost, without any content."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request that has ended."""

    unix_s: float
    """When it ended."""
    request_id: str
    session: str
    """As the client gave it; the digest of a long one; empty without one."""
    asked: str
    """The tier for which it was meant."""
    tier: str
    """The tier that served it or for which it waited last; empty if there was none."""
    endpoint: str
    model: str
    """What the client called the model."""
    api: str
    stream: bool
    outcome: str
    """One of :class:`~controlplane.core.domain.request.RequestOutcome`."""
    reason: str
    """An error's code, the HTTP status, ``stream`` or ``resumed``."""
    prompt_tokens: int
    generated_tokens: int
    queued_s: float
    ttft_s: float | None
    """From its arrival to the first token; only of streams that had one."""
    total_s: float
    """From its arrival to its end."""
    attempts: int
    resumed: int
    gpu_s: float
    """GPU time of all attempts (device time on engines without a GPU)."""
    key: str = ""
    """The id of the key that sent it; empty while no keys are required."""
    key_name: str = ""
    team: str = ""


OTHERS: Final = "(others)"
"""Stands for the sessions, or the keys, that were not counted one by one."""


@dataclass(frozen=True, slots=True)
class UsageSums:
    """Sums over requests of one key and team that one tier has served, with or without a session."""

    key: str
    key_name: str
    team: str
    tier: str
    """Empty for requests that no tier took."""
    session: str
    requests: int
    failed: int
    """Those that did not end with ``ok``."""
    prompt_tokens: int
    generated_tokens: int
    gpu_s: float
    next_tier_gpu_s: float
    """What the next more capable tier would have taken, over ``priced_requests``."""
    priced_requests: int
    """Requests for which that is known: there is such a tier, and it has served tokens."""
    priced_gpu_s: float
    """What these requests took."""
    last_unix_s: float


class UsageBy(StrEnum):
    """What usage is summed up by."""

    KEY = "key"
    TEAM = "team"
    TIER = "tier"
    SESSION = "session"


@dataclass(frozen=True, slots=True)
class UsageView:
    """Usage of the hours of a time, the largest first."""

    by: UsageBy
    usage: tuple[UsageSums, ...]
    """What was summed over is empty."""
    from_unix_s: float
    until_unix_s: float
    """The beginning of the first hour and the end of the last."""
    cost_per_gpu_hour: float = 0.0
    """0 if no price is known."""


@dataclass(frozen=True, slots=True)
class SessionUsage:
    """Sums over requests of one session of one team."""

    session: str
    """:data:`OTHERS`: the sum over sessions that were not counted one by one."""
    requests: int
    failed: int
    """Those that did not end with ``ok``."""
    prompt_tokens: int
    generated_tokens: int
    gpu_s: float
    last_unix_s: float
    team: str = ""


@dataclass(frozen=True, slots=True)
class RequestBatch:
    """What a gateway logs between two of its reports."""

    number: int
    """Grows with each batch of a gateway: one that arrives twice counts once."""
    unix_s: float
    ended: int
    """All requests that have ended, also those of which nothing else is logged."""
    requests: tuple[LoggedRequest, ...]
    usage: tuple[UsageSums, ...]
    """Of all requests that have ended."""


@dataclass(frozen=True, slots=True)
class RequestsView:
    """Part of the log."""

    requests: tuple[LoggedRequest, ...]
    matching: int
    """Logged requests that match, of which ``requests`` are the first."""
    logged: int
    """All logged requests of the time asked for."""
    ended: int
    """All requests of that time; by its beginning as exact as stored history is."""
    cost_per_gpu_hour: float = 0.0
    """0 if no price is known."""


class SessionOrder(StrEnum):
    """What sessions are ordered by, the largest first."""

    COST = "cost"
    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class SessionsView:
    """The first sessions in an order."""

    sessions: tuple[SessionUsage, ...]
    count: int
    """All sessions of the time asked for."""
    cost_per_gpu_hour: float = 0.0
    """0 if no price is known."""
