"""What samples cover: silent, lost and new gateways, and a controller that has just started."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import GpuCapacity, GpuPart, LeaseOutcome, LeaseTable
from controlplane.core.reports.report import Instance, InstanceKind, ReportSample
from controlplane.core.reports.sampler import ReportSampler, SampledCluster
from controlplane.core.telemetry.engine import EngineTelemetry
from controlplane.core.telemetry.samples import Absence, EngineSample, Missing
from controlplane.core.traffic.counters import KEEP_GONE_S, LATENCY_BOUNDS_S, TrafficCounters
from controlplane.core.traffic.demand import TierDemandTracker
from tests.support.endpoints import make_endpoint
from tests.support.samples import GIB, gpu_sample, node_sample

TIER = Instance(InstanceKind.TIER, "small", "small")
HEARTBEAT_S = 2.0


def endpoint(name: str, state: EndpointState = EndpointState.READY, **more: Any) -> Endpoint:
    return make_endpoint(name, state, **{"tier": "small", "engine": "vllm", "generation": 1, **more})


def instance(name: str) -> Instance:
    return Instance(InstanceKind.ENDPOINT, "small", name)


@dataclass
class Plane:
    """Gateways that count, and a sampler with a tick every second."""

    endpoints: dict[str, Endpoint] = field(default_factory=lambda: {"small-1": endpoint("small-1")})
    desired: dict[str, int] = field(default_factory=lambda: {"small": 1})
    gateways: dict[str, TrafficCounters] = field(default_factory=lambda: {"g": TrafficCounters("small")})
    silent: set[str] = field(default_factory=set)
    demand: TierDemandTracker = field(default_factory=TierDemandTracker)
    leases: LeaseTable = field(default_factory=LeaseTable)
    fleet: GpuInventory = field(default_factory=GpuInventory)
    engines: dict[str, EngineTelemetry] = field(default_factory=dict)
    sampler: ReportSampler = field(default_factory=ReportSampler)
    now_s: float = 1000.0

    def cluster(self) -> SampledCluster:
        return SampledCluster(
            self.endpoints, self.desired, self.leases, self.fleet, self.engines, self.demand, HEARTBEAT_S
        )

    def serve(self, gateway: str = "g", **gained: float) -> None:
        known = self.gateways[gateway]
        values = {name: getattr(known, name) + value for name, value in gained.items()}
        self.gateways[gateway] = replace(known, **values)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_s += 1.0
            for name, traffic in self.gateways.items():
                if name not in self.silent:
                    seen = (traffic, replace(traffic, subject="small-1"))
                    self.demand.observe(name, seen, self.now_s)
            self.sampler.watch(self.cluster(), self.now_s)

    def sample(self) -> dict[Instance, ReportSample]:
        return self.sampler.sample(self.cluster(), self.now_s)

    def lose(self, gateway: str) -> None:
        del self.gateways[gateway]
        self.demand.ledger.retain_gateways(self.gateways)


def started(**fields: Any) -> Plane:
    plane = Plane(**fields)
    plane.step(2)
    plane.sample()
    return plane


def test_what_was_counted_between_two_samples_is_in_one_sample() -> None:
    plane = started()
    plane.serve(
        arrived=9,
        judged=8,
        missed=2,
        served_elsewhere=1,
        ok=4,
        failed=2,
        shed=1,
        retried=3,
        resumed=1,
        prompt_tokens=70,
        generated_tokens=40,
        latency_s=8.0,
    )
    counts = tuple(range(len(LATENCY_BOUNDS_S)))
    plane.gateways["g"] = replace(
        plane.gateways["g"],
        waiting=5,
        in_flight=3,
        latency_max_s=4.0,
        latency_counts=counts,
        ttft_counts=counts[::-1],
    )
    plane.step(10)
    found = plane.sample()
    assert found[TIER] == ReportSample(
        **{"watched_s": 10, "up_s": 10, "counted_s": 10, "requests": 7, "answered": 4, "errors": 2},
        **{"shed": 1, "retried": 3, "resumed": 1, "spilled": 1, "judged": 8, "missed": 2, "arrived": 9},
        **{"prompt_tokens": 70, "generated_tokens": 40, "latency_s": 8.0, "queue": 5, "in_flight": 3},
        latency_max_s=4.0,
        latency_counts=counts,
        ttft_counts=counts[::-1],
    )
    assert found[instance("small-1")].requests == 7
    plane.step(10)
    later = plane.sample()[TIER]
    assert (later.counted_s, later.requests, later.latency_max_s) == (10, 0, None)


def test_a_silent_gateway_is_a_gap_that_is_filled_when_it_reports_again() -> None:
    plane = started()
    plane.silent = {"g"}
    plane.serve(ok=30)
    plane.step(8)
    gap = plane.sample()[TIER]
    assert (gap.counted_s, gap.requests, gap.queue, gap.in_flight) == (0, 0, None, None)
    assert (gap.watched_s, gap.up_s) == (8, 8)
    plane.silent = set()
    plane.step(2)
    filled = plane.sample()[TIER]
    assert (filled.counted_s, filled.requests, filled.watched_s) == (10, 30, 2)


def test_a_lost_gateways_last_report_counts_and_the_time_after_it_is_a_gap() -> None:
    plane = started()
    plane.serve(ok=3)
    plane.step(4)
    plane.serve(ok=100)  # never reported
    plane.silent = {"g"}
    plane.step(5)
    plane.lose("g")
    plane.step()
    last = plane.sample()[TIER]
    assert (last.counted_s, last.requests, last.queue, last.in_flight) == (4, 3, None, None)
    plane.step(10)
    assert plane.sample()[TIER].counted_s == 0
    plane.gateways["h"], plane.silent = TrafficCounters("small"), set()
    plane.step(2)
    assert plane.sample()[TIER].counted_s == 1, "since its first report"
    plane.serve("h", ok=5)
    plane.step(10)
    again = plane.sample()[TIER]
    assert (again.counted_s, again.requests) == (10, 5)


def test_reports_count_although_another_gateway_is_lost() -> None:
    plane = started(gateways={"g": TrafficCounters("small"), "h": TrafficCounters("small")})
    plane.serve("g", ok=1)
    plane.serve("h", ok=2)
    plane.step(3)
    plane.silent = {"g"}
    plane.step(7)
    assert plane.sample()[TIER].counted_s == 0
    plane.serve("h", ok=4)
    plane.step(3)
    plane.lose("g")
    plane.step()
    found = plane.sample()[TIER]
    assert (found.counted_s, found.requests) == (3, 7)
    plane.step(10)
    assert plane.sample()[TIER].counted_s == 10


def test_a_controller_that_restarted_counts_nothing_from_before() -> None:
    plane = started()
    plane.serve(ok=50)
    plane.step(3)
    plane.demand, plane.sampler = TierDemandTracker(), ReportSampler()
    plane.step(3)
    found = plane.sample()[TIER]
    assert (found.counted_s, found.requests) == (2, 0)
    plane.serve(ok=2)
    plane.step(10)
    found = plane.sample()[TIER]
    assert (found.counted_s, found.requests) == (10, 2)


def test_after_a_reset_nothing_from_before_counts() -> None:
    plane = started()
    plane.serve(ok=50)
    plane.step(3)
    plane.sampler.reset()
    plane.step(3)
    found = plane.sample()[TIER]
    assert (found.watched_s, found.counted_s, found.requests) == (2, 2, 0)


def test_a_ledger_that_dropped_a_subject_counts_it_from_zero() -> None:
    plane = started()
    plane.serve(ok=50)
    plane.step(10)
    plane.sample()
    for at_s in (plane.now_s, plane.now_s + KEEP_GONE_S):
        plane.demand.ledger.retain_subjects([], at_s)
    plane.serve(ok=2)
    plane.step(10)
    assert plane.sample()[TIER].requests == 2


def test_what_ended_at_an_endpoint_in_its_last_moments_is_counted_after_it_is_gone() -> None:
    """It goes between two samples, and the gateway reports its last requests once it is gone."""
    plane = started()
    plane.serve(ok=50)
    plane.step(3)
    plane.serve(ok=7)
    del plane.endpoints["small-1"]
    plane.demand.sample(["small"], plane.endpoints, plane.now_s)
    plane.step(3)
    first = plane.sample()
    assert first[TIER].requests == first[instance("small-1")].requests == 57
    plane.serve(ok=4)
    plane.step(10)
    plane.demand.sample(["small"], plane.endpoints, plane.now_s)
    last = plane.sample()
    assert last[TIER].requests == last[instance("small-1")].requests == 4
    assert (last[instance("small-1")].watched_s, last[instance("small-1")].up_s) == (0, 0)
    plane.step(10)
    assert instance("small-1") not in plane.sample(), "nothing more ended there"
    plane.now_s += KEEP_GONE_S
    plane.demand.sample(["small"], plane.endpoints, plane.now_s)
    assert not plane.demand.ledger.knows("small-1")
    plane.sample()
    assert not plane.sampler._endpoints


def test_a_time_without_ticks_is_a_gap() -> None:
    plane = started()
    plane.step(4)
    plane.now_s += 60.0
    plane.step(3)
    assert plane.sample()[TIER].watched_s == 6


def test_which_instances_could_serve_and_which_did_not_have_to() -> None:
    plane = started(desired={"small": 2, "cold": 0})
    plane.endpoints |= {
        "small-2": endpoint("small-2", EndpointState.STARTING),
        "small-3": endpoint("small-3", EndpointState.DRAINING),
    }
    plane.step(5)
    plane.endpoints["small-1"] = endpoint("small-1", EndpointState.RESTARTING)
    plane.step(5)
    found = plane.sample()
    seen = {each.name: (sample.watched_s, sample.up_s) for each, sample in found.items()}
    assert seen == {
        "small": (10, 5),
        "small-1": (10, 5),
        "small-2": (10, 0),
        "small-3": (0, 0),
        "cold": (0, 0),
    }
    del plane.endpoints["small-2"], plane.endpoints["small-3"]
    plane.step()
    assert instance("small-3") not in plane.sample()


def test_an_instances_gpus_are_those_that_it_leases() -> None:
    plane = started()
    plane.endpoints = {
        "small-1": endpoint("small-1", gpu_uuids=("g0",)),
        "small-2": endpoint("small-2", gpu_uuids=("g1", "g2")),
        "small-3": endpoint("small-3", EndpointState.FAILED, gpu_uuids=("g3",)),
    }
    for seconds in range(1, 5):
        gpus = [
            gpu_sample("g0", 0, gpu_ratio=0.25),
            gpu_sample("g1", 1, gpu_ratio=0.75),
            gpu_sample("g2", 2, gpu_ratio=Missing(Absence.ERROR, "no")),
        ]
        plane.fleet.observe("n", node_sample("n", seconds, float(seconds), gpus), [], now_s=1000.0 + seconds)
    capacity = {"g0": GpuCapacity("g0", "n", 80 * GIB)}
    answer = plane.leases.acquire(
        "small-1", [GpuPart("g0", 500, GIB)], capacity, generation=1, now_s=plane.now_s
    )
    assert answer.outcome is LeaseOutcome.GRANTED
    plane.step(4)
    found = plane.sample()
    assert found[instance("small-1")].gpu_s == pytest.approx(0.5 * 4)
    assert found[instance("small-2")].gpu_s == 8, "without a lease: what Ray gave it"
    assert found[instance("small-3")].gpu_s == 0
    assert found[TIER].gpu_s == pytest.approx(0.5 * 4 + 8)
    assert found[instance("small-1")].gpu_ratio == pytest.approx(0.25)
    assert found[instance("small-2")].gpu_ratio == pytest.approx(0.75), "of the GPU that can be read"
    assert found[instance("small-3")].gpu_ratio is None
    assert found[TIER].gpu_ratio == pytest.approx(0.5)


def test_the_queue_is_in_engines_and_gateways() -> None:
    plane = started()
    plane.engines["small-1"] = EngineTelemetry()
    plane.gateways["g"] = replace(plane.gateways["g"], waiting=2)
    plane.engines["small-1"].observe(
        EngineSample("small-1", 1, 0.0, 0.01, "", gauges=(("waiting", 7.0),), counters=()), plane.now_s + 1
    )
    plane.step(2)
    found = plane.sample()
    assert (found[TIER].queue, found[instance("small-1")].queue) == (9, 7)
    plane.step(60)
    found = plane.sample()
    assert (found[TIER].queue, found[instance("small-1")].queue) == (2, None)


def test_counting_begins_with_the_first_tick_and_not_only_with_the_first_sample() -> None:
    plane = Plane()
    plane.step()
    plane.serve(ok=6)
    plane.step(9)
    found = plane.sample()[TIER]
    assert (found.counted_s, found.requests) == (9, 6)
