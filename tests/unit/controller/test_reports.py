"""Reports from memory, from the store and from both are equal, even after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from controlplane.config.reports import ReportsConfig
from controlplane.controller.recorder import Recorder
from controlplane.controller.reports import Reports
from controlplane.controller.stored_figures import add_stored_buckets
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.reports.report import Instance, InstanceKind, PlaneReport, Totals
from controlplane.core.traffic.counters import LATENCY_BOUNDS_S, TrafficCounters
from tests.support.controller import HEARTBEAT_S, World
from tests.support.waiting import until

START_S = 1_800_000_000.0
COST = 2.0


class Plane:
    """A controller of two replicas with a GPU each, a gateway that serves, and their reports."""

    def __init__(self, path: Path | None, **settings: Any) -> None:
        self.world = World({"n1": ["g0", "g1"]}, {"small": 2})
        self.world.clock.s = START_S
        self.path = path
        self.settings = ReportsConfig(**settings)
        self.served = TrafficCounters("small")
        self.start()

    def start(self, epoch: str = "e1") -> None:
        """Start a controller process on the stored state."""
        self.world.start_controller(epoch)
        self.recorder = Recorder(self.path)
        self.reports = Reports(self.world.controller, self.recorder, self.settings, COST)

    def step(self, count: int = 1, requests: int = 0) -> None:
        for _ in range(count):
            known = self.served
            self.served = replace(
                known,
                arrived=known.arrived + requests,
                judged=known.judged + requests,
                missed=known.missed + (requests > 3),
                ok=known.ok + requests,
                generated_tokens=known.generated_tokens + 10 * requests,
                latency_s=known.latency_s + 0.25 * requests,
                latency_max_s=0.1 * requests,
                waiting=requests,
            )
            one = next(iter(self.world.registry.endpoints), "")
            traffic = (self.served, replace(self.served, subject=one))
            self.world.controller.gateway_report(GatewayInfo("g", "n1", "", traffic=traffic))
            self.world.step()
            self.reports.tick()

    def work(self, seconds: int) -> None:
        for second in range(seconds):
            self.step(requests=(second // 100) % 7)

    def written(self) -> None:
        """Wait until everything queued is in the store."""
        self.recorder.save({"mark": self.world.clock.s})
        until(lambda: self.recorder.store.values().get("mark") == self.world.clock.s, every_s=0.002)


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    made = Plane(tmp_path / "store.sqlite")
    yield made
    made.recorder.close()


def comparable(found: PlaneReport) -> dict[str, Any]:
    """All figures, to the precision in which sums of parts agree."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [rounded(each) for each in value]
        return float(f"{value:.9g}") if isinstance(value, float) else value

    result: dict[str, Any] = rounded(asdict(found))
    return result


async def test_percentiles_are_in_the_right_bucket_also_after_a_restart(
    plane: Plane,
) -> None:
    counts, first = ([0] * len(LATENCY_BOUNDS_S) for _ in range(2))
    counts[LATENCY_BOUNDS_S.index(0.5)] = 90
    counts[LATENCY_BOUNDS_S.index(7.5)] = 10
    first[LATENCY_BOUNDS_S.index(0.1)] = 100
    plane.step(60)
    plane.served = replace(plane.served, latency_counts=tuple(counts), ttft_counts=tuple(first))
    plane.step(requests=100)
    plane.step(20)
    plane.written()
    for again in (False, True):
        if again:
            plane.recorder.close()
            plane.start("e2")
        [tier] = (await plane.reports.report(60)).tiers
        assert 250 <= (tier.latency_p50_ms or 0) <= 500
        assert 5000 <= (tier.latency_p95_ms or 0) <= (tier.latency_p99_ms or 0) <= 7500
        assert 50 <= (tier.ttft_p50_ms or 0) <= (tier.ttft_p99_ms or 0) <= 100
    names = [name for name, *_ in plane.recorder.store.summary("histogram/", 0, 2**40, 2**40)]
    assert len(names) == 3, "only buckets with requests are stored"
    store = plane.recorder.store
    totals = {Instance(InstanceKind.TIER, "small", "small"): Totals()}
    add_stored_buckets(store.summary, totals, 0, 2**40, 2**40)
    assert totals.popitem()[1].quantile_ms("latency_counts", 0.5) == tier.latency_p50_ms


async def test_what_was_served_is_reported_per_tier_and_endpoint(plane: Plane) -> None:
    registry = plane.world.registry
    registry.declare([replace(spec, attainment=0.8) for spec in registry.tiers], HEARTBEAT_S)
    plane.step(60)
    served = plane.served.ok
    plane.step(100, requests=4)
    plane.step(20)
    found = await plane.reports.report(60)
    [tier] = found.tiers
    assert (tier.instance, tier.gone) == ("small", False)
    assert tier.requests == plane.served.ok - served == 400
    assert tier.latency_mean_ms == pytest.approx(250.0)
    assert tier.latency_max_ms == pytest.approx(400.0)
    assert tier.attainment == pytest.approx(0.75)
    assert (tier.slo_target, tier.slo_missed) == (0.8, True)
    assert tier.requests_per_s == pytest.approx(400 / tier.covered_s)
    assert 140 < tier.covered_s <= 180
    assert tier.queue_max == 4
    assert 0 < (tier.availability or 0) <= 1
    assert tier.gpu_ratio == pytest.approx(0.5)
    assert tier.gpu_hours == pytest.approx(2 * 170 / 3600, rel=0.1)
    assert tier.cost == pytest.approx(COST * tier.gpu_hours)
    one, other = found.endpoints
    assert (one.requests, other.requests) == (400, 0)
    [track] = found.tracks
    assert max(point.requests_per_s or 0 for point in track.points) == pytest.approx(4, rel=0.01)
    assert found.cost == pytest.approx(tier.cost)


