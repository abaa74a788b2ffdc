"""Queries that the store's file answers while no plane runs: the audit log, reports, recorded traffic and
the log of requests."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final

from controlplane.controller import store_reads, stored_requests
from controlplane.controller.api import Method, P, R
from controlplane.controller.stored_figures import PREFIX, add_stored, add_stored_buckets
from controlplane.core.domain.event import Event
from controlplane.core.reports.recorded_traffic import Point
from controlplane.core.reports.report import (
    Instance,
    InstanceKind,
    PlaneReport,
    Totals,
    plane_report,
    track_step_s,
)
from controlplane.core.traffic.request_log import RequestsView, SessionOrder, SessionsView, UsageBy, UsageView
from controlplane.errors import SetupError

STORED_QUERIES: Final = frozenset({"events", "history", "plane_report", "requests", "sessions", "usage"})
"""Names of the queries that need no plane."""


class StoredPlane:
    """Reads a controller's store, and never writes to it. The queries are those of
    :class:`~controlplane.controller.api.ControllerApi` that need no plane. As a context manager, it turns
    errors of the file into SetupError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
            self._database.execute("SELECT count(*) FROM series").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise SetupError(f"the store {path} can't be read: {error}") from error

    def __enter__(self) -> StoredPlane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with closing(self._database):
            if isinstance(error, sqlite3.Error):
                raise SetupError(f"the store {self.path} can't be read: {error}") from error

    def call(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """A query by the controller's method: one of :data:`STORED_QUERIES`."""
        found: R = getattr(self, method.__name__)(*args, **kwargs)
        return found

    def events(self, after: int, limit: int) -> tuple[Event, ...]:
        """The audit log after entry number ``after``; with a negative one the last ``limit`` entries."""
        if after < 0:
            after = max(store_reads.last_number(self._database) - limit, 0)
        return tuple(store_reads.audit_since(self._database, after, limit))

    def history(
        self, series: tuple[str, ...], since_unix_s: float, until_unix_s: float
    ) -> Mapping[str, list[Point]]:
        """Stored points of series."""
        return {
            name: store_reads.history(self._database, name, since_unix_s, until_unix_s) for name in series
        }

    def requests(
        self,
        since_unix_s: float,
        slow: bool,
        failed: bool,
        tier: str,
        session: str,
        limit: int,
        key: str = "",
        team: str = "",
    ) -> RequestsView:
        """Logged requests, without a price."""
        return stored_requests.requests(
            self._database,
            since_unix_s,
            slow=slow,
            failed=failed,
            tier=tier,
            session=session,
            limit=limit,
            key=key,
            team=team,
        )

    def usage(
        self, since_unix_s: float, until_unix_s: float, by: UsageBy, key: str, team: str, limit: int
    ) -> UsageView:
        """What was used, without a price."""
        return stored_requests.usage(
            self._database, since_unix_s, until_unix_s, by, key=key, team=team, limit=limit
        )

    def sessions(self, since_unix_s: float, order: SessionOrder, limit: int) -> SessionsView:
        """The largest sessions, without a price."""
        return stored_requests.sessions(self._database, since_unix_s, order, limit)

    def tiers(self) -> tuple[str, ...]:
        """The tiers with stored figures."""
        start = f"{PREFIX}{InstanceKind.TIER}/"
        rows = self._database.execute(
            "SELECT name FROM series WHERE name >= ? AND name < ?", (start, start + chr(0x10FFFF))
        )
        return tuple(sorted({name.removeprefix(start).partition("/")[0] for (name,) in rows}))

    def plane_report(self, window_minutes: float) -> PlaneReport:
        """The report on the minutes before now. Prices and SLOs are not stored: it has no cost and no
        targets."""
        until_s = int(time.time()) + 1
        window_s = int(window_minutes * 60)
        step_s = track_step_s(window_minutes * 60)
        totals: dict[Instance, Totals] = {}
        tracks: dict[str, dict[int, Totals]] = {}
        summary = partial(store_reads.summary, self._database)
        add_stored(summary, totals, tracks, until_s - window_s, until_s, step_s, window_s + 1)
        add_stored_buckets(summary, totals, until_s - window_s, until_s, window_s + 1)
        return plane_report(
            totals,
            tracks,
            tiers=dict.fromkeys(self.tiers()),
            present=[],
            from_unix_s=until_s - window_s,
            until_unix_s=until_s,
            step_s=step_s,
        )
