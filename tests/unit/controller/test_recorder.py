"""What the recorder stores: in its thread, across a restart, and with a disk that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from controlplane.controller.recorder import Recorder
from controlplane.core.domain.event import Event
from tests.support.waiting import until


def event(number: int, kind: str = "drain") -> Event:
    return Event(number, 1000.0 + number, kind, "GPU-1", "because", "small", "operator")


def test_state_and_events_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    recorder = Recorder(path)
    recorder.save({"lease/a": {"generation": 1}, "move/a": {"phase": "retiring"}})
    recorder.save({"lease/a": {"generation": 2}})
    recorder.add_events([event(1), event(2, "uncordon")])
    recorder.add_points(1000.0, {"tier/small/serving": 2.0})
    recorder.close()
    again = Recorder(path)
    assert dict(again.state) == {"lease/a": {"generation": 2}}
    assert [(item.number, item.kind, item.actor, item.tier) for item in again.events(0, 10)] == [
        (1, "drain", "operator", "small"),
        (2, "uncordon", "operator", "small"),
    ]
    again.add_events([event(1, "later")])
    again.close()
    third = Recorder(path)
    assert [item.number for item in third.events(1, 10)] == [2, 3]
    assert [item.kind for item in third.events(-1, 1)] == ["later"]
    assert third.store.history("tier/small/serving", 0, 2000)[0].mean == 2.0
    third.close()


def test_two_controllers_never_write_one_store(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "memory.sqlite")
    with capture_logs() as logs:
        second = Recorder(tmp_path / "memory.sqlite")
    assert [line["log_level"] for line in logs] == ["critical"]
    assert "another controller writes this store" in logs[0]["error"]
    second.save({"lease/b": 1})
    second.close()
    first.save({"lease/a": 1})
    first.close()
    third = Recorder(tmp_path / "memory.sqlite")
    assert dict(third.state) == {"lease/a": 1}
    third.close()


def test_a_file_that_cannot_be_written_is_reported_and_survived(tmp_path: Path) -> None:
    folder = tmp_path / "no"
    folder.write_text("a file where a folder should be")
    recorder = Recorder(folder / "memory.sqlite")
    assert "in memory only" in recorder.warning
    recorder.save({"lease/a": 1})
    recorder.add_events([event(1)])
    until(lambda: recorder.events(0, 10), 5)
    assert [item.kind for item in recorder.events(0, 10)] == ["drain"]
    recorder.close()


def test_a_damaged_file_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    path.write_bytes(b"this is no database, " * 100)
    recorder = Recorder(path)
    recorder.save({"lease/a": 1})
    recorder.close()
    assert list(tmp_path.glob("memory.sqlite.broken-*"))
    again = Recorder(path)
    assert dict(again.state) == {"lease/a": 1}
    again.close()


def test_a_failed_write_does_not_end_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "memory.sqlite")

    def fail(values: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(recorder.store, "put", fail)
    recorder.save({"lease/a": 1})
    recorder.add_events([event(1)])
    recorder.close()
    again = Recorder(tmp_path / "memory.sqlite")
    assert [item.kind for item in again.events(0, 10)] == ["drain"]
    again.close()
