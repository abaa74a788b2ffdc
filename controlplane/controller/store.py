"""The controller's store on disk: state that survives a restart, an audit log, and history (SQLite, WAL).

A full disk, a locked or a damaged file never stops the control plane: the store reports it (in the log, and
in :attr:`Store.warning` while the fault lasts), goes on in memory with the state and the last audit entries,
and writes them once the file can be written again (:mod:`controlplane.controller.store_file`). A value that
can't be read is put aside in a table of its own, and every other value is used.

* State: JSON values by key, such as leases and GPU health. A copy is in memory, so that reading it is cheap.
* Audit log: what was done, when and why; entry numbers are never reused.
* Log of requests: see :mod:`controlplane.controller.stored_requests`.
* History: values by series. A point is the count, sum, minimum and maximum of one second's values; older
  points are joined into minutes, then into ten minutes, then dropped (:data:`STEPS`), by a clock that a wrong
  wall clock moves only after :data:`CLOCK_DOUBT_S`.
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

from controlplane.controller import store_reads, stored_requests
from controlplane.controller.store_file import StoreFile, in_memory, in_transaction, is_file_error
from controlplane.controller.store_reads import DAY_S, STEPS
from controlplane.core.domain.event import Event
from controlplane.core.reports.recorded_traffic import Point
from controlplane.core.traffic.request_log import RequestBatch

log = structlog.get_logger(__name__)

T = TypeVar("T")

CLOCK_STEP_S: Final = DAY_S
"""A wall clock that differs by more than this from the time since the last compaction is in doubt."""
CLOCK_DOUBT_S: Final = DAY_S
"""A wall clock in doubt is believed after this long. Until then history ages by the clock from before."""
MAX_VALUE_BYTES: Final = 16 * 1024 * 1024
"""A longer value of the state is not read."""
MAX_ASIDE: Final = 1000
"""Values that are stored aside; past it the oldest are deleted."""
MAX_ASIDE_BYTES: Final = 4096
"""The part of such a value that is stored."""
MAX_SEQ: Final = 2**53
"""Audit entries with a larger number are damaged, and are deleted."""
RETRY_INITIAL_S: Final = 2.0
"""The first pause before the file is tried again; it doubles up to ``retry_interval_s``."""

_ADD_POINT: Final = """
    INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (series, step_s, at_s) DO UPDATE SET
        count = count + excluded.count, total = total + excluded.total,
        low = min(low, excluded.low), high = max(high, excluded.high)
