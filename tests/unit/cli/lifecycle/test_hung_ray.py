"""Commands while Ray hangs: they stay in control, say what they wait for, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controlplane.cli.lifecycle import stopping, watched
from controlplane.cli.lifecycle.stopping import stop_plane
from controlplane.cli.lifecycle.up import Interrupts, StopRequested, _watched
from controlplane.errors import SetupError
from controlplane.ray_cluster import session
from tests.support.run_record import run_record


class Steps:
    """Records what a command reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def step(self, text: str) -> None:
        self.texts.append(text)

    def result(self, kind: str, text: str, **_: Any) -> None:
        self.texts.append(f"{kind}: {text}")

    def progress(self, tiers: object, elapsed_s: float) -> None: ...

    def event(self, event: object) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> list[int]:
    """The exit codes of processes that end without Ray's clean-up."""
    codes: list[int] = []
    monkeypatch.setattr(watched, "end_process", codes.append)
    monkeypatch.setattr(watched, "_abandoned", [])
    return codes


@pytest.fixture
def forever() -> Any:
    """Work that never ends, until the test does."""
    ended = threading.Event()
    yield ended.wait
    ended.set()


def test_the_result_and_the_error_of_the_work_are_passed_on(exits: list[int]) -> None:
    assert watched.watched(lambda: 7, lambda: None) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        watched.watched(lambda: int("x"), lambda: None)
    watched.leave(0)
    assert exits == []


def test_work_that_never_ends_is_abandoned_after_its_limit(
    forever: Callable[[], bool], exits: list[int]
) -> None:
    with pytest.raises(SetupError, match="Ray has not answered for 0 s: it hangs"):
        watched.watched(forever, lambda: None, limit_s=0.0)
    watched.leave(3)
    assert exits == [3]


def test_a_call_of_ray_that_hangs_can_be_interrupted(forever: Callable[[], bool]) -> None:
    interrupts = Interrupts()
    interrupts.count = 1
    with pytest.raises(StopRequested):
        _watched(interrupts, forever, 1e9)


def test_down_says_that_ray_hangs_and_ends_its_processes(
    monkeypatch: pytest.MonkeyPatch, exits: list[int]
) -> None:
    monkeypatch.setattr(session, "hung", lambda _: "Ray's gcs_server (process 7) is stopped")
    steps = Steps()
    stop_plane(run_record(ray_address="127.0.0.1:1"), steps, drain_s=60.0)
    assert steps.texts[0].endswith("stopping its processes: Ray's gcs_server (process 7) is stopped")
    assert steps.texts[-1].startswith("stopped: Stopped (0 processes")
    watched.leave(0)
    assert exits == [0]


def test_a_ray_that_begins_to_hang_during_the_drain_is_noticed_and_waiting_is_said(
    monkeypatch: pytest.MonkeyPatch, forever: Callable[[], bool]
) -> None:
    seen = iter(["", "", ""])
    monkeypatch.setattr(session, "hung", lambda _: next(seen, "Ray's raylet (process 7) does not answer"))
    monkeypatch.setattr(stopping, "_delete", lambda *_: forever())
    monkeypatch.setattr(stopping, "CHECK_S", 0.0)
    monkeypatch.setattr(stopping, "SHOWN_S", 0.0)
    steps = Steps()
    began_s = time.monotonic()
    stop_plane(run_record(ray_address="127.0.0.1:1"), steps, drain_s=600.0)
    assert time.monotonic() - began_s < 600.0
    assert steps.texts[0].startswith("waiting for running requests and for the engines to end, at most ")
    assert "Ray's raylet (process 7) does not answer" in "".join(steps.texts)
    assert steps.texts[-1].startswith("stopped:")


def test_down_now_does_not_wait_for_ray(monkeypatch: pytest.MonkeyPatch, forever: Callable[[], bool]) -> None:
    monkeypatch.setattr(session, "hung", lambda _: "")
    monkeypatch.setattr(stopping, "_delete", lambda *_: forever())
    hurry = iter([False, False, True])
    steps = Steps()
    stop_plane(
        run_record(ray_address="127.0.0.1:1"), steps, drain_s=600.0, stop_waiting=lambda: next(hurry, True)
    )
    assert steps.texts[0] == "not waiting any longer"
