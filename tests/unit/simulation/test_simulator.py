"""Whole runs under every policy."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.routing.tier_table import OverflowDirection, TierPolicy
from controlplane.simulation import oracle
from controlplane.simulation.engine import SimulatedTiming
from controlplane.simulation.fleet import EngineModel, ReplicaModel
from controlplane.simulation.plot import page, write_png
from controlplane.simulation.policies import NAMES, ServePolicy, StaticPolicy, per_tier, reactive_policy
from controlplane.simulation.results import SimulationResult
from controlplane.simulation.scenario import Scenario, TierScenario
from controlplane.simulation.simulator import Simulator, replay
from controlplane.simulation.trace_rows import Arrival

REQUEST = RequestShape(100.0, 50.0)
PRIOR = EngineSpeed(0.02, 0.0002, 1e-6)
REACTIVE = tuple(name for name in NAMES if name not in ("static", "oracle"))


def tier(name: str = "light", **more: Any) -> TierScenario:
    engine = EngineModel(SimulatedTiming(0.05, 0.02, 0.01), 1e6, 256)
    replica = ReplicaModel(engine, 10, cost_per_gpu_hour=2.0, cold_start_s=30.0)
    rule = ScalingRule(
        *(name, PRIOR, REQUEST), max_replicas=20, cold_start_s=30.0, sequences=10.0, slo=Slo(2.0, 0.1)
    )
    made = TierScenario(TierPolicy(name, f"{name}-model"), replica, rule, 2)
    return replace(made, **more)


def load_step(low: float = 1.0, high: float = 16.0, seed: int = 0) -> list[Arrival]:
    """Seven quiet minutes, four busy ones, fifteen quiet ones."""
    rng = random.Random(seed)
    arrivals, at_s = [], 0.0
    while at_s < 1560:
        at_s += rng.expovariate(high if 420 <= at_s < 660 else low)
        arrivals.append(Arrival(at_s, rng.randint(20, 200), rng.randint(10, 100)))
    return arrivals


ARRIVALS = load_step()
ONE = Scenario((tier(),))


def run(
    scenario: Scenario, policy: str = "tierplane", arrivals: list[Arrival] = ARRIVALS
) -> SimulationResult:
    return replay(scenario, reactive_policy(policy), arrivals, policy)


@pytest.mark.parametrize("policy", REACTIVE)
def test_every_request_ends_once_under_every_policy(policy: str) -> None:
    result = run(ONE, policy)
    record = result.tiers[0].record
    served = len(record.total_s)
    assert result.requests == len(ARRIVALS)
    assert served + record.refused + record.expired + record.lost == result.requests
    assert record.output_tokens > 0
    assert 0 < result.gpu_hours <= 20 * 1560 / 3600


def test_tierplane_scales_out_and_in_after_a_load_step() -> None:
    result = run(ONE)
    ready = [(sample.at_s, sample.ready) for sample in result.tiers[0].samples]
    busy = max(count for at_s, count in ready if 420 <= at_s < 700)
    late = [count for at_s, count in ready if at_s > 1400]
    assert busy >= 3
    assert max(late) <= 2
    assert result.attainment > 0.7
    assert any("requests/s are forecast" in entry.reason for entry in result.decisions)


def test_the_seed_determines_every_byte_and_the_failures() -> None:
    failing = replace(tier(), replica=replace(tier().replica, mtbf_s=300.0))
    texts = [json.dumps(run(Scenario((failing,), seed=seed)).as_json(), sort_keys=True) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_requests_of_failed_engines_are_retried() -> None:
    failing = replace(tier(), replica=replace(tier().replica, mtbf_s=600.0), replicas=4)
    result = replay(Scenario((failing,)), per_tier(lambda _: StaticPolicy(4)), load_step(high=5.0), "static")
    record = result.tiers[0].record
    assert result.tiers[0].failures > 5
    assert record.retried > 0
    assert record.lost <= record.retried
    assert len(record.total_s) + record.lost + record.refused + record.expired == result.requests


def test_a_full_tier_spills_upwards() -> None:
    tiers = (tier("light", replicas=1), tier("capable", replicas=3))
    arrivals = [a._replace(tier="light") for a in load_step(20.0, 20.0)[:3000]]
    result = replay(Scenario(tiers, "light"), per_tier(lambda t: StaticPolicy(t.replicas)), arrivals)
    light, capable = (entry.record for entry in result.tiers)
    assert light.arrived == 3000
    assert light.spilled > 100
    assert capable.arrived == 0


def test_cold_starts_cost_gpu_time_before_they_serve() -> None:
    fast = run(ONE)
    slow_tier = tier()
    slow_tier = replace(
        slow_tier,
        replica=replace(slow_tier.replica, cold_start_s=300.0),
        rule=replace(slow_tier.rule, cold_start_s=300.0),
    )
    slow = run(Scenario((slow_tier,)))
    assert slow.attainment < fast.attainment


def test_scale_to_zero_queues_the_request_that_wakes_the_tier() -> None:
    sleepy = tier(replicas=0)
    sleepy = replace(sleepy, rule=replace(sleepy.rule, min_replicas=0, idle_to_zero_s=120.0))
    arrivals = [Arrival(10.0, 50, 20), Arrival(1500.0, 50, 20)]
    result = run(Scenario((sleepy,)), arrivals=arrivals)
    record = result.tiers[0].record
    assert len(record.total_s) == 2
    assert all(20.0 <= ttft <= 41.0 for ttft in record.ttft_s)
    assert result.tiers[0].starts == 2
    assert result.gpu_hours < 1000 / 3600


def two_tiers(gpus: float | None) -> SimulationResult:
    """The same load on an important tier and on another."""
    alone = TierPolicy("light", "light-model", spill=OverflowDirection.NONE)
    capable = tier("capable", policy=replace(alone, name="capable"))
    tiers = (tier(policy=alone), replace(capable, rule=replace(capable.rule, priority=1)))
    arrivals = [a._replace(tier=name) for a in load_step(4.0, 48.0) for name in ("light", "capable")]
    return run(Scenario(tiers, "light", gpus=gpus), arrivals=arrivals)


def test_the_budget_goes_to_the_tier_of_higher_priority() -> None:
    enough, short = two_tiers(None), two_tiers(8.0)
    most = [
        [max(sample.placed for sample in entry.samples) for entry in run_.tiers] for run_ in (enough, short)
    ]
    assert sum(most[0]) > 8
    # All except the other tier's minimum.
    assert most[1][1] == 7
    assert most[1][0] < most[0][0]
    targets = {"light": 2, "capable": 2}
    for _, moment in groupby(short.decisions, key=lambda entry: entry.at_s):
        targets |= {entry.tier: entry.target for entry in moment}
        assert sum(targets.values()) <= 8
    assert any("8 GPUs are shared" in entry.reason for entry in short.decisions if entry.tier == "light")
    light, capable = (entry.record.attainment for entry in short.tiers)
    assert capable > light


def test_a_budget_that_suffices_changes_nothing() -> None:
    plenty, unlimited = two_tiers(100.0).as_json(), two_tiers(None).as_json()
    assert plenty.pop("gpu_budget") == 100.0
    assert unlimited.pop("gpu_budget") is None
    assert plenty == unlimited


def test_the_oracle_attains_the_goal_with_less_than_the_static_peak() -> None:
    best = oracle.run_oracle(ONE, ARRIVALS, 0.99)
    peak = oracle.run_static(ONE, ARRIVALS)
    assert best.attainment >= 0.99
    assert best.gpu_hours < 0.7 * peak.gpu_hours


def test_a_plan_starts_ahead_and_retains_replicas_during_short_lulls() -> None:
    needed = [1.0] * 10 + [2.5] * 5 + [1.0] * 3 + [2.5] * 5 + [1.0] * 20
    ordered = oracle.plan(needed, 1.0, 50.0, 1, 10)
    assert ordered[4] == 1
    assert ordered[5:23] == [3] * 18
    assert ordered[23:] == [1] * 20


def test_a_plan_stays_within_the_bounds() -> None:
    assert max(oracle.plan([50.0] * 10, 1.0, 20.0, 0, 7)) == 7


def test_serves_policy_is_the_installed_one() -> None:
    from ray.serve import autoscaling_policy

    policy = ServePolicy(tier())
    assert policy._module is autoscaling_policy
    assert policy._config.target_ongoing_requests == 2


def test_the_page_needs_no_network_and_is_the_same_each_time(tmp_path: Path) -> None:
    result = run(ONE)
    text = page(result)
    assert text == page(result)
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    write_png(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_requests() -> None:
    result = Simulator(ONE, reactive_policy("tierplane")).run([])
    assert (result.requests, result.attainment) == (0, 1.0)
    assert result.as_json()["tiers"][0]["ttft_ms"]["p50"] is None
