"""The store's file: one writer at a time, its schema, and what becomes of a damaged one."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import structlog

from controlplane.controller import stored_requests

log = structlog.get_logger(__name__)

CHECK_LIMIT_S: Final = 2.0
"""The file is searched for damage for at most this long; a large one not to its end."""
MAX_BROKEN_FILES: Final = 3
"""Damaged files that stay beside the new one; the oldest are deleted."""

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
    """
    CREATE TABLE aside (
        number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, unix_s REAL NOT NULL,
        reason TEXT NOT NULL, value BLOB NOT NULL
    );
    CREATE TABLE clock (unix_s REAL NOT NULL);
    """,
    stored_requests.TABLES,
    stored_requests.USAGE_TABLE,
)
"""The scripts that lead to schema version 1, 2, …; a file's version is SQLite's ``user_version``."""
_PROBES: Final = (
    "SELECT key, value FROM state LIMIT 1",
    "SELECT seq, unix_s, actor, action, target, reason, detail FROM audit LIMIT 1",
    "SELECT id, name FROM series LIMIT 1",
    "SELECT series, step_s, at_s, count, total, low, high FROM history LIMIT 1",
    "SELECT number, key, unix_s, reason, value FROM aside LIMIT 1",
    "SELECT unix_s FROM clock LIMIT 1",
    "SELECT number, unix_s, request_id, total_s, gpu_s FROM requests LIMIT 1",
    "SELECT hour_s, key, team, tier, session, requests, priced_gpu_s, last_unix_s FROM usage LIMIT 1",
)
"""They succeed if the file has the tables of its version."""


class StoreFileError(Exception):
    """The file belongs to another controller or a newer version, and is not touched."""


class StoreFile:
    """One path. Between :meth:`open` and :meth:`unlock` no other controller can open it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_file: IO[bytes] | None = None

    def open(self) -> sqlite3.Connection:
        """The database with the newest schema; a damaged file is renamed, and a new one created. Raises
        sqlite3.Error, OSError and StoreFileError."""
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            return _open_checked(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) or not path.exists():
                raise
            aside = _rename(path)
            log.critical(
                "the store's file is damaged: a new one is created", renamed_to=str(aside), error=str(error)
            )
        return _open_checked(path)

    def unlock(self) -> None:
        """Let another controller open the file."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _lock(self) -> None:
        if self._lock_file is not None:
            return
        file = self._path.with_name(self._path.name + ".lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise StoreFileError(
                "another controller writes this store: give each plane a controller.namespace or a "
                "controller.store_path of its own"
            ) from error
        except OSError as error:
            # Some network file systems have no locks.
            log.warning("can't lock the store", path=str(self._path), error=str(error))
        self._lock_file = file


def is_file_error(error: sqlite3.Error) -> bool:
    """Whether the file is full, locked, damaged or unreadable; False for a wrong statement or value."""
    own_faults = (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError)
    return not isinstance(error, own_faults)


def in_memory() -> sqlite3.Connection:
    """An empty database without a file."""
    database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _migrate(database)
    return database


def in_transaction(database: sqlite3.Connection, change: Callable[[sqlite3.Connection], None]) -> None:
    """Make the whole change, or nothing of it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        change(database)
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def _rename(path: Path) -> Path:
    """Rename a damaged file with what belongs to it; the oldest of earlier ones are deleted."""
    aside = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    earlier = sorted(path.parent.glob(f"{path.name}.broken-*"))
    for old in earlier[:-MAX_BROKEN_FILES]:
        old.unlink(missing_ok=True)
    return aside


def _open_checked(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    # Text that is no UTF-8 must not make every other row unreadable.
    database.text_factory = _text
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        _check(database)
        _migrate(database)
        _probe(database)
    except BaseException:
        database.close()
        raise
    return database


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _check(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError if damage is found within :data:`CHECK_LIMIT_S`."""
    until_s = time.monotonic() + CHECK_LIMIT_S
    database.set_progress_handler(lambda: time.monotonic() > until_s, 10_000)
    try:
        [(result,)] = database.execute("PRAGMA quick_check(1)")
    except sqlite3.OperationalError as error:
        if time.monotonic() <= until_s:
            raise
        log.info("the store's file is large: it was not searched for damage to its end", error=str(error))
        return
    finally:
        database.set_progress_handler(None, 0)
    if result != "ok":
        raise sqlite3.DatabaseError(result)


def _probe(database: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError if a table or a column is missing."""
    for query in _PROBES:
        try:
            database.execute(query).fetchone()
        except sqlite3.OperationalError as error:
            if "no such" in str(error):
                raise sqlite3.DatabaseError(str(error)) from error
            raise


def _migrate(database: sqlite3.Connection) -> None:
    [(version,)] = database.execute("PRAGMA user_version")
    if version > len(_MIGRATIONS):
        raise StoreFileError(
            f"its schema has version {version}, this tierplane knows {len(_MIGRATIONS)}: use the newer one"
        )
    if version < 0:
        raise sqlite3.DatabaseError(f"its schema has version {version}")
    for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):

        def upgrade(db: sqlite3.Connection, script: str = script, number: int = number) -> None:
            for statement in filter(str.strip, script.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")

        in_transaction(database, upgrade)