async def test_a_report_from_the_store_equals_one_from_memory_at_any_age(plane: Plane) -> None:
    plane.work(2400)
    plane.written()
    before = comparable(await plane.reports.report(60))
    assert before["tiers"][0]["requests"] > 1000
    store = plane.recorder.store
    again = Reports(plane.world.controller, plane.recorder, plane.settings, COST)
    assert not again.ring.rounds
    assert comparable(await again.report(60)) == before
    whole = comparable(await plane.reports.report(24 * 60))
    for age_s in (3 * 3600, 3 * 86400):
        store.compact(plane.world.clock.s + age_s)
        joined = comparable(await replace_cache(again).report(24 * 60))
        assert joined["tiers"] == whole["tiers"]
        assert joined["endpoints"] == whole["endpoints"]
    assert {point[0] for point in store.summary("report/tier/", 0, 2**40, 2**40)} > {
        "report/tier/small/small/requests",
        "report/tier/small/small/queue",
    }


def replace_cache(reports: Reports) -> Reports:
    """Drop the cached reports, as a new sample does."""
    reports._cached = {}
    return reports


@pytest.mark.parametrize("samples", [10, 37, 1000])
async def test_older_samples_come_from_the_store(tmp_path: Path, samples: int) -> None:
    plane = Plane(tmp_path / "store.sqlite", samples=samples)
    plane.work(5000)
    plane.written()
    assert len(plane.reports.ring.rounds) == min(samples, 499)
    plane.recorder.store.compact(plane.world.clock.s)
    found = await plane.reports.report(120)
    [tier] = found.tiers
    assert tier.requests == plane.served.ok
    assert tier.latency_mean_ms == pytest.approx(250.0)
    assert found.tiers[0].covered_s == pytest.approx(4984, abs=10)
    assert sum(len(track.points) for track in found.tracks) == pytest.approx(5000 / 60, abs=2)
    plane.recorder.close()


async def test_after_a_restart_the_history_is_there_with_a_gap(plane: Plane) -> None:
    plane.step(60)
    plane.step(200, requests=2)
    plane.step(20)
    before = await plane.reports.report(60)
    plane.recorder.close()
    plane.world.clock.s += 300
    plane.start("e2")
    plane.step(40)
    plane.written()
    after = await plane.reports.report(60)
    assert after.tiers[0].requests == before.tiers[0].requests == 400
    assert after.tiers[0].covered_s == pytest.approx(before.tiers[0].covered_s + 30, abs=11)
    plane.step(30, requests=1)
    plane.step(20)
    plane.written()
    assert (await plane.reports.report(60)).tiers[0].requests == 430


async def test_two_windows_side_by_side_add_up(plane: Plane) -> None:
    plane.work(900)
    whole = (await plane.reports.report(15)).tiers[0]
    late = (await plane.reports.report(5)).tiers[0]
    plane.world.clock.s -= 300
    early = (await plane.reports.report(10)).tiers[0]
    for name in ("requests", "judged", "generated_tokens", "gpu_hours", "covered_s"):
        assert getattr(early, name) + getattr(late, name) == pytest.approx(getattr(whole, name)), name


async def test_an_endpoint_that_is_gone_stays_in_the_report_and_is_marked(plane: Plane) -> None:
    plane.step(40, requests=1)
    gone = next(iter(plane.world.replicas))
    plane.world.end(gone)
    plane.step(20)
    found = {item.instance: item.gone for item in (await plane.reports.report(60)).endpoints}
    assert found[gone]
    assert list(found.values()).count(False) == 2


async def test_a_report_is_made_once_between_two_samples(plane: Plane) -> None:
    plane.step(41)
    first = await plane.reports.report(60)
    assert await plane.reports.report(60) is first
    assert await plane.reports.report(30) is not first
    plane.step(10)
    assert await plane.reports.report(60) is not first
    for minutes in range(2, 60):
        await plane.reports.report(minutes)
    assert len(plane.reports._cached) <= 16


@pytest.mark.parametrize("minutes", [0.0, 0.5, -1.0, 50_000.0, float("nan"), float("inf")])
async def test_a_window_out_of_range_is_refused(plane: Plane, minutes: float) -> None:
    with pytest.raises(ValueError, match="43200 minutes"):
        await plane.reports.report(minutes)


async def test_the_log_gets_a_line_per_tier_and_interval(tmp_path: Path) -> None:
    plane = Plane(None, log_interval_s=100)
    with capture_logs() as lines:
        plane.step(95, requests=1)
        assert not [line for line in lines if line["event"] == "report"]
        plane.step(10, requests=1)
        assert plane.reports._logging is not None
        await plane.reports._logging
    [line] = [line for line in lines if line["event"] == "report"]
    assert (line["tier"], line["log_level"]) == ("small", "info")
    assert line["window_minutes"] == pytest.approx(100 / 60)
    assert line["requests"] > 60
    assert line["slo_attainment"] == 1.0
    assert line["latency_mean_ms"] == 250.0
    plane.recorder.close()
