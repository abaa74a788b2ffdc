"""The tickets of :class:`controlplane.core.admission.AdmissionQueue`, and what it answers to them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from controlplane.core.domain import Priority

if TYPE_CHECKING:
    from controlplane.core.lanes import Caller, Lane, Line

BANDS: Final = (Priority.HIGH, Priority.NORMAL, Priority.LOW)
"""A priority's band is its index here: the most important first."""
BAND_OF: Final = {priority: band for band, priority in enumerate(BANDS)}


class TicketState(StrEnum):
    """How a ticket stands."""

    NEW = "new"
    WAITING = "waiting"
    SERVED = "served"
    EXPIRED = "expired"
    LEFT = "left"
    EVICTED = "evicted"


class Ticket:
    """One waiting request. Identity counts; ``payload`` is the caller's own."""

    __slots__ = (
        "arrived_s",
        "band",
        "caller",
        "cost",
        "deadline_s",
        "in_caller",
        "in_lane",
        "in_line",
        "lane",
        "needs_s",
        "payload",
        "state",
        "tiers",
    )

    def __init__(
        self,
        *,
        lane: Hashable,
        tiers: Sequence[int],
        priority: Priority,
        caller: str,
        arrived_s: float,
        deadline_s: float,
        needs_s: float = 0.0,
        cost: float = 1.0,
        payload: Any = None,
    ) -> None:
        self.lane = lane
        """Tickets with equal lanes can be served by the same endpoints."""
        self.tiers = tuple(sorted(tiers))
        """Ranks of the tiers that may serve it; for predicting the wait."""
        self.band = BAND_OF[priority]
        self.caller = caller
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.needs_s = needs_s
        """How long before its deadline it must be served to be of any use."""
        self.cost = cost
        self.payload = payload
        self.state = TicketState.NEW
        self.in_lane: Lane | None = None
        self.in_line: Line | None = None
        self.in_caller: Caller | None = None

    @property
    def priority(self) -> Priority:
        """Its priority."""
        return BANDS[self.band]


class Why(StrEnum):
    """Why a ticket was not let in."""

    FULL = "full"
    """The queue is full of what is not less important (429)."""
    HOPELESS = "hopeless"
    """It would not be served before its deadline (429)."""
    TOO_LATE = "too_late"
    """Its deadline has passed (408)."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        return 408 if self is Why.TOO_LATE else 429


class Queued(NamedTuple):
    """The ticket waits."""

    wait_s: float | None
    """The predicted wait; None: nothing is known yet of how fast the tiers are."""
    evicted: Ticket | None = None
    """Who had to go for it: to be answered 429 with ``retry_after_s``."""
    retry_after_s: float = 0.0


class Rejected(NamedTuple):
    """The ticket was not let in."""

    why: Why
    retry_after_s: float
    """When a retry would find a place, as far as the observed speed tells."""
    wait_s: float | None = None
