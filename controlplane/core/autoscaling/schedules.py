"""Times of the week with other bounds on a tier's replicas, for known peaks and known quiet times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_S: Final = 86_400
_WEEK_S: Final = 7 * _DAY_S
_EPOCH_DAY: Final = 3
"""1970-01-01 was a Thursday."""
_CLOCK: Final = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)$|^24:00$")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Bounds that apply from ``start_s`` to ``end_s`` on some days; an end before the start is on the next
    day."""

    start_s: int
    """Seconds after midnight."""
    end_s: int
    days: tuple[int, ...] = tuple(range(7))
    """The days on which it starts; 0 is Monday."""
    min_replicas: int | None = None
    max_replicas: int | None = None
    utc_offset_s: int = 0
    """Offset from UTC of the local time in which ``start_s`` and ``end_s`` are given."""

    def covers(self, unix_s: float) -> bool:
        """Whether the schedule applies at that moment."""
        local_s = unix_s + self.utc_offset_s + _EPOCH_DAY * _DAY_S
        length_s = (self.end_s - self.start_s) % _DAY_S or _DAY_S
        return any((local_s - day * _DAY_S - self.start_s) % _WEEK_S < length_s for day in self.days)


def clock_s(text: str) -> int:
    """``"08:30"`` → seconds after midnight. ValueError if the text is not a time of day."""
    if not _CLOCK.match(text):
        raise ValueError(f"'{text}' is not a time of day: write it as 08:30")
    hours, minutes = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60


def bounds_at(
    schedules: Sequence[Schedule], unix_s: float, lead_s: float, lowest: int, highest: int
) -> tuple[int, int]:
    """The bounds that apply now. A scheduled minimum applies ``lead_s`` early, so that its replicas are ready
    in time; a scheduled maximum applies on time. If they conflict, the maximum wins."""
    for schedule in schedules:
        if schedule.max_replicas is not None and schedule.covers(unix_s):
            highest = min(highest, schedule.max_replicas)
    for schedule in schedules:
        if schedule.min_replicas is not None and (
            schedule.covers(unix_s) or schedule.covers(unix_s + lead_s)
        ):
            lowest = max(lowest, schedule.min_replicas)
    return min(lowest, highest), highest
