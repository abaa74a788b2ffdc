"""``tierplane requests`` and ``tierplane sessions``."""

from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.cli.operating import requests as module
from controlplane.core.traffic.request_log import (
    OTHERS,
    LoggedRequest,
    RequestsView,
    SessionOrder,
    SessionsView,
    SessionUsage,
)
from tests.support.fake_plane import FakePlane

FAILED = LoggedRequest(
    *(time.time(), "req-7", "agent-3", "small", "large", "large-x1", "auto", "chat", True, "failed"),
    *("engine_failed", 1200, 80, 0.5, 0.75, 12.5, 3, 1, 7.2),
)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> FakePlane:
    fake = FakePlane(
        requests=RequestsView((FAILED,), 5, 40, 900, cost_per_gpu_hour=2.0),
        sessions=SessionsView(
            (
                SessionUsage("agent-3", 9, 1, 100, 50, 3600.0, time.time()),
                SessionUsage(OTHERS, 2, 0, 1, 1, 1.0, 0.0),
            ),
            1,
            cost_per_gpu_hour=2.0,
        ),
    )
    fake.connect(monkeypatch, module)
    return fake


def run(*words: str) -> Result:
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, done.output
    return done


def test_a_row_says_where_how_long_why_and_at_what_cost(plane: FakePlane) -> None:
    output = run("requests", "--slow", "--since", "2h", "--top", "5").output
    for text in (
        "req-7",
        "large-x1",
        "failed: engine_failed",
        "1200+80",
        "0.750",
        "12.500",
        "0.00400",
        "small",
    ):
        assert text in output
    assert "1 of 5 logged requests that match; 40 of about 900" in output
    name, since_s, *rest = plane.calls[0]
    assert (name, rest) == ("requests", [True, False, "", "", 5, "", ""])
    assert time.time() - since_s == pytest.approx(7200, abs=60)


def test_json_has_every_member_and_the_cost(plane: FakePlane) -> None:
    (each,) = json.loads(run("requests", "--failed", "--tier", "large", "--json").stdout)["requests"]
    assert each["cost"] == pytest.approx(0.004)
    assert each["reason"] == "engine_failed"
    assert plane.calls[0][2:] == (False, True, "large", "", 20, "", "")


def test_sessions_by_cost(plane: FakePlane) -> None:
    output = run("sessions", "--top", "cost", "--since", "1d").output
    assert "2.00000" in output
    assert "(others)" in output
    assert plane.calls[0][2:] == (SessionOrder.COST, 20)
    assert json.loads(run("sessions", "--by", "tokens", "--json").stdout)["sessions"][0]["cost"] == 2.0


def test_a_wrong_duration_is_refused() -> None:
    done = CliRunner().invoke(main, ["requests", "--since", "soon"])
    assert done.exit_code == 2
    assert "90s, 30m, 2h or 1d" in done.output
