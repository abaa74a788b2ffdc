"""The log of requests in the store: its tables, writing to them, thinning them out, and queries.

A gateway reports of each two seconds up to 200 requests, so the log of a plane with little traffic is
complete. What is older than :data:`THIN_AFTER_S` is thinned out to the slowest and the failed of each minute.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, fields
from typing import Any, Final

from controlplane.controller.store_reads import summary
from controlplane.core.traffic.request_log import (
    LoggedRequest,
    RequestBatch,
    RequestsView,
    SessionOrder,
    SessionsView,
    SessionUsage,
)

ENDED: Final = "requests/ended"
"""The series of the history that counts every request that has ended."""
MAX_REQUESTS: Final = 100_000
"""Requests that are stored; as many sums of one session and hour. Past it the oldest are deleted."""
MAX_AGE_S: Final = 7 * 86_400
MAX_SESSION_AGE_S: Final = 30 * 86_400
THIN_AFTER_S: Final = 600
THIN_PER_MINUTE: Final = 20
"""Requests that succeeded, and as many others, that stay of each tier and minute, the slowest."""
_THIN_FROM_S: Final = 7200
"""Requests older than this were thinned out in time, by earlier rounds."""
HOUR_S: Final = 3600

TABLES: Final = """
    CREATE TABLE requests (
        number INTEGER PRIMARY KEY, unix_s REAL NOT NULL, request_id TEXT NOT NULL, session TEXT NOT NULL,
        asked TEXT NOT NULL, tier TEXT NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL,
        api TEXT NOT NULL, stream INTEGER NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL, queued_s REAL NOT NULL,
        ttft_s REAL, total_s REAL NOT NULL, attempts INTEGER NOT NULL, resumed INTEGER NOT NULL,
        gpu_s REAL NOT NULL
    );
    CREATE INDEX requests_by_age ON requests (unix_s);
    CREATE TABLE sessions (
        session TEXT NOT NULL, hour_s INTEGER NOT NULL, requests INTEGER NOT NULL, failed INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL, gpu_s REAL NOT NULL,
        last_unix_s REAL NOT NULL, PRIMARY KEY (session, hour_s)
    ) WITHOUT ROWID;
    CREATE INDEX sessions_by_age ON sessions (hour_s);
"""

_TYPES: Final = {"str": "TEXT", "float": "REAL", "float | None": "REAL", "int": "INTEGER", "bool": "INTEGER"}
_REQUEST: Final = ", ".join(field.name for field in fields(LoggedRequest))
_READ_REQUEST: Final = ", ".join(
    f"CAST({field.name} AS {_TYPES[str(field.type)]})" for field in fields(LoggedRequest)
)
_STREAM: Final = [field.name for field in fields(LoggedRequest)].index("stream")
_INSERT_REQUEST: Final = (
    f"INSERT INTO requests ({_REQUEST}) VALUES ({', '.join('?' * len(fields(LoggedRequest)))})"  # noqa: S608
)
_ADD_SESSION: Final = """
    INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (session, hour_s) DO UPDATE SET
        requests = requests + excluded.requests, failed = failed + excluded.failed,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        generated_tokens = generated_tokens + excluded.generated_tokens,
        gpu_s = gpu_s + excluded.gpu_s, last_unix_s = max(last_unix_s, excluded.last_unix_s)
"""
_THIN: Final = """
    DELETE FROM requests WHERE number IN (
        SELECT number FROM (
            SELECT number, row_number() OVER (
                PARTITION BY CAST(unix_s / 60 AS INTEGER), tier, outcome = 'ok' ORDER BY total_s DESC
            ) AS place
            FROM requests WHERE unix_s >= ? AND unix_s < ?
        ) WHERE place > ?
    )
