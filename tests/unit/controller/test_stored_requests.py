"""The log of requests in the controller's store."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from controlplane.controller import stored_requests
from controlplane.controller.recorder import Recorder
from controlplane.controller.store import Store
from controlplane.controller.store_file import _MIGRATIONS
from controlplane.controller.stored_plane import StoredPlane
from controlplane.core.traffic.request_log import (
    OTHERS,
    LoggedRequest,
    RequestBatch,
    RequestsView,
    SessionOrder,
    UsageBy,
    UsageSums,
)
from tests.support.waiting import until

NOW_S = 1_800_000_000.0
ONE = LoggedRequest(
    *(NOW_S, "r0", "s", "small", "small", "e1", "auto", "chat", True, "ok", "stream", 10, 5, 0.1, 0.2, 1.0),
    *(1, 0, 0.5),
)


def batch(*requests: LoggedRequest, number: int = 1, ended: int = 0) -> RequestBatch:
    usage = tuple(
        UsageSums(
            *(each.key, each.key_name, each.team, each.tier, each.session, 1, int(each.outcome != "ok")),
            *(10, 5, each.gpu_s, 2 * each.gpu_s, 1, each.gpu_s, each.unix_s),
        )
        for each in requests
    )
    return RequestBatch(number, NOW_S, ended or len(requests), requests, usage)


def asked(store: Store, since_s: float = 0.0, **which: object) -> RequestsView:
    return store.read(lambda database: stored_requests.requests(database, since_s, **which))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def test_requests_are_found_slowest_first_failed_by_tier_and_by_session(path: Path) -> None:
    store = Store(path)
    slow = replace(ONE, request_id="slow", unix_s=NOW_S - 50, total_s=9.0, tier="large")
    failed = replace(ONE, request_id="failed", unix_s=NOW_S - 20, outcome="failed", session="t", ttft_s=None)
    old = replace(ONE, request_id="old", unix_s=NOW_S - 5000)
    store.add_requests(batch(ONE, slow, failed, old, ended=70))

    def ids(**which: object) -> list[str]:
        return [each.request_id for each in asked(store, NOW_S - 3600, **which).requests]

    assert ids() == ["r0", "failed", "slow"]
    assert ids(slow=True) == ["slow", "r0", "failed"]
    assert ids(failed=True) == ["failed"]
    assert ids(tier="large") == ["slow"]
    assert ids(session="t") == ["failed"]
    view = asked(store, NOW_S - 3600, limit=1)
    assert (view.requests, view.matching, view.logged, view.ended) == ((ONE,), 3, 3, 70)
    store.close()


def test_sessions_are_summed_over_batches_and_hours(path: Path) -> None:
    store = Store(path)
    cheap = replace(ONE, session="cheap", gpu_s=0.01)
    store.add_requests(batch(ONE, replace(ONE, unix_s=NOW_S - 4000)))
    store.add_requests(batch(ONE, cheap, cheap, replace(cheap, outcome="failed"), cheap))
    by = partial(stored_requests.sessions, since_unix_s=NOW_S - 7200, limit=10)
    costly = store.read(partial(by, order=SessionOrder.COST))
    assert [(each.session, each.requests, each.gpu_s) for each in costly.sessions] == [
        ("s", 3, 1.5),
        ("cheap", 4, 0.04),
    ]
    assert costly.sessions[1].failed == 1
    assert store.read(partial(by, order=SessionOrder.REQUESTS)).sessions[0].session == "cheap"
    assert costly.count == 2
    store.close()


def test_what_is_old_is_thinned_out_to_the_slowest_and_the_failed_then_deleted(path: Path) -> None:
    store = Store(path)
    minute_s = (NOW_S - 1800) // 60 * 60
    many = [
        replace(ONE, request_id=f"r{n}", unix_s=minute_s + n / 10, total_s=float(n), session="")
        for n in range(100)
    ]
    failed = [replace(each, request_id=f"f{n}", outcome="failed") for n, each in enumerate(many[:5])]
    gone = replace(ONE, unix_s=NOW_S - stored_requests.MAX_AGE_S - 60)
    store.add_requests(batch(*many, *failed, gone, replace(ONE, request_id="new")))
    store.compact(NOW_S)
    left = {each.request_id for each in asked(store, limit=1000).requests}
    assert left == {f"r{n}" for n in range(80, 100)} | {f"f{n}" for n in range(5)} | {"new"}
    store.close()


def test_rows_are_bounded_and_the_oldest_go(path: Path) -> None:
    store = Store(path)
    store.add_requests(
        batch(*(replace(ONE, request_id=f"r{n}", session=f"s{n}", unix_s=NOW_S - n) for n in range(50)))
    )
    store.read(lambda database: stored_requests.compact(database, NOW_S, 10))
    assert [each.request_id for each in asked(store).requests] == [f"r{n}" for n in range(10)]
    found = store.read(partial(stored_requests.sessions, since_unix_s=0, order=SessionOrder.COST, limit=100))
    assert found.count == 10
    store.close()


def test_a_batch_that_arrives_twice_counts_once(path: Path) -> None:
    recorder = Recorder(path)
    recorder.add_requests("g1", batch(ONE))
    recorder.add_requests("g1", batch(ONE))
    recorder.add_requests("g2", batch(replace(ONE, request_id="other")))
    recorder.add_requests("g1", batch(replace(ONE, request_id="next"), number=2))
    until(lambda: asked(recorder.store).logged == 3, every_s=0.002)
    recorder.close()


def test_the_log_is_read_while_no_plane_runs(path: Path) -> None:
    store = Store(path)
    store.add_requests(batch(ONE))
    store.close()
    with StoredPlane(path) as stored:
        assert stored.requests(0.0, False, False, "", "", 5).requests == (ONE,)
        assert stored.sessions(0.0, SessionOrder.TOKENS, 5).sessions[0].session == "s"


def test_what_was_logged_without_the_file_is_in_it_later(path: Path) -> None:
    path.mkdir()  # can't be opened
    clock = [0.0]
    store = Store(path, clock=lambda: clock[0])
    store.add_requests(batch(ONE))
    path.rmdir()
    clock[0] = 100.0
    store.retry()
    assert store.warning == ""
    assert asked(store).requests == (ONE,)
    store.close()


def test_a_damaged_row_hides_no_other(path: Path) -> None:
    store = Store(path)
    store.add_requests(batch(ONE, replace(ONE, request_id="r1", unix_s=NOW_S - 1)))
    store.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE requests SET total_s = 'x', tier = x'ff', stream = 'no' WHERE number = 2")
        database.commit()
    store = Store(path)
    good, bad = asked(store).requests
    assert good == ONE
    assert bad.total_s == 0.0
    store.close()


def test_usage_is_summed_by_key_team_tier_and_session_and_compared_with_the_next_tier(path: Path) -> None:
    store = Store(path)
    mine = replace(ONE, key="k1", key_name="agent", team="search", gpu_s=1.0)
    other = replace(ONE, key="k2", key_name="bot", team="mail", tier="large", session="", gpu_s=5.0)
    store.add_requests(batch(mine, mine, other, number=1))
    store.add_requests(batch(replace(mine, key_name="agent 2", unix_s=NOW_S - 7200), number=2))

    def rows(by: UsageBy, since_s: float = NOW_S - 10_000, **which: str) -> list[tuple[str, int, float]]:
        view = store.read(
            lambda database: stored_requests.usage(database, since_s, NOW_S + 1, by, **which)  # type: ignore[arg-type]
        )
        name = {"key": "key_name"}.get(by, str(by))
        return [(getattr(each, name), each.requests, each.next_tier_gpu_s) for each in view.usage]

    assert rows(UsageBy.TEAM) == [("mail", 1, 10.0), ("search", 3, 6.0)]
    assert rows(UsageBy.TIER) == [("large", 1, 10.0), ("small", 3, 6.0)]
    assert rows(UsageBy.SESSION) == [("s", 3, 6.0)]
    assert rows(UsageBy.KEY, since_s=NOW_S) == [("bot", 1, 10.0), ("agent", 2, 4.0)]
    assert rows(UsageBy.KEY, team="mail") == [("bot", 1, 10.0)]
    assert rows(UsageBy.TIER, key="k1") == [("small", 3, 6.0)]
    assert [each.request_id for each in asked(store, key="bot").requests] == ["r0"]
    assert asked(store, team="search").matching == 3
    store.close()
    with StoredPlane(path) as stored:
        assert stored.usage(0.0, NOW_S + 1, UsageBy.TEAM, "", "", 10).usage[0].team == "mail"


def test_old_sessions_are_joined_and_what_was_used_stays(path: Path) -> None:
    store = Store(path)
    old = replace(ONE, unix_s=NOW_S - stored_requests.MAX_SESSION_AGE_S - 7200)
    store.add_requests(batch(old, replace(old, session="t"), ONE))
    before = store.read(lambda database: stored_requests.usage(database, 0.0, NOW_S + 1, UsageBy.TIER))
    store.compact(NOW_S)
    after = store.read(lambda database: stored_requests.usage(database, 0.0, NOW_S + 1, UsageBy.TIER))
    assert before == after
    by_session = store.read(lambda database: stored_requests.usage(database, 0.0, NOW_S + 1, UsageBy.SESSION))
    assert [(each.session, each.requests) for each in by_session.usage] == [("s", 1)]
    store.close()


def test_sums_of_sessions_from_before_usage_was_stored_are_kept(path: Path) -> None:
    hour_s = int(NOW_S) // 3600 * 3600
    with closing(sqlite3.connect(path)) as database:
        for number, script in enumerate(_MIGRATIONS[:3], start=1):
            database.executescript(script)
            database.execute(f"PRAGMA user_version = {number}")
        add = "INSERT INTO sessions VALUES (?, ?, ?, 1, 30, 15, 1.5, ?)"
        database.executemany(add, [("s", hour_s, 3, NOW_S), ("", hour_s, 2, NOW_S)])
        database.commit()
    store = Store(path)
    assert store.warning == ""
    found = store.read(
        partial(stored_requests.sessions, since_unix_s=0.0, order=SessionOrder.REQUESTS, limit=9)
    )
    assert [(each.session, each.requests) for each in found.sessions] == [("s", 3), (OTHERS, 2)]
    store.close()
