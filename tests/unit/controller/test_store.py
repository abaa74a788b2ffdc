from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controlplane.controller.store import Store
from controlplane.controller.store_file import MAX_BROKEN_FILES, StoreFile
from controlplane.controller.store_reads import DAY_S
from controlplane.core.domain.event import Event
from controlplane.core.reports.recorded_traffic import Point

ENTRY = Event(0, 1.0, kind="cordon", subject="GPU-a", reason="XID 79")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store.sqlite"


def test_state_and_audit_survive(path: Path) -> None:
    with closing(Store(path)) as store:
        store.put({"lease/a": {"gpus": ["GPU-a"]}, "lease/b": 1, "gpu/x": "healthy"})
        store.put({"lease/b": None})
        assert [store.audit(ENTRY).number, store.audit(replace(ENTRY, kind="drain")).number] == [1, 2]
        assert store.warning == ""
    with closing(Store(path)) as store:
        assert [key for key in store.values() if key.startswith("lease/")] == ["lease/a"]
        assert store.values().get("lease/a") == {"gpus": ["GPU-a"]}
        assert store.values().get("lease/b") is None
        assert store.audit(replace(ENTRY, kind="move")).number == 3
        assert [entry.kind for entry in store.audit_since(0)] == ["cordon", "drain", "move"]
        assert [entry.number for entry in store.audit_since(1, limit=1)] == [2]
        assert store.audit_since(3) == []


