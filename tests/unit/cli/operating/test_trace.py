"""A plane's own traffic, from what gateways count through the store to a simulation of it."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.cli.operating import trace as module
from controlplane.config.reports import ReportsConfig
from controlplane.controller.api import ControllerApi
from controlplane.controller.recorder import Recorder
from controlplane.controller.reports import Reports
from controlplane.controller.store import Store
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.domain.event import Event
from controlplane.core.reports.recorded_traffic import COLUMNS
from controlplane.core.traffic.counters import TrafficCounters
from controlplane.simulation.traces import read_trace
from tests.support.controller import World
from tests.support.repository import CONFIGS
from tests.support.waiting import until

CONFIG = CONFIGS / "simulated.yaml"
TIERS = ("lightweight", "balanced")


@dataclass
class Plane:
    """A controller with two tiers, a gateway and a store; it answers as the actor does."""

    path: Path

    def __post_init__(self) -> None:
        self.world = World({"n1": ["g0", "g1"]}, dict.fromkeys(TIERS, 1))
        self.world.clock.s = int(time.time()) - 3000.0
        self.recorder = Recorder(self.path)
        self.counted = {tier: TrafficCounters(tier) for tier in TIERS}
        self.away = False
        self.start("e1")

    def start(self, epoch: str) -> None:
        """A controller process, with what is stored."""
        self.world.start_controller(epoch)
        self.reports = Reports(self.world.controller, self.recorder, ReportsConfig(), 0.0)

    def step(self, seconds: int, **per_s: Any) -> None:
        """Seconds pass in which so many requests come for each tier, of 70 and 11 tokens."""
        for _ in range(seconds):
            for tier, count in per_s.items():
                known = self.counted[tier]
                self.counted[tier] = replace(
                    known,
                    arrived=known.arrived + count,
                    judged=known.judged + count,
                    ok=known.ok + count,
                    prompt_tokens=known.prompt_tokens + 70 * count,
                    generated_tokens=known.generated_tokens + 11 * count,
                )
            if not self.away:
                info = GatewayInfo("g", "n1", "", traffic=tuple(self.counted.values()))
                self.world.controller.gateway_report(info)
            self.world.step()
            self.reports.tick()

    def written(self) -> None:
        """All that was handed over is in the store."""
        self.recorder.save({"mark": self.world.clock.s})
        until(lambda: self.recorder.store.values().get("mark") == self.world.clock.s, every_s=0.002)

    def tiers(self) -> tuple[str, ...]:
        return tuple(tier.name for tier in self.world.registry.tiers)

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        assert method is ControllerApi.history
        names, since_s, until_s = args
        return {name: self.recorder.store.history(name, since_s, until_s) for name in names}


@pytest.fixture
def plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plane]:
    made = Plane(tmp_path / "store.sqlite")

    @contextmanager
    def connected(*_: object) -> Iterator[Plane]:
        made.written()
        yield made

    monkeypatch.setattr(module, "connected", connected)
    yield made
    made.recorder.close()


def trace(*words: str | Path | float) -> Result:
    return CliRunner().invoke(main, ["trace", *map(str, words)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def simulated(path: Path) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["simulate", "--trace", str(path), "--config", str(CONFIG), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_simulator_replays_the_recorded_traffic(plane: Plane, tmp_path: Path) -> None:
    plane.step(30)
    before = {tier: plane.counted[tier].arrived for tier in TIERS}
    plane.step(100, lightweight=2)
    plane.step(100, lightweight=1, balanced=3)
    plane.step(20)
    came = {tier: plane.counted[tier].arrived - before[tier] for tier in TIERS}
    path = tmp_path / "own.csv"
    done = trace("--output", path)
    assert done.exit_code == 0, done.output
    assert "lightweight: 300 requests in 24 windows that cover 0.07 h" in done.stdout
    assert list(rows(path)[0]) == list(COLUMNS)
    found = simulated(path)
    assert found["requests"] == sum(came.values()) == 600
    assert {each["tier"]: each["requests"] for each in found["tiers"]} == {**came, "capable": 0}
    arrivals = list(read_trace(path))
    assert [each.at_s for each in arrivals] == sorted(each.at_s for each in arrivals)
    for tokens, mean in (("input_tokens", 70), ("output_tokens", 11)):
        assert sum(getattr(each, tokens) for each in arrivals) == pytest.approx(mean * 600, rel=0.01)
    first = min(each.at_s for each in arrivals if each.tier == "balanced")
    begins = min(each.at_s for each in arrivals)
    assert first - begins == pytest.approx(100, abs=12), "as exact as a sample is long"


def test_a_store_that_has_merged_old_points_gives_the_same_trace(plane: Plane, tmp_path: Path) -> None:
    plane.step(30)
    plane.step(600, lightweight=1)
    plane.step(300, lightweight=1, balanced=2)
    plane.step(30)
    path, joined = tmp_path / "own.csv", tmp_path / "joined.csv"
    assert trace("--output", path).exit_code == 0
    plane.recorder.store.compact(plane.world.clock.s + 3600 + 400)
    done = trace("--output", joined, "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["requests"] == sum(int(row["requests"]) for row in rows(path)) == 1500
    assert len(rows(joined)) < len(rows(path)) / 1.5
    assert {float(row["seconds"]) > 50 for row in rows(joined)} == {True, False}, "both widths"
    covered = [sum(float(row["seconds"]) for row in rows(each)) for each in (path, joined)]
    assert covered[1] == pytest.approx(covered[0], rel=0.02)
    assert simulated(joined)["requests"] == 1500
    ends: dict[str, float] = {}
    for row in rows(joined):
        assert float(row["start_s"]) >= ends.get(row["tier"], 0.0) - 0.02, "no second is there twice"
        ends[row["tier"]] = float(row["start_s"]) + float(row["seconds"])


def test_time_without_counts_is_a_gap(plane: Plane, tmp_path: Path) -> None:
    plane.step(40, lightweight=1)
    plane.away = True
    plane.start("e2")
    plane.step(200, lightweight=1)
    plane.away = False
    plane.step(40, lightweight=1)
    path = tmp_path / "own.csv"
    assert trace("--output", path).exit_code == 0
    starts = [float(row["start_s"]) for row in rows(path)]
    assert max(later - sooner for sooner, later in pairwise(starts)) > 190
    assert sum(int(row["requests"]) for row in rows(path)) < 80


def test_the_option_hours_limits_the_period(plane: Plane, tmp_path: Path) -> None:
    plane.step(300, lightweight=1)
    path = tmp_path / "own.csv"
    hours = (time.time() - plane.world.clock.s + 100) / 3600
    assert trace("--hours", hours, "--output", path).exit_code == 0
    assert 80 <= sum(int(row["requests"]) for row in rows(path)) <= 110


def test_without_recorded_traffic_no_file_is_written(plane: Plane, tmp_path: Path) -> None:
    plane.step(40)
    path = tmp_path / "own.csv"
    done = trace("--output", path)
    assert done.exit_code == 1
    assert "no requests were counted in the last 24 h" in done.output
    assert not path.exists()
    assert trace("--hours", "0").exit_code == 2
    assert trace("--hours", "721").exit_code == 2


def test_the_trace_can_go_to_standard_output(plane: Plane) -> None:
    plane.step(60, balanced=1)
    done = trace()
    assert done.stdout.splitlines()[0] == ",".join(COLUMNS)
    assert "balanced: " in done.stderr


def test_a_file_that_cannot_be_written_is_named(plane: Plane, tmp_path: Path) -> None:
    plane.step(60, balanced=1)
    done = trace("--output", tmp_path / "no" / "own.csv")
    assert done.exit_code == 1
    assert "own.csv can't be written (No such file" in done.output


def test_without_a_plane_the_trace_and_the_report_come_from_the_store(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plane.step(90, lightweight=3, balanced=1)
    running = CliRunner().invoke(main, ["trace", "--hours", "1"])
    report = asyncio.run(plane.reports.report(60.0))
    plane.written()
    plane.recorder.close()
    monkeypatch.undo()
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
    plane.path.rename(tmp_path / "controller-tierplane.sqlite")
    stored = CliRunner().invoke(main, ["trace", "--hours", "1"])
    assert sorted(stored.stdout.splitlines()) == sorted(running.stdout.splitlines())
    assert "Reading what was stored" in stored.stderr
    shown = CliRunner().invoke(main, ["report", "--json"])
    assert shown.exit_code == 0, shown.output
    found = {tier["tier"]: tier["requests"] for tier in json.loads(shown.stdout)["tiers"]}
    assert found == {tier.tier: tier.requests for tier in report.tiers}
    refused = CliRunner().invoke(main, ["gpus"])
    assert "no plane runs here" in refused.output


def test_without_a_plane_the_events_come_from_the_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
    store = Store(tmp_path / "controller-tierplane.sqlite")
    for number in range(5):
        store.audit(Event(0, 100.0 + number, "cordon", f"GPU-{number}", "hot", "", "ada"))
    store.close()
    shown = CliRunner().invoke(main, ["events", "-n", "2", "--json"])
    assert [json.loads(line)["subject"] for line in shown.stdout.splitlines()] == ["GPU-3", "GPU-4"]
    (tmp_path / "controller-tierplane.sqlite").write_bytes(b"no database" * 99)
    assert "can't be read" in CliRunner().invoke(main, ["events"]).output