"""


@dataclass(frozen=True, slots=True)
class _Aside:
    """A value of the state that can't be read."""

    key: bytes
    value: bytes
    reason: str

    @property
    def name(self) -> str:
        return self.key.decode("utf-8", "replace")


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
        self._retry_pause_s = min(RETRY_INITIAL_S, retry_interval_s)
        self._persistent = False
        self._known_file = False
        """Whether this object has written the file before."""
        self.warning = ""
        """Why what is stored now would not survive a restart; empty: it would."""
        self._unreadable: dict[str, str] = {}
        self._found_late: dict[str, Any] = {}
        self._doubted_s: float | None = None
        """Since when the wall clock has been in doubt."""
        self._compacted: tuple[float, float] | None = None
        """Trusted wall clock and ``clock`` at the last compaction."""
        self._database = in_memory()
        self._file = StoreFile(path) if path is not None else None
        if self._file is not None:
            try:
                self._attach(self._file)
            except Exception as error:
                # Whatever the file contains, it must not keep the controller from starting.
                self._detach(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()
            if self._file is not None:
                self._file.unlock()

    def retry(self) -> None:
        """Go back to the file if it is time to try it again. To be called every few seconds."""
        with self._lock:
            self._retry_file()

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

    def take_unreadable(self) -> dict[str, str]:
        """The values that were put aside since the last call: key → why it can't be read."""
        with self._lock:
            found, self._unreadable = self._unreadable, {}
            return found

    def take_found_late(self) -> dict[str, Any]:
        """An earlier controller's values by key, from a file that could be read only after this controller
        had begun without it; since the last call."""
        with self._lock:
            found, self._found_late = self._found_late, {}
            return found

    def put_aside(self, reasons: Mapping[str, str]) -> None:
        """Move values that mean nothing to this version out of the state; ``reasons`` by key."""
        with self._lock:
            items = [
                _Aside(key.encode(), self._state.pop(key).encode(), reason[:MAX_ASIDE_BYTES])
                for key, reason in reasons.items()
                if key in self._state
            ]
            self._write(lambda database: _write_aside(database, items))

    def aside(self) -> list[tuple[str, float, str, bytes]]:
        """The values that were put aside, oldest first: key, when, why, and its first bytes."""
        with self._lock:
            return self._read(
                lambda database: database.execute(
                    "SELECT key, unix_s, reason, value FROM aside ORDER BY number"
                ).fetchall()
            )

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
            return self._read(lambda database: store_reads.audit_since(database, number, limit))

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
        with self._lock:
            return self._read(
                lambda database: store_reads.history(database, series, since_unix_s, until_unix_s)
            )

    def summary(
        self, prefix: str, since_unix_s: int, until_unix_s: int, step_s: int
    ) -> list[tuple[str, int, int, float, float]]:
        """Every series whose name begins with ``prefix``, added up over parts of ``step_s`` seconds from
        ``since_unix_s``: name, number of the part, count of values, their sum, the largest. A point counts
        where it begins, which has to be in [since, until)."""
        with self._lock:
            return self._read(
                lambda database: store_reads.summary(database, prefix, since_unix_s, until_unix_s, step_s)
            )

    # --- log of requests -------------------------------------------------------------------------------

    def add_requests(self, batch: RequestBatch) -> None:
        """Add what a gateway has logged."""
        with self._lock:
            self._write(lambda database: stored_requests.write(database, batch))
            self.add_points(batch.unix_s, {stored_requests.ENDED: batch.ended})

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """The result of one of the queries of :mod:`controlplane.controller.stored_requests`."""
        with self._lock:
            return self._read(query)

    def compact(self, now_unix_s: float) -> None:
        """Join old points into wider ones, and drop the oldest points and audit entries. To be called every
        few minutes.

        A clock that jumps ages nothing at once: until :data:`CLOCK_DOUBT_S` have passed, the clock of the
        last compaction is used, advanced by the time that has passed since.
        """

        def write(database: sqlite3.Connection) -> None:
            trusted_s = self._trusted(database, now_unix_s)
            database.execute("DELETE FROM clock")
            database.execute("INSERT INTO clock VALUES (?)", (trusted_s,))
            for number, (step_s, max_age_s) in enumerate(STEPS):
                wider_s = STEPS[number + 1][0] if number + 1 < len(STEPS) else step_s
                before_s = int(trusted_s - max_age_s) // wider_s * wider_s
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
            most = stored_requests.MAX_REQUESTS if self._persistent else self._max_memory_points // 10
            stored_requests.compact(database, trusted_s, most)
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

    def _trusted(self, database: sqlite3.Connection, now_unix_s: float) -> float:
        """The time by which history ages; see :meth:`compact`."""
        now_s = self._clock()
        if self._compacted is not None:
            then_unix_s, then_s = self._compacted
        else:
            stored = database.execute("SELECT unix_s FROM clock").fetchone()
            then_unix_s, then_s = (float(stored[0]) if stored else now_unix_s), now_s
        expected_s = then_unix_s + now_s - then_s
        if abs(now_unix_s - expected_s) <= CLOCK_STEP_S:
            self._doubted_s, trusted_s = None, now_unix_s
        else:
            if self._doubted_s is None:
                self._doubted_s = now_s
                log.warning(
                    "the wall clock has jumped: the history ages by the clock from before for a day",
                    by_s=round(now_unix_s - expected_s),
                )
            trusted_s = now_unix_s if now_s - self._doubted_s >= CLOCK_DOUBT_S else expected_s
        self._compacted = trusted_s, now_s
        return trusted_s

    # --- the file --------------------------------------------------------------------------------------

    def _write(self, change: Callable[[sqlite3.Connection], None]) -> None:
        self._retry_file()
        try:
            in_transaction(self._database, change)
        except sqlite3.Error as error:
            self._series.clear()
            if not self._persistent or not is_file_error(error):
                raise
            self._detach(error)
            in_transaction(self._database, change)

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return query(self._database)
        except sqlite3.Error as error:
            if not self._persistent or not is_file_error(error):
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
        if self._file is None or self._persistent or self._clock() < self._retry_s:
            return
        try:
            self._attach(self._file)
        except Exception as error:
            self._plan_retry()
            log.critical("the store's file still can't be written", path=str(self._path), error=str(error))

    def _plan_retry(self) -> None:
        self._retry_s = self._clock() + self._retry_pause_s
        self._retry_pause_s = min(2 * self._retry_pause_s, self._retry_interval_s)

    def _attach(self, file: StoreFile) -> None:
        """Open the file, and merge it with what is in memory; on an error nothing has changed."""
        database = file.open()
        try:
            in_transaction(database, self._merge)
        except BaseException:
            self._series.clear()
            database.close()
            raise
        self._database.close()
        self._database, self._persistent, self._known_file = database, True, True
        self._series.clear()
        self._unsaved.clear()
        self._retry_pause_s = min(RETRY_INITIAL_S, self._retry_interval_s)
        if self.warning:
            log.warning("the store's file can be written again", path=str(self._path))
        self.warning = ""

    def _merge(self, database: sqlite3.Connection) -> None:
        """Write what happened while there was no file.

        A file that this object has written before has nothing newer than the memory. Another file may have an
        earlier controller's state, which ours overrides, and audit entries, after which ours are numbered.
        """
        in_file, unreadable = _read_state(database)
        if unreadable:
            _write_aside(database, unreadable)
        database.execute("DELETE FROM audit WHERE seq > ?", (MAX_SEQ,))
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
        if not self._persistent:
            stored_requests.copy(self._database, database)
        if not self._known_file and self.warning:
            self._found_late = {key: json.loads(text) for key, text in in_file.items()}
        self._unreadable |= {item.name: item.reason for item in unreadable}
        self._state = state
        self._recent.clear()
        self._recent.extend(recent)
        self.last_number = max(self.last_number + shift, last_seq)

    def _detach(self, error: Exception) -> None:
        """Go on in memory, with the state and the last audit entries, and report it."""
        self.warning = (
            f"{self._path} can't be used ({error}): state, audit log and history are in memory only and "
            "would be lost with the controller; free space, or repair or release the file: it is tried again "
            f"at least every {self._retry_interval_s:g} s"
        )
        log.critical("the store has failed", path=str(self._path), error=str(error), remedy=self.warning)
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._database, self._persistent = in_memory(), False
        self._series.clear()
        self._plan_retry()

        def copy(database: sqlite3.Connection) -> None:
            _write_state(database, self._state)
            _write_audit(database, self._recent)

        in_transaction(self._database, copy)


def _read_state(
    database: sqlite3.Connection,
) -> tuple[dict[str, str], list[_Aside]]:
    """The state's values that are JSON, as text by key, and those that are not."""
    texts: dict[str, str] = {}
    unreadable: list[_Aside] = []
    rows = database.execute(
        "SELECT CAST(key AS BLOB), CASE WHEN length(CAST(value AS BLOB)) <= ?1 THEN CAST(value AS BLOB) END,"
        " substr(CAST(value AS BLOB), 1, ?2) FROM state ORDER BY key",
        (MAX_VALUE_BYTES, MAX_ASIDE_BYTES),
    )
    for key, raw, beginning in rows.fetchall():
        try:
            if raw is None:
                raise ValueError(f"it has more than {MAX_VALUE_BYTES} bytes")
            text = raw.decode()
            json.loads(text)
            texts[key.decode()] = text
        except (ValueError, RecursionError) as error:
            unreadable.append(_Aside(key, beginning or b"", f"no JSON: {error}"[:200]))
    return texts, unreadable


def _write_aside(database: sqlite3.Connection, items: Iterable[_Aside]) -> None:
    """Move values out of the state; of each the first :data:`MAX_ASIDE_BYTES` are stored."""
    for item in items:
        database.execute("DELETE FROM state WHERE CAST(key AS BLOB) = ?", (item.key,))
        database.execute(
            "INSERT INTO aside (key, unix_s, reason, value) VALUES (?, ?, ?, ?)",
            (item.name[:MAX_ASIDE_BYTES], time.time(), item.reason, item.value[:MAX_ASIDE_BYTES]),
        )
    database.execute("DELETE FROM aside WHERE number <= (SELECT max(number) FROM aside) - ?", (MAX_ASIDE,))


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
