"""Numbers of replicas that a person set; they win over everything but a tier that is drained or held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Override:
    """A number that somebody set."""

    replicas: int
    reason: str
    until_unix_s: float | None = None
    """None: until somebody ends it."""


class Overrides:
    """By tier."""

    def __init__(self) -> None:
        self._set: dict[str, Override] = {}

    def set(self, tier: str, override: Override) -> bool:
        """False: it was so already."""
        if self._set.get(tier) == override:
            return False
        self._set[tier] = override
        return True

    def end(self, tier: str) -> bool:
        """False: there was none."""
        return self._set.pop(tier, None) is not None

    def expire(self, unix_s: float) -> tuple[str, ...]:
        """End those whose time is over; their tiers."""
        over = tuple(
            tier
            for tier, item in self._set.items()
            if item.until_unix_s is not None and unix_s >= item.until_unix_s
        )
        for tier in over:
            del self._set[tier]
        return over

    def of(self, tier: str) -> Override | None:
        """The tier's, if it has one."""
        return self._set.get(tier)

    def values(self) -> dict[str, Override]:
        """All overrides, by tier."""
        return dict(self._set)

    def restore(self, overrides: Mapping[str, Override]) -> None:
        """Take in the overrides from before a restart."""
        self._set.update(overrides)
