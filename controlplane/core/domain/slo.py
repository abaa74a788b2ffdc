"""Service-level objectives of a tier."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """What the requests of a tier are promised."""

    ttft_s: float = 3.0
    itl_s: float = 0.2
    """Time per token, mean of one request."""
    attainment: float = 0.99
    """The share of requests that must get all of it."""
    total_s: float = math.inf
    """From arrival to the end of the answer."""
