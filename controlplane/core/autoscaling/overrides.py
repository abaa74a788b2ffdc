"""Numbers of replicas set by an operator. They take precedence over everything except a tier that is drained
or held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Override:
    """A number of replicas set by an operator. The controller's store uses these field names as keys."""

    replicas: int
    reason: str
    until_unix_s: float | None = None
    """None means until an operator ends the override."""


class Overrides:
    """The overrides of all tiers."""

    def __init__(self) -> None:
        self._set: dict[str, Override] = {}

    def set(self, tier: str, override: Override) -> bool:
        """Set a tier's override. False if it is the same as before."""
        if self._set.get(tier) == override:
            return False
        self._set[tier] = override
        return True

    def end(self, tier: str) -> bool:
        """End a tier's override. False if it has none."""
        return self._set.pop(tier, None) is not None

    def expire(self, unix_s: float) -> tuple[str, ...]:
        """End the overrides whose time has passed. Returns their tiers."""
        expired = tuple(
            tier
            for tier, item in self._set.items()
            if item.until_unix_s is not None and unix_s >= item.until_unix_s
        )
        for tier in expired:
            del self._set[tier]
        return expired

    def of(self, tier: str) -> Override | None:
        """The tier's override, or None."""
        return self._set.get(tier)

    def values(self) -> dict[str, Override]:
        """All overrides, by tier."""
        return dict(self._set)

    def restore(self, overrides: Mapping[str, Override]) -> None:
        """Restore the overrides from before a restart of the controller."""
        self._set.update(overrides)
