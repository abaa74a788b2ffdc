"""Queries to the store's file, for the controller and for commands that read it while no plane runs."""

from __future__ import annotations

import sqlite3
from typing import Final

from controlplane.core.domain.event import Event
from controlplane.core.reports.recorded_traffic import Point

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
STEPS: Final = ((1, HOUR_S), (60, 2 * DAY_S), (600, 30 * DAY_S))
"""For each width of history points in seconds: the age in seconds up to which points have that width. Points
older than the last age are dropped."""

_WIDTHS: Final = ", ".join(str(step_s) for step_s, _ in STEPS)
_TOTAL: Final = f"""
    SELECT name, 0, sum(count), sum(total), max(high)
    FROM series CROSS JOIN history ON history.series = series.id
    WHERE name >= ?3 AND name < ?4 AND step_s IN ({_WIDTHS}) AND at_s >= ?1 AND at_s < ?2 GROUP BY name
"""  # noqa: S608 - only numbers from this module
_BY_PART: Final = f"""
    SELECT (at_s - ?1) / ?4 AS part, sum(count), sum(total), max(high) FROM history
    WHERE series = ?3 AND step_s IN ({_WIDTHS}) AND at_s >= ?1 AND at_s < ?2 GROUP BY part
"""  # noqa: S608 - only numbers from this module


def audit_since(database: sqlite3.Connection, number: int, limit: int) -> list[Event]:
    """Up to ``limit`` entries of the audit log after ``number``, oldest first. A damaged row is shown with
    what can be read of it."""
    rows = database.execute(
        "SELECT seq, CAST(unix_s AS REAL), CAST(action AS TEXT), CAST(target AS TEXT),"
        " CAST(reason AS TEXT), CAST(detail AS TEXT), CAST(actor AS TEXT) FROM audit"
        " WHERE seq > ? ORDER BY seq LIMIT ?",
        (number, limit),
    )
    return [Event(*row) for row in rows]


def last_number(database: sqlite3.Connection) -> int:
    """The number of the newest entry of the audit log; 0 if there is none."""
    return int(database.execute("SELECT coalesce(max(seq), 0) FROM audit").fetchone()[0])


def history(
    database: sqlite3.Connection, series: str, since_unix_s: float, until_unix_s: float
) -> list[Point]:
    """A series' points in [since, until), oldest first; older points are wider."""
    rows = database.execute(
        "SELECT at_s, step_s, count, CAST(total AS REAL) FROM history"
        " JOIN series ON series.id = history.series"
        " WHERE name = ? AND at_s >= ? AND at_s < ? AND typeof(count) = 'integer' AND count > 0"
        " ORDER BY at_s",
        (series, since_unix_s, until_unix_s),
    )
    return [Point(at_s, step_s, count, total / count) for at_s, step_s, count, total in rows]


def summary(
    database: sqlite3.Connection, prefix: str, since_unix_s: int, until_unix_s: int, step_s: int
) -> list[tuple[str, int, int, float, float]]:
    """Every series whose name begins with ``prefix``, added up over parts of ``step_s`` seconds from
    ``since_unix_s``: name, number of the part, count of values, their sum, the largest. A point counts where
    it begins, which has to be in [since, until)."""
    span = (since_unix_s, until_unix_s)
    names = (prefix, prefix + chr(0x10FFFF))
    if step_s >= until_unix_s - since_unix_s:
        # In the order of the index, so that SQLite does not have to sort millions of points.
        return database.execute(_TOTAL, (*span, *names)).fetchall()
    series = database.execute("SELECT name, id FROM series WHERE name >= ? AND name < ?", names)
    return [
        (name, *row)
        for name, number in series.fetchall()
        for row in database.execute(_BY_PART, (*span, number, step_s))
    ]
