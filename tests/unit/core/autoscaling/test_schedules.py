from __future__ import annotations

import pytest

from controlplane.core.autoscaling.schedules import Schedule, bounds_at, clock_s

MONDAY_UNIX_S = 1_767_571_200.0
HOUR_S = 3600.0


def at(day: int, hour: float) -> float:
    return MONDAY_UNIX_S + day * 24 * HOUR_S + hour * HOUR_S


WORKDAYS = Schedule(clock_s("08:00"), clock_s("18:00"), days=(0, 1, 2, 3, 4), min_replicas=4)
NIGHT = Schedule(clock_s("22:00"), clock_s("06:00"), days=(4,), max_replicas=2)


@pytest.mark.parametrize(
    ("schedule", "day", "hour", "covered"),
    [
        (WORKDAYS, 0, 7.99, False),
        (WORKDAYS, 0, 8.0, True),
        (WORKDAYS, 4, 17.99, True),
        (WORKDAYS, 4, 18.0, False),
        (WORKDAYS, 5, 12.0, False),
        (NIGHT, 4, 23.0, True),
        (NIGHT, 5, 5.9, True),
        (NIGHT, 5, 23.0, False),
        (NIGHT, 4, 5.0, False),
        (Schedule(0, clock_s("24:00"), days=(6,)), 6, 23.9, True),
        (Schedule(0, clock_s("24:00"), days=(6,)), 0, 0.0, False),
    ],
)
def test_when_a_schedule_applies(schedule: Schedule, day: int, hour: float, covered: bool) -> None:
    assert schedule.covers(at(day, hour)) is covered


def test_the_utc_offset() -> None:
    shifted = Schedule(clock_s("08:00"), clock_s("09:00"), utc_offset_s=3600, min_replicas=1)
    assert shifted.covers(at(2, 7.5))
    assert not shifted.covers(at(2, 8.5))


def test_a_minimum_begins_one_cold_start_early_and_a_maximum_on_time() -> None:
    before = at(0, 8.0) - 300
    assert bounds_at((WORKDAYS,), before, 200, 1, 10) == (1, 10)
    assert bounds_at((WORKDAYS,), before, 400, 1, 10) == (4, 10)
    assert bounds_at((NIGHT,), at(4, 22.0) - 1, 400, 1, 10) == (1, 10)
    assert bounds_at((NIGHT,), at(4, 22.0), 400, 3, 10) == (2, 2)


@pytest.mark.parametrize("text", ["8:00", "25:00", "08:60", "", "24:01"])
def test_invalid_times_of_day(text: str) -> None:
    with pytest.raises(ValueError, match="not a time of day"):
        clock_s(text)
