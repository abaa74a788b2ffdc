"""Time-outs of running attempts, checked by one sweep over all of them instead of one timer each.

An attempt fails when its deadline passes, when its first or next token is overdue, or when its engine is
silent: for much longer than usual, the engine has sent no byte for *any* of its running requests. Silence
reveals engines that respond to health checks but generate no tokens, and does so before the limits that slow
but healthy requests need.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

from controlplane.core.routing.endpoint_table import EndpointLoad, RequestSlot
from controlplane.core.routing.retry import AttemptFailure
from controlplane.gateway.proxy.upstream import UpstreamConnection

SWEEP_S: Final = 0.1
SILENCE_TTFTS: Final = 8.0
"""An engine is silent after this many times its usual time to first token."""
SILENCE_LATENCIES: Final = 4.0
"""For responses that are not streamed, it is silent only after this many times its usual latency as well."""
SILENCE_PATIENCE: Final = 4.0
"""Each further attempt of a request tolerates silence for this many times as long as the previous one."""


@dataclass(frozen=True, slots=True)
class AttemptTimeouts:
    """How long an attempt may take; all in seconds."""

    first_token_s: float
    token_gap_s: float
    silence_s: float


class WatchedAttempt:
    """What the sweep needs to know about one running attempt."""

    __slots__ = (
        "attempt", "connection", "deadline_s", "first_token_came", "paused", "slot", "started_s",
        "streaming",
    )  # fmt: skip

    def __init__(
        self,
        connection: UpstreamConnection,
        slot: RequestSlot,
        *,
        deadline_s: float,
        started_s: float,
        streaming: bool,
        attempt: int,
    ) -> None:
        self.connection = connection
        self.slot = slot
        self.deadline_s = deadline_s
        self.started_s = started_s
        self.streaming = streaming
        self.attempt = attempt
        """The number of this attempt of its request, from 1."""
        self.first_token_came = False
        self.paused = False
        """The client is not reading now, so only the deadline applies."""


class TimeoutWatcher:
    """Sweeps over the running attempts of one gateway replica."""

    def __init__(self, timeouts: AttemptTimeouts) -> None:
        self._timeouts = timeouts
        self._attempts: set[WatchedAttempt] = set()

    def add(self, attempt: WatchedAttempt) -> None:
        """Watch an attempt that has begun."""
        self._attempts.add(attempt)

    def discard(self, attempt: WatchedAttempt) -> None:
        """Stop watching an attempt that has ended."""
        self._attempts.discard(attempt)

    def sweep(self, now_s: float) -> None:
        """Fail the attempts that are overdue. Call this every :data:`SWEEP_S`."""
        attempts = list(self._attempts)
        for attempt in attempts:
            load = attempt.slot.load
            if attempt.connection.last_byte_s > max(load.last_sign_s, attempt.started_s):
                load.last_sign_s = attempt.connection.last_byte_s
        silent: set[EndpointLoad] = set()
        for attempt in attempts:
            failure = self._overdue(attempt, now_s)
            if failure is not None:
                attempt.connection.fail(*failure)
            elif self._is_silent(attempt, self._patience_s(attempt), now_s):
                silent.add(attempt.slot.load)
                self._fail_silent(attempt, now_s)
        if not silent:
            return
        for attempt in attempts:
            # A response that is not streamed sends no byte before it is complete. Once a stream has shown
            # that the engine is silent, the shorter limit applies to such a response as well.
            suspect = attempt.slot.load in silent and not attempt.streaming and attempt.attempt == 1
            if suspect and self._is_silent(attempt, self._timeouts.silence_s, now_s):
                self._fail_silent(attempt, now_s)

    def _overdue(self, attempt: WatchedAttempt, now_s: float) -> tuple[AttemptFailure | None, str] | None:
        timeouts = self._timeouts
        if now_s >= attempt.deadline_s:
            return None, "the request's deadline passed"
        if attempt.paused:
            return None
        if not attempt.first_token_came:
            waited_s = now_s - attempt.started_s
            if attempt.streaming and waited_s > timeouts.first_token_s:
                return (
                    AttemptFailure.FIRST_TOKEN_TIMEOUT,
                    f"no token after {waited_s:.1f} s (first_token_timeout_s)",
                )
            return None
        gap_s = now_s - max(attempt.connection.last_byte_s, attempt.started_s)
        if gap_s > timeouts.token_gap_s:
            return AttemptFailure.TOKEN_TIMEOUT, f"no token for {gap_s:.1f} s (token_timeout_s)"
        return None

    def _is_silent(self, attempt: WatchedAttempt, patience_s: float, now_s: float) -> bool:
        return (
            not attempt.paused
            and _silence_s(attempt, now_s) > patience_s
            and _has_alternative(attempt.slot.load, now_s)
        )

    def _fail_silent(self, attempt: WatchedAttempt, now_s: float) -> None:
        kind = (
            AttemptFailure.TOKEN_TIMEOUT if attempt.first_token_came else AttemptFailure.FIRST_TOKEN_TIMEOUT
        )
        silence_s = _silence_s(attempt, now_s)
        attempt.connection.fail(
            kind, f"the engine sent no byte on any request for {silence_s:.1f} s (silence_timeout_s)"
        )

    def _patience_s(self, attempt: WatchedAttempt) -> float:
        """How long the engine may be silent. Later attempts of a request tolerate more silence, because a
        request that is slow by nature is slow on every engine."""
        load = attempt.slot.load
        usual_s = SILENCE_TTFTS * (load.ttft_s or 0.0)
        if not attempt.streaming:
            if load.latency_s is None:
                return inf
            usual_s = max(usual_s, SILENCE_LATENCIES * load.latency_s)
        return max(self._timeouts.silence_s, usual_s) * SILENCE_PATIENCE ** (attempt.attempt - 1)


def _silence_s(attempt: WatchedAttempt, now_s: float) -> float:
    """How long ago this attempt, or any other at its endpoint, last received a byte."""
    return now_s - max(attempt.slot.load.last_sign_s, attempt.connection.last_byte_s, attempt.started_s)


def _has_alternative(load: EndpointLoad, now_s: float) -> bool:
    """Whether another endpoint of the tier could take the request; if not, failing the attempt would not
    help."""
    pool = load.pool
    return pool is None or any(
        other is not load and other.ready and now_s >= other.breaker.blocked_until_s for other in pool.loads
    )
