"""What a request says about itself: how difficult it is, and how urgent."""

from __future__ import annotations

from enum import StrEnum


class Complexity(StrEnum):
    """How much model a request needs, as its caller or a scorer says."""

    SIMPLE = "simple"
    MODERATE = "moderate"
    COMPLEX = "complex"


class Priority(StrEnum):
    """Which requests go first when a tier is full."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
