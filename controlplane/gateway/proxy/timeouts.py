"""Time-outs of running exchanges, by one sweep instead of a timer each.

An exchange is failed when its deadline passes, when its first byte or the next one is overdue, or when
its engine is silent: it owes tokens and gives no byte on *any* request for much longer than it usually
takes. The last one finds engines that are half alive (health answers, tokens don't come) without waiting
for the limits that slow but honest requests need.
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
"""Silence is measured against this many usual times to first token …"""
SILENCE_LATENCIES: Final = 4.0
"""… and, for answers that come in one piece, this many usual latencies."""
SILENCE_PATIENCE: Final = 4.0
"""Each further attempt of a request is given so many times as much of it."""


@dataclass(frozen=True, slots=True)
class AttemptTimeouts:
    """How long an exchange may take; all in seconds."""

    first_token_s: float
    token_gap_s: float
    silence_s: float


class WatchedAttempt:
    """One exchange under watch."""

    __slots__ = (
        "answered",
        "attempt",
        "connection",
        "deadline_s",
        "held",
        "slot",
        "started_s",
        "streaming",
    )

    def __init__(
        self,
        connection: UpstreamConnection,
        slot: RequestSlot,
        *,
        deadline_s: float,
        started_s: float,
        streaming: bool,
        attempt: int = 1,
    ) -> None:
        self.connection = connection
        self.slot = slot
        self.deadline_s = deadline_s
        self.started_s = started_s
        self.streaming = streaming
        self.attempt = attempt
        """Which attempt of its request it is, from 1."""
        self.answered = False
        """The first token came."""
        self.held = False
        """The client takes nothing at present, so the engine is not waited for."""


class TimeoutWatcher:
    """Sweeps over the running exchanges of one gateway replica."""

    def __init__(self, limits: AttemptTimeouts) -> None:
        self._limits = limits
        self._watches: set[WatchedAttempt] = set()

    def add(self, watch: WatchedAttempt) -> None:
        """Begin to watch."""
        self._watches.add(watch)

    def discard(self, watch: WatchedAttempt) -> None:
        """It ended."""
        self._watches.discard(watch)

    def sweep(self, now_s: float) -> None:
        """Fail what is overdue; to be called every :data:`SWEEP_S`."""
        watches = list(self._watches)
        for watch in watches:
            load = watch.slot.load
            if watch.connection.last_byte_s > max(load.sign_s, watch.started_s):
                load.sign_s = watch.connection.last_byte_s
        hung: set[EndpointLoad] = set()
        for watch in watches:
            verdict = self._overdue(watch, now_s)
            if verdict is not None:
                watch.connection.fail(*verdict)
            elif self._silent(watch, self._patience_s(watch), now_s):
                hung.add(watch.slot.load)
                self._fail_silent(watch, now_s)
        for watch in watches if hung else ():
            # An answer in one piece shows no life before it is whole: there a stream is the witness.
            alike = watch.slot.load in hung and not watch.streaming and watch.attempt == 1
            if alike and self._silent(watch, self._limits.silence_s, now_s):
                self._fail_silent(watch, now_s)

    def _overdue(self, watch: WatchedAttempt, now_s: float) -> tuple[AttemptFailure | None, str] | None:
        limits = self._limits
        if now_s >= watch.deadline_s:
            return None, "the request's deadline passed"
        if watch.held:
            return None
        last_s = max(watch.connection.last_byte_s, watch.started_s)
        if not watch.answered:
            waited_s = now_s - watch.started_s
            if watch.streaming and waited_s > limits.first_token_s:
                return (
                    AttemptFailure.FIRST_TOKEN_TIMEOUT,
                    f"no token after {waited_s:.1f} s (first_token_timeout_s)",
                )
        elif now_s - last_s > limits.token_gap_s:
            return AttemptFailure.TOKEN_TIMEOUT, f"no token for {now_s - last_s:.1f} s (token_timeout_s)"
        return None

    def _silent(self, watch: WatchedAttempt, patience_s: float, now_s: float) -> bool:
        load = watch.slot.load
        return not watch.held and _silence_s(watch, now_s) > patience_s and _has_alternative(load, now_s)

    def _fail_silent(self, watch: WatchedAttempt, now_s: float) -> None:
        kind = AttemptFailure.TOKEN_TIMEOUT if watch.answered else AttemptFailure.FIRST_TOKEN_TIMEOUT
        told = f"the engine gave no byte on any request for {_silence_s(watch, now_s):.1f} s"
        watch.connection.fail(kind, f"{told} (silence_timeout_s)")

    def _patience_s(self, watch: WatchedAttempt) -> float:
        """How much silence is too much. A request that met it before is given more: if it is honestly
        slow, it is so everywhere."""
        load = watch.slot.load
        usual_s = SILENCE_TTFTS * (load.ttft_s or 0.0)
        if not watch.streaming:
            if load.latency_s is None:
                return inf
            usual_s = max(usual_s, SILENCE_LATENCIES * load.latency_s)
        return max(self._limits.silence_s, usual_s) * SILENCE_PATIENCE ** (watch.attempt - 1)


def _silence_s(watch: WatchedAttempt, now_s: float) -> float:
    """For how long neither this exchange nor any other of its endpoint gave a byte."""
    return now_s - max(watch.slot.load.sign_s, watch.connection.last_byte_s, watch.started_s)


def _has_alternative(load: EndpointLoad, now_s: float) -> bool:
    """Another endpoint of the tier could take over: only then is impatience any use."""
    pool = load.pool
    return pool is None or any(
        other is not load and other.ready and now_s >= other.breaker.blocked_until_s for other in pool.loads
    )
