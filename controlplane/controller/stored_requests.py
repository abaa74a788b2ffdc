"""The log of requests in the store: its tables, writing to them, thinning them out, and queries.

A gateway reports of each two seconds up to 200 requests, so the log of a plane with little traffic is
complete. What is older than :data:`THIN_AFTER_S` is thinned out to the slowest and the failed of each minute.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, fields
from typing import Any, Final

from controlplane.controller.store_reads import summary
from controlplane.core.traffic.request_log import (
    OTHERS,
    LoggedRequest,
    RequestBatch,
    RequestsView,
    SessionOrder,
    SessionsView,
    SessionUsage,
    UsageBy,
    UsageSums,
    UsageView,
)

ENDED: Final = "requests/ended"
"""The series of the history that counts every request that has ended."""
MAX_REQUESTS: Final = 100_000
"""Requests that are stored, and sums of sessions by hour. Past it the oldest requests are deleted, and the
oldest sums joined."""
MAX_AGE_S: Final = 7 * 86_400
MAX_SESSION_AGE_S: Final = 30 * 86_400
"""What is older is kept by key, team and tier only."""
MAX_USAGE_AGE_S: Final = 400 * 86_400
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

USAGE_TABLE: Final = """
    ALTER TABLE requests ADD COLUMN key TEXT NOT NULL DEFAULT '';
    ALTER TABLE requests ADD COLUMN key_name TEXT NOT NULL DEFAULT '';
    ALTER TABLE requests ADD COLUMN team TEXT NOT NULL DEFAULT '';
    CREATE TABLE usage (
        hour_s INTEGER NOT NULL, key TEXT NOT NULL, key_name TEXT NOT NULL, team TEXT NOT NULL,
        tier TEXT NOT NULL, session TEXT NOT NULL, requests INTEGER NOT NULL, failed INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL, gpu_s REAL NOT NULL,
        next_tier_gpu_s REAL NOT NULL, priced_requests INTEGER NOT NULL, priced_gpu_s REAL NOT NULL,
        last_unix_s REAL NOT NULL, PRIMARY KEY (hour_s, key, team, tier, session)
    ) WITHOUT ROWID;
    INSERT INTO usage SELECT hour_s, '', '', '', '', CASE session WHEN '' THEN '(others)' ELSE session END,
        requests, failed, prompt_tokens, generated_tokens, gpu_s, 0, 0, 0, last_unix_s FROM sessions;
    DROP TABLE sessions;
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
_USAGE: Final = ", ".join(field.name for field in fields(UsageSums))
_ADDED: Final = """
    ON CONFLICT (hour_s, key, team, tier, session) DO UPDATE SET
        key_name = excluded.key_name,
        requests = requests + excluded.requests, failed = failed + excluded.failed,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        generated_tokens = generated_tokens + excluded.generated_tokens,
        gpu_s = gpu_s + excluded.gpu_s, next_tier_gpu_s = next_tier_gpu_s + excluded.next_tier_gpu_s,
        priced_requests = priced_requests + excluded.priced_requests,
        priced_gpu_s = priced_gpu_s + excluded.priced_gpu_s,
        last_unix_s = max(last_unix_s, excluded.last_unix_s)
"""
_ADD_USAGE: Final = (
    f"INSERT INTO usage (hour_s, {_USAGE}) VALUES ({', '.join('?' * (len(fields(UsageSums)) + 1))}){_ADDED}"  # noqa: S608
)
_SUMS: Final = """
    CAST(sum(requests) AS INTEGER), CAST(sum(failed) AS INTEGER), CAST(sum(prompt_tokens) AS INTEGER),
    CAST(sum(generated_tokens) AS INTEGER), CAST(sum(gpu_s) AS REAL), CAST(sum(next_tier_gpu_s) AS REAL),
    CAST(sum(priced_requests) AS INTEGER), CAST(sum(priced_gpu_s) AS REAL), CAST(max(last_unix_s) AS REAL)
"""
_JOIN_SESSIONS: Final = (
    "INSERT INTO usage SELECT hour_s, key, max(key_name), team, tier, '', sum(requests), sum(failed),"  # noqa: S608
    " sum(prompt_tokens), sum(generated_tokens), sum(gpu_s), sum(next_tier_gpu_s), sum(priced_requests),"
    " sum(priced_gpu_s), max(last_unix_s) FROM usage WHERE session <> '' AND (hour_s < ? OR last_unix_s <= ?)"
    f" GROUP BY hour_s, key, team, tier{_ADDED}"
)
_COLUMNS: Final = {
    UsageBy.KEY: "key, max(key_name), team, '', ''",
    UsageBy.TEAM: "'', '', team, '', ''",
    UsageBy.TIER: "'', '', '', tier, ''",
    UsageBy.SESSION: "'', '', team, '', session",
}
_GROUPS: Final = {
    UsageBy.KEY: "key, team",
    UsageBy.TEAM: "team",
    UsageBy.TIER: "tier",
    UsageBy.SESSION: "session, team",
}
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
        _ADD_USAGE,
        [(int(item.last_unix_s) // HOUR_S * HOUR_S, *astuple(item)) for item in batch.usage],
    )


def copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Add what another store has logged."""
    rows: Iterable[Any] = source.execute(f"SELECT {_REQUEST} FROM requests")  # noqa: S608
    target.executemany(_INSERT_REQUEST, rows)
    target.executemany(_ADD_USAGE, source.execute("SELECT * FROM usage"))


def compact(database: sqlite3.Connection, now_unix_s: float, most: int = MAX_REQUESTS) -> None:
    """Thin out and delete what is old, and what is more than ``most`` rows."""
    database.execute(_THIN, (now_unix_s - _THIN_FROM_S, now_unix_s - THIN_AFTER_S, THIN_PER_MINUTE))
    database.execute("DELETE FROM requests WHERE unix_s < ?", (now_unix_s - MAX_AGE_S,))
    database.execute(
        "DELETE FROM requests WHERE number IN"
        " (SELECT number FROM requests ORDER BY unix_s DESC LIMIT -1 OFFSET ?)",
        (most,),
    )
    database.execute("DELETE FROM usage WHERE hour_s < ?", (now_unix_s - MAX_USAGE_AGE_S,))
    beyond = database.execute(
        "SELECT last_unix_s FROM usage WHERE session <> '' ORDER BY last_unix_s DESC LIMIT 1 OFFSET ?",
        (most,),
    ).fetchone()
    old = now_unix_s - MAX_SESSION_AGE_S, beyond[0] if beyond is not None else -1.0
    database.execute(_JOIN_SESSIONS, old)
    database.execute("DELETE FROM usage WHERE session <> '' AND (hour_s < ? OR last_unix_s <= ?)", old)


def requests(
    database: sqlite3.Connection,
    since_unix_s: float,
    *,
    slow: bool = False,
    failed: bool = False,
    tier: str = "",
    session: str = "",
    limit: int = 50,
    key: str = "",
    team: str = "",
) -> RequestsView:
    """Requests that ended since then: the slowest or else the newest first. ``failed``: those that did not
    end with ``ok``; ``tier``: those that it served or that were meant for it; ``key`` is an id or a name."""
    where = "unix_s >= :since"
    if failed:
        where += " AND outcome <> 'ok'"
    if tier:
        where += " AND (tier = :tier OR asked = :tier)"
    if session:
        where += " AND session = :session"
    if key:
        where += " AND (key = :key OR key_name = :key)"
    if team:
        where += " AND team = :team"
    values: dict[str, Any] = {"since": since_unix_s, "tier": tier, "session": session, "limit": limit}
    values |= {"key": key, "team": team}
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
        " CAST(sum(gpu_s) AS REAL), CAST(max(last_unix_s) AS REAL), CAST(team AS TEXT)"
        " FROM usage WHERE hour_s >= ? AND session <> ''"
        f" GROUP BY session, team ORDER BY {_ORDERS[order]} DESC, session, team LIMIT ?",
        (hour_s, limit),
    )
    found = tuple(SessionUsage(*row) for row in rows)
    [(count,)] = database.execute(
        "SELECT count(*) FROM (SELECT DISTINCT session, team FROM usage"
        " WHERE hour_s >= ? AND session NOT IN ('', ?))",
        (hour_s, OTHERS),
    )
    return SessionsView(found, count)


def usage(
    database: sqlite3.Connection,
    since_unix_s: float,
    until_unix_s: float,
    by: UsageBy,
    *,
    key: str = "",
    team: str = "",
    limit: int = 1000,
) -> UsageView:
    """What was used from the hour of ``since_unix_s`` to that of ``until_unix_s``, the most GPU time first.
    ``key`` (an id or a name) and ``team``: only what they have used."""
    from_s = int(since_unix_s) // HOUR_S * HOUR_S
    until_s = math.ceil(until_unix_s / HOUR_S) * HOUR_S
    where = "hour_s >= :from_s AND hour_s < :until_s"
    if key:
        where += " AND (key = :key OR key_name = :key)"
    if team:
        where += " AND team = :team"
    if by is UsageBy.SESSION:
        where += " AND session <> ''"
    rows = database.execute(
        f"SELECT {_COLUMNS[by]}, {_SUMS} FROM usage WHERE {where} GROUP BY {_GROUPS[by]}"  # noqa: S608
        f" ORDER BY sum(gpu_s) DESC, {_GROUPS[by]} LIMIT :limit",
        {"from_s": from_s, "until_s": until_s, "key": key, "team": team, "limit": limit},
    )
    return UsageView(by, tuple(UsageSums(*row) for row in rows), from_s, until_s)