def test_committed_state_survives_kill_9(path: Path) -> None:
    """Committed state is there after kill -9, without a close."""
    script = (
        "import os, sys; from pathlib import Path; from controlplane.controller.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.put({'lease': 'stored'}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -9
    with closing(Store(path)) as store:
        assert (store.values().get("lease"), store.warning) == ("stored", "")


def test_history_becomes_wider_with_age(path: Path) -> None:
    now = 1_800_000_000
    with closing(Store(path)) as store:
        for age_s in (40 * DAY_S, 3 * DAY_S, 3 * DAY_S - 30, 7200, 7199, 10):
            store.add_points(now - age_s, {"gpu": float(age_s), "bad": float("nan")})
        store.add_points(now - 10, {"gpu": 20.0})
        store.compact(now)
        before = store.history("gpu", 0, now)
        store.compact(now)
        assert store.history("gpu", 0, now) == before, "compacting again changes nothing"
        assert [(point.step_s, point.count) for point in before] == [(600, 2), (60, 2), (1, 2)]
        assert before[-1] == Point(now - 10, 1, 2, 15.0)
        assert before[0].mean == 3 * DAY_S - 15
        [(*_, high)] = store.summary("gpu", before[0].unix_s, before[0].unix_s + 600, 600)
        assert high == 3 * DAY_S
        assert all(point.unix_s % point.step_s == 0 for point in before)
        assert store.history("bad", 0, now) == store.history("other", 0, now) == []
        late = 7200 * 3
        store.add_points(now - late, {"gpu": 1.0})
        store.add_points(now - late, {"gpu": 3.0})
        store.compact(now)
        [joined] = store.history("gpu", now - late - 60, now - late + 60)
        store.add_points(now - late, {"gpu": 5.0})
        store.compact(now)
        [joined] = store.history("gpu", now - late - 60, now - late + 60)
        assert (joined.step_s, joined.count, joined.mean) == (60, 3, 3.0)
        assert store.summary("gpu", joined.unix_s, joined.unix_s + 60, 60) == [("gpu", 0, 3, 9.0, 5.0)]


@pytest.mark.parametrize("jump_s", [10 * 365 * DAY_S, -10 * 365 * DAY_S, 40 * DAY_S])
def test_a_clock_that_jumps_drops_no_history(path: Path, jump_s: int) -> None:
    """Also if the process is restarted while the clock is wrong; a day later the clock is believed."""
    now, clock = 1_800_000_000, Clock()
    with closing(Store(path, clock=clock)) as store:
        store.add_points(now - 20 * DAY_S, {"gpu": 1.0})
        store.add_points(now - 10, {"gpu": 2.0})
        store.compact(now)
        clock.now_s = 300.0
        store.add_points(now + 300 + jump_s, {"gpu": 3.0})
        store.compact(now + 300 + jump_s)
        assert len(store.history("gpu", 0, now)) == 2
    with closing(Store(path, clock=clock)) as store:
        store.compact(now + 600 + jump_s)
        assert [point.step_s for point in store.history("gpu", 0, now)] == [600, 1]
        clock.now_s += DAY_S / 2
        store.compact(now + jump_s + DAY_S // 2)
        assert len(store.history("gpu", 0, now)) == 2
        store.compact(now + DAY_S // 2 + 300)
        assert len(store.history("gpu", 0, now)) == 2, "the clock is right again"


def test_a_clock_is_believed_after_a_day(path: Path) -> None:
    """A plane that was stopped for two months drops its history once its clock was right for a day."""
    now, clock = 1_800_000_000, Clock()
    with closing(Store(path, clock=clock)) as store:
        store.add_points(now - 10, {"gpu": 2.0})
        store.compact(now)
    later = now + 60 * DAY_S
    with closing(Store(path, clock=clock)) as store:
        store.compact(later)
        assert store.history("gpu", 0, now)
        clock.now_s += DAY_S + 1
        store.compact(later + DAY_S + 1)
        assert not store.history("gpu", 0, now)


def test_old_audit_entries_are_dropped(path: Path) -> None:
    with closing(Store(path, max_audit_entries=5)) as store:
        for _ in range(12):
            store.audit(ENTRY)
        store.compact(0)
    with closing(Store(path, max_audit_entries=5)) as store:
        assert [entry.number for entry in store.audit_since(0)] == [8, 9, 10, 11, 12]


def test_in_memory_history_is_bounded() -> None:
    with closing(Store(None, max_memory_points=10)) as store:
        for second in range(100):
            store.add_points(second, {"a": second})
        store.compact(100)
        assert [point.unix_s for point in store.history("a", 0, 100)] == list(range(90, 100))


def garbage(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is no database " * 1000)


def torn(path: Path) -> None:
    """A database whose middle part was overwritten."""
    with closing(Store(path)) as store:
        for number in range(2000):
            store.audit(replace(ENTRY, tier="x" * 50, unix_s=number))
    raw = bytearray(path.read_bytes())
    raw[4096 : len(raw) - 4096] = b"\xa5" * (len(raw) - 8192)
    path.write_bytes(raw)


def header(path: Path) -> None:
    """A database whose first bytes were overwritten."""
    torn(path)
    raw = bytearray(path.read_bytes())
    raw[:100] = b"\x00" * 100
    path.write_bytes(raw)


def cut(path: Path) -> None:
    """A database of which half was written."""
    with closing(Store(path)) as store:
        for number in range(2000):
            store.audit(replace(ENTRY, tier="x" * 50, unix_s=number))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_table(path: Path) -> None:
    Store(path).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE state")


@pytest.mark.parametrize("break_it", [garbage, torn, header, cut, without_a_table])
def test_a_damaged_file_is_renamed(
    path: Path, break_it: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(path)
    with closing(Store(path)) as store:
        assert store.warning == ""
        store.put({"a": 1})
    [aside] = path.parent.glob("store.sqlite.broken-*")
    assert aside.stat().st_size > 0
    assert "broken" in capsys.readouterr().out
    with closing(Store(path)) as store:
        assert store.values().get("a") == 1


def test_only_the_last_damaged_files_stay(path: Path) -> None:
    for number in range(MAX_BROKEN_FILES + 2):
        path.parent.mkdir(exist_ok=True)
        path.with_name(f"{path.name}.broken-2020010{number}T000000").write_bytes(b"x")
    path.write_bytes(b"this is no database")
    with closing(Store(path)) as store:
        assert store.warning == ""
    assert len(list(path.parent.glob("store.sqlite.broken-*"))) == MAX_BROKEN_FILES


def test_a_large_file_is_searched_for_damage_for_a_bounded_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Store(path)) as store:
        for number in range(3000):
            store.audit(replace(ENTRY, tier="x" * 500, unix_s=number))
    monkeypatch.setattr("controlplane.controller.store_file.CHECK_LIMIT_S", -1.0)
    with closing(Store(path)) as store:
        assert (store.warning, store.last_number) == ("", 3000)


def test_a_file_that_fails_is_tried_again_with_growing_pauses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    tries = []
    with closing(Store(tmp_path / "file" / "db", retry_interval_s=8, clock=clock)) as store:
        opened = StoreFile.open

        def counted(file: StoreFile) -> sqlite3.Connection:
            tries.append(clock.now_s)
            return opened(file)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoreFile, "open", counted)
            for second in range(40):
                clock.now_s = second
                store.retry()
    assert tries == [2, 6, 14, 22, 30, 38]


def test_a_file_that_is_damaged_while_it_is_used(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with closing(Store(path, retry_interval_s=30, clock=clock)) as store:
        store.put({"lease": "a"})
        for number in range(500):
            store.audit(replace(ENTRY, tier="x" * 200, unix_s=number))
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        other.close()
        raw = bytearray(path.read_bytes())
        raw[:] = b"\xa5" * len(raw)
        path.write_bytes(raw)
        for number in range(2000):
            store.audit(replace(ENTRY, tier="y" * 200, unix_s=number))
            if store.warning:
                break
        assert "in memory only" in store.warning
        assert store.values().get("lease") == "a"
        number = store.audit(ENTRY).number
        clock.now_s = 31
        store.put({"lease": "b"})
        assert store.warning == ""
    assert list(path.parent.glob("store.sqlite.broken-*"))
    with closing(Store(path)) as store:
        assert store.values().get("lease") == "b"
        assert store.audit_since(number - 1)[0].number == number
    assert "can be written again" in capsys.readouterr().out


def test_a_folder_that_can_not_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = Clock()
    with closing(Store(tmp_path / "file" / "store.sqlite", retry_interval_s=5, clock=clock)) as store:
        assert "file/store.sqlite can't be used" in store.warning
        store.put({"lease": 1})
        store.audit(ENTRY)
        store.add_points(7, {"a": 1.0})
        assert store.values() == {"lease": 1}
        assert (len(store.audit_since(0)), len(store.history("a", 0, 9))) == (1, 1)
        clock.now_s = 6
        store.put({"lease": 2})
        assert store.warning, "still no folder"
        (tmp_path / "file").unlink()
        clock.now_s = 12
        store.put({"lease": 3})
        assert store.warning == ""
    with closing(Store(tmp_path / "file" / "store.sqlite")) as store:
        assert store.values().get("lease") == 3
        assert [entry.number for entry in store.audit_since(0)] == [1]
        assert store.history("a", 0, 9) == [Point(7, 1, 1, 1.0)]


def test_an_earlier_controllers_file_that_appears_late_is_merged(tmp_path: Path) -> None:
    """A controller that started without the file does not overwrite its contents."""
    path = tmp_path / "store" / "db"
    with closing(Store(path)) as store:
        store.put({"lease/old": 1, "gpu": "old"})
        store.audit(replace(ENTRY, kind="earlier"))
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "store").write_text("")
    clock = Clock()
    with closing(Store(path, retry_interval_s=5, clock=clock)) as store:
        store.put({"gpu": "new"})
        store.audit(replace(ENTRY, kind="meanwhile"))
        (tmp_path / "store").unlink()
        (tmp_path / "away").rename(tmp_path / "store")
        clock.now_s = 6
        assert store.audit(replace(ENTRY, kind="later")).number == 3
        assert (store.values().get("lease/old"), store.values().get("gpu")) == (1, "new")
    with closing(Store(path)) as store:
        assert [(entry.number, entry.kind) for entry in store.audit_since(0)] == [
            (1, "earlier"),
            (2, "meanwhile"),
            (3, "later"),
        ]


def test_a_file_of_a_newer_schema_is_not_touched(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    with closing(Store(path)) as store:
        assert "its schema has version 99, this tierplane knows 4" in store.warning
        store.put({"a": 1})
    assert path.read_bytes() == before


FULL_DISK = """
import resource, signal, sys
from dataclasses import replace
from pathlib import Path
from controlplane.controller.store import Store
from controlplane.core.domain.event import Event

path, now = Path(sys.argv[1]), [0.0]
entry = Event(0, 1.0, "cordon", "GPU-a", "XID 79", "x" * 500)
store = Store(path, retry_interval_s=30, clock=lambda: now[0])
store.put({"lease": "before"})
# no file may grow past this: every write beyond it fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
written = 0
while not store.warning and written < 5000:
    written += 1
    store.audit(entry)
assert 20 < written < 5000, written
assert "in memory only" in store.warning, store.warning
store.put({"lease": "during", "new": 1})
for _ in range(20):
    last = store.audit(entry)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # not even a checkpoint
now[0] = 31.0
store.put({"still": "full"})
assert store.warning
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
now[0] = 62.0
store.put({"lease": "after"})
assert not store.warning, store.warning
store.close()
again = Store(path)
assert again.values() == {"lease": "after", "new": 1, "still": "full"}
numbers = [entry.number for entry in again.audit_since(0, limit=10**6)]
assert numbers == list(range(1, last.number + 1)), (len(numbers), numbers[:3], numbers[-3:], last.number)
print("entries", len(numbers))
"""


def test_a_full_disk_loses_nothing(path: Path) -> None:
    """A limit on the file size stands in for the full disk: the write calls of the process really fail."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the store has failed" in done.stdout


def test_a_value_that_json_can_not_hold_raises(path: Path) -> None:
    no_json: Any = object()
    with closing(Store(path)) as store:
        with pytest.raises(TypeError):
            store.put({"a": no_json})
        with pytest.raises(sqlite3.ProgrammingError):
            store.audit(replace(ENTRY, tier=no_json))
        assert store.audit(ENTRY).number == 1
        assert store.warning == ""


def test_threads_share_it(path: Path) -> None:
    with closing(Store(path)) as store:

        def work(name: str) -> None:
            for number in range(50):
                store.put({name: number})
                store.audit(replace(ENTRY, actor=name))
                store.add_points(number, {name: 1.0})

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [entry.number for entry in store.audit_since(0)] == list(range(1, 201))
        assert {store.values().get(name) for name in "abcd"} == {49}


def test_a_summary_adds_up_series_by_part_over_points_of_any_width(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "store.sqlite")) as store:
        for second in range(0, 1200, 10):
            store.add_points(6000 + second, {"a/x": 1.0, "a/y": float(second), "b/x": 5.0})
        fresh = store.summary("a/", 6000, 7200, 600)
        assert fresh == [
            ("a/x", 0, 60, 60.0, 1.0),
            ("a/x", 1, 60, 60.0, 1.0),
            ("a/y", 0, 60, sum(range(0, 600, 10)), 590.0),
            ("a/y", 1, 60, sum(range(600, 1200, 10)), 1190.0),
        ]
        assert store.summary("a/x", 6000, 6600, 2**40) == [("a/x", 0, 60, 60.0, 1.0)]
        for age_s in (7200, 3 * DAY_S):
            store.compact(7200 + age_s)
            assert store.summary("a/", 6000, 7200, 600) == fresh
        assert store.summary("c/", 0, 2**40, 600) == []


def test_the_name_of_a_series_goes_with_its_last_point(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "store.sqlite")) as store:
        store.add_points(1000, {"gone/x": 1.0})
        store.compact(1000 + 31 * DAY_S)
        store.add_points(2000 + 31 * DAY_S, {"here/x": 1.0})
        assert [name for (name,) in store._database.execute("SELECT name FROM series")] == ["here/x"]
        store.add_points(2000 + 31 * DAY_S, {"gone/x": 2.0})
        assert store.history("gone/x", 0, 2**40)[0].mean == 2.0
