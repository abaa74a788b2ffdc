"""Properties of a request: how difficult, how urgent and how long it is, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Complexity(StrEnum):
    """How capable a model a request needs, as its caller says."""

    SIMPLE = "simple"
    MODERATE = "moderate"
    COMPLEX = "complex"


class Priority(StrEnum):
    """Which requests go first when a tier is full."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class RequestOutcome(StrEnum):
    """How a request ended; the label ``outcome`` of ``tierplane_requests_total``."""

    OK = "ok"
    """Answered in full, possibly after retries or by a resumed stream."""
    CLIENT_ERROR = "client_error"
    """The request was invalid: a status from 400 to 499 other than 408 and 429."""
    SHED = "shed"
    """Not served in time: its deadline passed or the queue was full (408, 429)."""
    DEADLINE = "deadline"
    """Not answered within the client's own deadline (408), which was shorter than the tier's SLO promises: no
    fault of the tier."""
    FAILED = "failed"
    """An engine or the gateway failed (5xx, or a stream that ended with an error)."""
    CANCELLED = "cancelled"
    """The client disconnected before the response was complete."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """The mean request of a tier."""

    input_tokens: float
    """Prompt tokens that the engine computes, so without those found in its prefix cache."""
    output_tokens: float