"""
_ORDERS: Final = {
    SessionOrder.COST: "sum(gpu_s)",
    SessionOrder.REQUESTS: "sum(requests)",
    SessionOrder.TOKENS: "sum(prompt_tokens + generated_tokens)",
}


def write(database: sqlite3.Connection, batch: RequestBatch) -> None:
    """Add what a gateway has logged."""
    database.executemany(_INSERT_REQUEST, [astuple(request) for request in batch.requests])
    database.executemany(
        _ADD_SESSION,
        [
            (
                item.session,
                int(item.last_unix_s) // HOUR_S * HOUR_S,
                item.requests,
                item.failed,
                item.prompt_tokens,
                item.generated_tokens,
                item.gpu_s,
                item.last_unix_s,
            )
            for item in batch.sessions
        ],
    )


def copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Add what another store has logged."""
    rows: Iterable[Any] = source.execute(f"SELECT {_REQUEST} FROM requests")  # noqa: S608
    target.executemany(_INSERT_REQUEST, rows)
    target.executemany(_ADD_SESSION, source.execute("SELECT * FROM sessions"))


def compact(database: sqlite3.Connection, now_unix_s: float, most: int = MAX_REQUESTS) -> None:
    """Thin out and delete what is old, and what is more than ``most`` rows."""
    database.execute(_THIN, (now_unix_s - _THIN_FROM_S, now_unix_s - THIN_AFTER_S, THIN_PER_MINUTE))
    for table, when, max_age_s in (
        ("requests", "unix_s", MAX_AGE_S),
        ("sessions", "hour_s", MAX_SESSION_AGE_S),
    ):
        database.execute(f"DELETE FROM {table} WHERE {when} < ?", (now_unix_s - max_age_s,))  # noqa: S608
        key = "number" if table == "requests" else "session, hour_s"
        database.execute(
            f"DELETE FROM {table} WHERE ({key}) IN"  # noqa: S608
            f" (SELECT {key} FROM {table} ORDER BY {when} DESC LIMIT -1 OFFSET ?)",
            (most,),
        )


def requests(
    database: sqlite3.Connection,
    since_unix_s: float,
    *,
    slow: bool = False,
    failed: bool = False,
    tier: str = "",
    session: str = "",
    limit: int = 50,
) -> RequestsView:
    """Requests that ended since then: the slowest or else the newest first. ``failed``: those that did not
    end with ``ok``; ``tier``: those that it served or that were meant for it."""
    where = "unix_s >= :since"
    if failed:
        where += " AND outcome <> 'ok'"
    if tier:
        where += " AND (tier = :tier OR asked = :tier)"
    if session:
        where += " AND session = :session"
    values = {"since": since_unix_s, "tier": tier, "session": session, "limit": limit}
    [(matching,)] = database.execute(f"SELECT count(*) FROM requests WHERE {where}", values)  # noqa: S608
    [(logged,)] = database.execute("SELECT count(*) FROM requests WHERE unix_s >= ?", (since_unix_s,))
    order = "total_s DESC, unix_s DESC" if slow else "unix_s DESC, number DESC"
    rows = database.execute(
        f"SELECT {_READ_REQUEST} FROM requests WHERE {where} ORDER BY {order} LIMIT :limit",  # noqa: S608
        values,
    )
    found = tuple(LoggedRequest(*row) for row in map(_typed, rows))
    since_s, until_s = int(since_unix_s), 2**53
    ended = sum(total for _, _, _, total, _ in summary(database, ENDED, since_s, until_s, until_s))
    return RequestsView(found, matching, logged, max(logged, int(ended)))


def _typed(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*row[:_STREAM], bool(row[_STREAM]), *row[_STREAM + 1 :])


def sessions(
    database: sqlite3.Connection, since_unix_s: float, order: SessionOrder, limit: int
) -> SessionsView:
    """The sessions of the hours since then, the largest first."""
    hour_s = int(since_unix_s) // HOUR_S * HOUR_S
    rows = database.execute(
        "SELECT CAST(session AS TEXT), CAST(sum(requests) AS INTEGER), CAST(sum(failed) AS INTEGER),"  # noqa: S608
        " CAST(sum(prompt_tokens) AS INTEGER), CAST(sum(generated_tokens) AS INTEGER),"
        " CAST(sum(gpu_s) AS REAL), CAST(max(last_unix_s) AS REAL) FROM sessions WHERE hour_s >= ?"
        f" GROUP BY session ORDER BY {_ORDERS[order]} DESC, session LIMIT ?",
        (hour_s, limit),
    )
    [(count,)] = database.execute(
        "SELECT count(DISTINCT session) FROM sessions WHERE hour_s >= ? AND session <> ''", (hour_s,)
    )
    return SessionsView(tuple(SessionUsage(*row) for row in rows), count)
