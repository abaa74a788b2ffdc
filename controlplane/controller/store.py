"""The controller's store on disk: state that survives a restart, an audit log, and history (SQLite, WAL).

A full disk or a damaged file never stops the control plane: the store reports it (in the log, and in
:attr:`Store.warning` while the fault lasts), goes on in memory with the state and the last audit entries, and
writes them once the file can be written again. A damaged file is renamed and stays beside the new one.

* State: JSON values by key, such as leases and GPU health. A copy is in memory, so that reading it is cheap.
* Audit log: what was done, when and why; entry numbers are never reused.
* History: values by series. A point is the count, sum, minimum and maximum of one second's values; older
  points are joined into minutes, then into ten minutes, then dropped (:data:`STEPS`).
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from controlplane.core.domain.event import Event

log = structlog.get_logger(__name__)

T = TypeVar("T")

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
STEPS: Final = ((1, HOUR_S), (60, 2 * DAY_S), (600, 30 * DAY_S))
"""For each width of history points in seconds: the age in seconds up to which points have that width. Points
older than the last age are dropped."""

_MIGRATIONS: Final = (
    """
    CREATE TABLE state (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY, unix_s REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
        target TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL
    );
    CREATE TABLE series (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE history (
        series INTEGER NOT NULL, step_s INTEGER NOT NULL, at_s INTEGER NOT NULL,
        count INTEGER NOT NULL, total REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL,
        PRIMARY KEY (series, step_s, at_s)
    ) WITHOUT ROWID;
    CREATE INDEX history_by_age ON history (step_s, at_s);
    """,
)
"""The scripts that lead to schema version 1, 2, …; a file's version is SQLite's ``user_version``."""

_ADD_POINT: Final = """
    INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (series, step_s, at_s) DO UPDATE SET
        count = count + excluded.count, total = total + excluded.total,
        low = min(low, excluded.low), high = max(high, excluded.high)
"""

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


@dataclass(frozen=True, slots=True)
class Point:
    """The values of a series in the ``step_s`` seconds from ``unix_s``."""

    unix_s: int
    step_s: int
    count: int
    mean: float


class Store:
    """One controller's store; any thread may use it. With ``path`` None it is in memory only."""

    def __init__(
        self,
        path: Path | None,
        *,
        retry_interval_s: float = 30.0,
        max_audit_entries: int = 100_000,
        max_memory_points: int = 200_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._retry_interval_s = retry_interval_s
        self._max_audit_entries = max_audit_entries
        self._max_memory_points = max_memory_points
        self._clock = clock
        self._lock = threading.RLock()
        self._state: dict[str, str] = {}
        self._recent: deque[Event] = deque(maxlen=1000)
        self._unsaved: deque[Event] = deque(maxlen=10_000)
        self.last_number = 0
        """The number of the newest audit entry; 0 if there is none."""
        self._series: dict[str, int] = {}
        self._retry_s = float("inf")
        self._persistent = False
        self._known_file = False
        """Whether this object has written the file before."""
        self.warning = ""
        """Why what is stored now would not survive a restart; empty: it would."""
        self._database = _in_memory()
        if path is not None:
            try:
                self._attach(path)
            except (sqlite3.Error, OSError, _NewerSchemaError) as error:
                self._detach(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    # --- state -----------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """All values by key."""
        with self._lock:
            return {key: json.loads(text) for key, text in self._state.items()}

    def put(self, values: Mapping[str, Any]) -> None:
        """Set keys, all or none; a value of None removes its key."""
        texts = {key: None if value is None else json.dumps(value) for key, value in values.items()}
        with self._lock:
            changed = {key: text for key, text in texts.items() if self._state.get(key) != text}
            if not changed:
                return
            for key, text in changed.items():
                if text is None:
                    self._state.pop(key)
                else:
                    self._state[key] = text
            self._write(lambda database: _write_state(database, changed))

    # --- audit -----------------------------------------------------------------------------------------

    def audit(self, event: Event) -> Event:
        """Add an entry; returns it with the number that it has in the log."""
        with self._lock:
            self._retry_file()
            self.last_number += 1
            numbered = replace(event, number=self.last_number)
            self._recent.append(numbered)
            try:
                self._write(lambda database: _write_audit(database, [numbered]))
            except sqlite3.Error:
                self._recent.pop()
                self.last_number -= 1
                raise
            if not self._persistent:
                self._unsaved.append(numbered)
            return numbered

    def audit_since(self, number: int = 0, limit: int = 1000) -> list[Event]:
        """Up to ``limit`` entries after ``number``, oldest first."""
        with self._lock:
            if self._recent and number >= self._recent[0].number - 1:
                return [event for event in self._recent if event.number > number][:limit]

            def read(database: sqlite3.Connection) -> list[Event]:
                rows = database.execute(
                    "SELECT seq, unix_s, action, target, reason, detail, actor FROM audit"
                    " WHERE seq > ? ORDER BY seq LIMIT ?",
                    (number, limit),
                )
                return [Event(*row) for row in rows]

            return self._read(read)

    # --- history ---------------------------------------------------------------------------------------

    def add_points(self, unix_s: float, values: Mapping[str, float]) -> None:
        """Add one value to each series; values that are not finite are dropped."""
        at_s = int(unix_s)
        with self._lock:

            def write(database: sqlite3.Connection) -> None:
                rows = [
                    (self._series_id(database, name), 1, at_s, 1, value, value, value)
                    for name, value in values.items()
                    if math.isfinite(value)
                ]
                database.executemany(_ADD_POINT, rows)

            self._write(write)

    def history(self, series: str, since_unix_s: float, until_unix_s: float) -> list[Point]:
        """A series' points in [since, until), oldest first; older points are wider."""

        def read(database: sqlite3.Connection) -> list[Point]:
            rows = database.execute(
                "SELECT at_s, step_s, count, total FROM history"
                " JOIN series ON series.id = history.series"
                " WHERE name = ? AND at_s >= ? AND at_s < ? ORDER BY at_s",
                (series, since_unix_s, until_unix_s),
            )
            return [Point(at_s, step_s, count, total / count) for at_s, step_s, count, total in rows]

        with self._lock:
            return self._read(read)

    def summary(
        self, prefix: str, since_unix_s: int, until_unix_s: int, step_s: int
    ) -> list[tuple[str, int, int, float, float]]:
        """Every series whose name begins with ``prefix``, added up over parts of ``step_s`` seconds from
        ``since_unix_s``: name, number of the part, count of values, their sum, the largest. A point counts
        where it begins, which has to be in [since, until)."""

        def read(database: sqlite3.Connection) -> list[tuple[str, int, int, float, float]]:
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

        with self._lock:
            return self._read(read)

    def compact(self, now_unix_s: float) -> None:
        """Join old points into wider ones, and drop the oldest points and audit entries. To be called every
        few minutes."""

        def write(database: sqlite3.Connection) -> None:
            for number, (step_s, max_age_s) in enumerate(STEPS):
                wider_s = STEPS[number + 1][0] if number + 1 < len(STEPS) else step_s
                before_s = int(now_unix_s - max_age_s) // wider_s * wider_s
                if wider_s != step_s:
                    database.execute(
                        "INSERT INTO history SELECT series, ?1, at_s / ?1 * ?1, sum(count), sum(total),"
                        " min(low), max(high) FROM history WHERE step_s = ?2 AND at_s < ?3"
                        " GROUP BY series, at_s / ?1"
                        " ON CONFLICT (series, step_s, at_s) DO UPDATE SET count = count + excluded.count,"
                        " total = total + excluded.total, low = min(low, excluded.low),"
                        " high = max(high, excluded.high)",
                        (wider_s, step_s, before_s),
                    )
                database.execute("DELETE FROM history WHERE step_s = ? AND at_s < ?", (step_s, before_s))
            database.execute(
                "DELETE FROM audit WHERE seq <= ?", (self.last_number - self._max_audit_entries,)
            )
            if not self._persistent:
                database.execute(
                    "DELETE FROM history WHERE (series, step_s, at_s) IN (SELECT series, step_s, at_s"
                    " FROM history ORDER BY at_s DESC LIMIT -1 OFFSET ?)",
                    (self._max_memory_points,),
                )
            database.execute(
                "DELETE FROM series WHERE NOT EXISTS (SELECT 1 FROM history WHERE series = series.id)"
            )
            self._series.clear()

        with self._lock:
            self._write(write)

    # --- the file --------------------------------------------------------------------------------------

    def _write(self, change: Callable[[sqlite3.Connection], None]) -> None:
        self._retry_file()
        try:
            _in_transaction(self._database, change)
        except sqlite3.Error as error:
            self._series.clear()
            if not self._persistent or not _is_file_error(error):
                raise
            self._detach(error)
            _in_transaction(self._database, change)

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return query(self._database)
        except sqlite3.Error as error:
            if not self._persistent or not _is_file_error(error):
                raise
            self._detach(error)
        return query(self._database)

    def _series_id(self, database: sqlite3.Connection, name: str) -> int:
        if name not in self._series:
            database.execute("INSERT OR IGNORE INTO series (name) VALUES (?)", (name,))
            [row] = database.execute("SELECT id FROM series WHERE name = ?", (name,))
            self._series[name] = row[0]
        return self._series[name]

    def _retry_file(self) -> None:
        """Go back to the file if it is time to try again and it can be written."""
        if self._path is None or self._persistent or self._clock() < self._retry_s:
            return
        try:
            self._attach(self._path)
        except (sqlite3.Error, OSError, _NewerSchemaError) as error:
            self._retry_s = self._clock() + self._retry_interval_s
            log.critical("the store's file still can't be written", path=str(self._path), error=str(error))

    def _attach(self, path: Path) -> None:
        """Open the file, and merge it with what is in memory; on an error nothing has changed."""
        database = _open(path)
        try:
            _in_transaction(database, self._merge)
        except BaseException:
            self._series.clear()
            database.close()
            raise
        self._database.close()
        self._database, self._persistent, self._known_file = database, True, True
        self._series.clear()
        self._unsaved.clear()
        if self.warning:
            log.warning("the store's file can be written again", path=str(path))
        self.warning = ""

    def _merge(self, database: sqlite3.Connection) -> None:
        """Write what happened while there was no file.

        A file that this object has written before has nothing newer than the memory. Another file may have an
        earlier controller's state, which ours overrides, and audit entries, after which ours are numbered.
        """
        in_file = dict(database.execute("SELECT key, value FROM state"))
        [(last_seq,)] = database.execute("SELECT coalesce(max(seq), 0) FROM audit")
        state = dict(self._state) if self._known_file else {**in_file, **self._state}
        _write_state(database, {key: None for key in in_file if key not in state})
        _write_state(database, {key: text for key, text in state.items() if in_file.get(key) != text})
        shift = 0 if self._known_file else last_seq
        recent, unsaved = (
            [replace(event, number=event.number + shift) for event in events]
            for events in (self._recent, self._unsaved)
        )
        _write_audit(database, [*recent, *unsaved])
        self._series.clear()
        names = dict(self._database.execute("SELECT id, name FROM series")) if not self._persistent else {}
        for series, *point in self._database.execute("SELECT * FROM history").fetchall() if names else ():
            database.execute(_ADD_POINT, (self._series_id(database, names[series]), *point))
        self._state = state
        self._recent.clear()
        self._recent.extend(recent)
        self.last_number = max(self.last_number + shift, last_seq)

    def _detach(self, error: Exception) -> None:
        """Go on in memory, with the state and the last audit entries, and report it."""
        self.warning = (
            f"{self._path} can't be used ({error}): state, audit log and history are in memory only and "
            "would be lost with the controller; free space or repair the file: it is tried again every "
            f"{self._retry_interval_s:g} s"
        )
        log.critical("the store has failed", path=str(self._path), error=str(error), remedy=self.warning)
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._database, self._persistent = _in_memory(), False
        self._series.clear()
        self._retry_s = self._clock() + self._retry_interval_s

        def copy(database: sqlite3.Connection) -> None:
            _write_state(database, self._state)
            _write_audit(database, self._recent)

        _in_transaction(self._database, copy)


class _NewerSchemaError(Exception):
    """The file was written by a newer version, and is not touched."""


def _is_file_error(error: sqlite3.Error) -> bool:
    """Whether the file is full, locked, damaged or unreadable; False for a wrong statement or value."""
    own_faults = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError)
    return not isinstance(error, own_faults)


def _open(path: Path) -> sqlite3.Connection:
    """The file's database with the newest schema; a damaged file is renamed, and a new one created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _open_checked(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) or not path.exists():
            raise
        aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}")
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        log.critical(
            "the store's file is damaged: a new one is created", renamed_to=str(aside), error=str(error)
        )
    return _open_checked(path)


def _open_checked(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        [(result,)] = database.execute("PRAGMA quick_check(1)")
        if result != "ok":
            raise sqlite3.DatabaseError(result)
        _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _in_memory() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _migrate(database)
    return database


def _migrate(database: sqlite3.Connection) -> None:
    [(version,)] = database.execute("PRAGMA user_version")
    if version > len(_MIGRATIONS):
        raise _NewerSchemaError(
            f"its schema has version {version}, this tierplane knows {len(_MIGRATIONS)}: use the newer one"
        )
    for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):

        def upgrade(db: sqlite3.Connection, script: str = script, number: int = number) -> None:
            for statement in filter(str.strip, script.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")

        _in_transaction(database, upgrade)


def _in_transaction(database: sqlite3.Connection, change: Callable[[sqlite3.Connection], None]) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        change(database)
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def _write_state(database: sqlite3.Connection, texts: Mapping[str, str | None]) -> None:
    for key, text in texts.items():
        if text is None:
            database.execute("DELETE FROM state WHERE key = ?", (key,))
        else:
            database.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, text))


def _write_audit(database: sqlite3.Connection, events: Iterable[Event]) -> None:
    database.executemany(
        "INSERT OR REPLACE INTO audit VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (item.number, item.unix_s, item.actor, item.kind, item.subject, item.reason, item.tier)
            for item in events
        ],
    )
