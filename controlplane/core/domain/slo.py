"""Service-level objectives of a tier."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """The limits within which the requests of a tier should be served."""

    ttft_s: float = 3.0
    itl_s: float = 0.2
    """Time per token after the first, averaged over one request."""
    attainment: float = 0.99
    """The share of requests that must be served within all limits."""
    total_s: float = math.inf
    """From arrival to the end of the response."""
