"""A circuit breaker per endpoint: it stops requests to an endpoint that fails repeatedly, and after a pause
lets one request through as a probe.

The life cycle is a transition table; an event without an entry raises :class:`IllegalTransition` and changes
nothing. Time comes from the caller as ``now_s`` (monotonic).

On the request path the breaker costs one comparison: an endpoint may be used when
``now_s >= breaker.blocked_until_s``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Final

from controlplane.errors import IllegalTransition


class BreakerState(StrEnum):
    """The state of a breaker."""

    CLOSED = "closed"
    """All requests go through."""
    OPEN = "open"
    """No request goes through until the pause is over."""
    HALF_OPEN = "half_open"
    """One request goes through, the probe; its result decides."""


class BreakerEvent(StrEnum):
    """What changes a breaker's state."""

    TRIP = "trip"
    """Too many failures."""
    PROBE = "probe"
    """The pause is over and one request goes out."""
    PASS = "pass"  # noqa: S105 (an event, not a password)
    """The probe got tokens."""
    FAIL = "fail"
    """The probe failed."""
    ABANDON = "abandon"
    """The probe's client disconnected before the probe passed or failed."""


TRANSITIONS: Final[dict[tuple[BreakerState, BreakerEvent], BreakerState]] = {
    (BreakerState.CLOSED, BreakerEvent.TRIP): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerEvent.PROBE): BreakerState.HALF_OPEN,
    # A probe without a result must not block the endpoint for good: after its time-out another may go out.
    (BreakerState.HALF_OPEN, BreakerEvent.PROBE): BreakerState.HALF_OPEN,
    (BreakerState.HALF_OPEN, BreakerEvent.PASS): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, BreakerEvent.FAIL): BreakerState.OPEN,
    (BreakerState.HALF_OPEN, BreakerEvent.ABANDON): BreakerState.OPEN,
}


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When a breaker opens, and for how long."""

    consecutive_failures: int = 3
    """The breaker opens after this many failures in a row …"""
    failure_ratio: float = 0.5
    """… or when this share of the window's requests failed, if there were at least ``min_requests``."""
    min_requests: int = 20
    window_s: float = 10.0
    open_initial_s: float = 1.0
    """The first pause; it doubles each time a probe fails, up to ``open_max_s``."""
    open_max_s: float = 30.0
    probe_timeout_s: float = 30.0
    """After this long without a report, a probe no longer blocks other requests."""


class Breaker:
    """One endpoint's breaker. Call ``start`` when a request goes out, then one of ``success``, ``failure``
    and ``abandoned`` with the value that ``start`` returned."""

    __slots__ = (
        "_bucket_since_s",
        "_consecutive",
        "_failures",
        "_old_failures",
        "_old_total",
        "_pause_s",
        "_probe",
        "_total",
        "blocked_until_s",
        "settings",
        "state",
    )

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        self.settings = settings or BreakerSettings()
        self.state = BreakerState.CLOSED
        self.blocked_until_s = -inf
        """Nothing goes through before this moment."""
        self._pause_s = self.settings.open_initial_s
        self._probe = 0
        self._consecutive = 0
        self._reset_counts(-inf)

    def start(self, now_s: float) -> int:
        """Records that a request goes out. Returns its number if it is a probe, 0 for an ordinary request.

        Raises :class:`IllegalTransition` if no request may go through now.
        """
        if self.state is BreakerState.CLOSED:
            return 0
        if now_s < self.blocked_until_s:
            raise IllegalTransition(f"the breaker is {self.state} until {self.blocked_until_s:.3f} s")
        self._transition(BreakerEvent.PROBE)
        self._probe += 1
        self.blocked_until_s = now_s + self.settings.probe_timeout_s
        return self._probe

    def success(self, now_s: float, probe: int = 0) -> None:
        """Records that a request got tokens, or its whole response."""
        if self.state is BreakerState.CLOSED:
            self._consecutive = 0
            if now_s - self._bucket_since_s >= self.settings.window_s:
                self._rotate(now_s)
            self._total += 1
        elif self.state is BreakerState.HALF_OPEN and probe == self._probe:
            self._transition(BreakerEvent.PASS)
            self.blocked_until_s = -inf
            self._pause_s = self.settings.open_initial_s
            self._reset_counts(now_s)
        # Otherwise the request went out before the breaker opened, and says nothing about the current state.

    def failure(self, now_s: float, probe: int = 0, weight: int = 1) -> None:
        """Records that a request failed through the endpoint's fault. It counts as ``weight`` failures in a
        row: a refused connection is stronger evidence than a slow response."""
        if self.state is BreakerState.CLOSED:
            if now_s - self._bucket_since_s >= self.settings.window_s:
                self._rotate(now_s)
            self._total += 1
            self._failures += 1
            self._consecutive += weight
            if self._too_many(now_s):
                self._transition(BreakerEvent.TRIP)
                self._open(now_s)
        elif self.state is BreakerState.HALF_OPEN and probe == self._probe:
            self._transition(BreakerEvent.FAIL)
            self._pause_s = min(self._pause_s * 2, self.settings.open_max_s)
            self._open(now_s)

    def abandoned(self, now_s: float, probe: int = 0) -> None:
        """Records that a request ended without evidence about the endpoint. If it was the probe, another may
        go out."""
        if self.state is BreakerState.HALF_OPEN and probe == self._probe:
            self._transition(BreakerEvent.ABANDON)
            self.blocked_until_s = now_s

    def _transition(self, event: BreakerEvent) -> None:
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise IllegalTransition(f"a breaker that is {self.state} has no transition '{event}'")
        self.state = target

    def _open(self, now_s: float) -> None:
        self.blocked_until_s = now_s + self._pause_s
        self._reset_counts(now_s)

    def _reset_counts(self, now_s: float) -> None:
        self._bucket_since_s = now_s
        self._consecutive = self._total = self._failures = self._old_total = self._old_failures = 0

    def _rotate(self, now_s: float) -> None:
        """Begins a new bucket. The window spans two buckets; the older one counts in proportion to its
        overlap."""
        recent = now_s - self._bucket_since_s < 2 * self.settings.window_s
        self._old_total = self._total if recent else 0
        self._old_failures = self._failures if recent else 0
        self._total = self._failures = 0
        self._bucket_since_s = now_s

    def _too_many(self, now_s: float) -> bool:
        if self._consecutive >= self.settings.consecutive_failures:
            return True
        rest = max(0.0, 1.0 - (now_s - self._bucket_since_s) / self.settings.window_s)
        total = self._total + rest * self._old_total
        failures = self._failures + rest * self._old_failures
        return total >= self.settings.min_requests and failures >= self.settings.failure_ratio * total
