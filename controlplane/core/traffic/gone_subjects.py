"""Subjects of counts that have left, whose last counts stay for a while."""

from __future__ import annotations

from collections.abc import Iterable, Set


class GoneSubjects:
    """Since when each subject has been gone. The clock is that of ``now_s``."""

    def __init__(self) -> None:
        self._gone_s: dict[str, float] = {}

    def take_expired(self, gone: Set[str], now_s: float, *, keep_s: float, most: int) -> Iterable[str]:
        """The subjects to drop: of all that are ``gone`` now, those that left at least ``keep_s`` ago, and
        the first that left if there are more than ``most``. They are forgotten here, and so is a subject that
        has come back."""
        self._gone_s = {name: at_s for name, at_s in self._gone_s.items() if name in gone}
        for name in sorted(gone - self._gone_s.keys()):
            self._gone_s[name] = now_s
        excess = len(self._gone_s) - most
        expired = [
            name
            for number, (name, at_s) in enumerate(self._gone_s.items())
            if number < excess or now_s - at_s >= keep_s
        ]
        for name in expired:
            del self._gone_s[name]
        return expired
