"""The recommendations of a simulated run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.placement.gangs import GangShape
from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.recommendations.cycle import RecommendationRules
from controlplane.core.recommendations.rules import (
    GPU_LOAD,
    SLOT_LOAD,
    RecommendationKind,
    Thresholds,
    TierCondition,
)
from controlplane.core.routing.endpoint_table import TierPool
from controlplane.core.routing.tier_table import OverflowDirection, TierPolicy
from controlplane.core.telemetry.series import Freshness
from controlplane.simulation import recommendations as simulated
from controlplane.simulation.engine import SimulatedTiming
from controlplane.simulation.fleet import EngineModel, ReplicaModel
from controlplane.simulation.plot import page
from controlplane.simulation.policies import StaticPolicy, per_tier, reactive_policy
from controlplane.simulation.recommendations import UPDATES, SimulatedRecommendations
from controlplane.simulation.results import START_UNIX_S, SimulationResult, TierRecord
from controlplane.simulation.scenario import RecommendationSettings, Scenario, TierScenario
from controlplane.simulation.simulator import replay
from controlplane.simulation.trace_rows import Arrival

REQUEST = RequestShape(100.0, 50.0)
PRIOR = EngineSpeed(0.02, 0.0002, 1e-6)


def tier(name: str = "light", replicas: int = 1, gpus: float = 1.0, **scaling: Any) -> TierScenario:
    engine = EngineModel(SimulatedTiming(0.05, 0.02, 0.01), 1e6, 256)
    replica = ReplicaModel(engine, 10, gpus=gpus, cold_start_s=30.0)
    rule = ScalingRule(
        *(name, PRIOR, REQUEST, gpus),
        max_replicas=20,
        cold_start_s=30.0,
        sequences=10.0,
        slo=Slo(2.0, 0.1),
    )
    policy = TierPolicy(name, f"{name}-model")
    return TierScenario(policy, replica, replace(rule, **scaling), replicas)


def steady(per_s: float, seconds: float) -> list[Arrival]:
    return [Arrival(i / per_s, 100, 50) for i in range(1, int(per_s * seconds))]


def fixed(scenario: Scenario, arrivals: list[Arrival]) -> SimulationResult:
    """With as many replicas as it begins with."""
    return replay(scenario, per_tier(lambda made: StaticPolicy(made.replicas)), arrivals, "static")


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_tier_that_is_too_small_should_scale_out_and_the_score_agrees() -> None:
    result = fixed(Scenario((tier(),)), steady(12.0, 1500.0))
    first = result.recommendations[0]
    assert first.recommendation.kind is RecommendationKind.SCALE_OUT
    assert first.recommendation.reasons[0] == "GPU utilisation is 100%, over 95%"
    assert any("requests wait, over 50" in reason for reason in first.recommendation.reasons)
    assert first.recommendation.replicas > 1
    assert first.unix_s == START_UNIX_S + 60.0, "at the first update"
    assert first.applied is False
    assert first.score is not None
    assert first.score.right
    assert result.record.right == result.record.judged == 2
    assert result.record.mean == 1.0
    assert [entry.unix_s - START_UNIX_S for entry in result.recommendations] == [60.0, 660.0, 1260.0]
    assert not result.decisions, "recommendations change no target"


def test_a_recommendation_that_the_policy_carries_out_counts_as_applied() -> None:
    arrivals = [*steady(2.0, 600.0), *(Arrival(600.0 + i / 12.0, 100, 50) for i in range(1, 18000))]
    result = replay(Scenario((tier(),)), reactive_policy("tierplane"), arrivals, "tierplane")
    followed = [item for item in result.recommendations if item.applied]
    assert followed
    assert all(item.recommendation.kind is RecommendationKind.SCALE_OUT for item in followed)
    assert result.decisions


def test_an_idle_tier_should_scale_down() -> None:
    result = fixed(Scenario((tier(replicas=3),)), steady(0.05, 1200.0))
    assert {item.recommendation.kind for item in result.recommendations} == {RecommendationKind.SCALE_DOWN}
    assert result.recommendations[0].recommendation.replicas == 2
    assert result.recommendations[0].recommendation.effect.gpus == -1.0
    assert result.record.right == result.record.judged >= 1


def test_when_gpus_are_short_an_idle_tier_should_give_one_up() -> None:
    hot = tier("light")
    tiers = (
        replace(hot, policy=replace(hot.policy, spill=OverflowDirection.NONE)),
        tier("capable", replicas=3),
    )
    arrivals = [arrival._replace(tier="light") for arrival in steady(12.0, 400.0)]
    short = fixed(Scenario(tiers, "light", gpus=4.0), arrivals)
    assert {item.recommendation.kind for item in short.recommendations} == {RecommendationKind.REBALANCE}
    enough = fixed(Scenario(tiers, "light"), arrivals)
    assert {item.recommendation.kind for item in enough.recommendations} == {
        RecommendationKind.SCALE_OUT,
        RecommendationKind.SCALE_DOWN,
    }


def test_recommendations_consider_the_gpus_of_the_cluster() -> None:
    def on(node_gpus: int) -> SimulationResult:
        gpus = tuple(Gpu(f"n/{i}", i, "L4") for i in range(node_gpus))
        tiers = tuple(
            replace(made, policy=replace(made.policy, spill=OverflowDirection.NONE), replica=placed(made))
            for made in (tier("light"), tier("capable", replicas=3))
        )
        nodes = (Node("n", gpus, 64_000, 1 << 40),)
        arrivals = [arrival._replace(tier="light") for arrival in steady(12.0, 400.0)]
        return fixed(Scenario(tiers, "light", nodes=nodes), arrivals)

    def placed(made: TierScenario) -> ReplicaModel:
        return replace(made.replica, shape=GangShape())

    assert {item.recommendation.kind for item in on(4).recommendations} == {RecommendationKind.REBALANCE}
    assert {item.recommendation.kind for item in on(8).recommendations} == {
        RecommendationKind.SCALE_OUT,
        RecommendationKind.SCALE_DOWN,
    }
    # The idle tier uses all of them, and a replica that waits for room doesn't count.
    (first, *_) = on(3).recommendations
    assert first.recommendation.suggestion.startswith("take a replica from tier 'capable' (3 now) and run")
    assert first.replicas == 0


def test_thresholds_interval_and_times_are_the_settings() -> None:
    scenario = Scenario((tier(),))
    arrivals = steady(12.0, 1500.0)
    calm = Thresholds(gpu_ratio=1.0, queue=1e9, latency_ms=1e9)
    lenient = Scenario(
        (tier(slo=Slo(1e9, 1e9, attainment=0.01)),),
        recommendations=RecommendationSettings(RecommendationRules(calm, 300.0, 600.0), 300.0),
    )
    assert fixed(lenient, arrivals).record.given == 0
    often = replace(
        scenario, recommendations=RecommendationSettings(RecommendationRules(Thresholds(), 50.0, 100.0), 50.0)
    )
    given = fixed(often, arrivals).recommendations
    assert given[0].unix_s == START_UNIX_S + 10.0
    assert given[1].unix_s - given[0].unix_s == 100.0
    assert 50.0 <= given[0].again_unix_s - given[0].unix_s < 100.0, (
        "it still applied shortly before it was judged"
    )


def test_recommendations_do_not_affect_the_run() -> None:
    failing = tier(replicas=2)
    failing = replace(failing, replica=replace(failing.replica, mtbf_s=300.0))
    arrivals = steady(9.0, 1200.0)
    texts = set()
    for window_s in (10.0, 333.0, 3600.0):
        scenario = Scenario((failing,), recommendations=RecommendationSettings(window_s=window_s))
        found = replay(scenario, reactive_policy("tierplane"), arrivals).as_json()
        texts.add(json.dumps([found["tiers"], found["decisions"]]))
    assert len(texts) == 1


def test_a_run_holds_the_last_recommendations_and_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "MAX_RECOMMENDATIONS", 2)
    scenario = Scenario(
        (tier(),),
        recommendations=RecommendationSettings(RecommendationRules(Thresholds(), 50.0, 100.0), 50.0),
    )
    result = fixed(scenario, steady(12.0, 1500.0))
    assert len(result.recommendations) == 2
    assert result.record.given == result.recommendations[-1].number > 10
    assert result.record.judged >= result.record.given - 1


def test_json_and_page_have_the_recommendations() -> None:
    result = fixed(Scenario((tier(),)), steady(12.0, 700.0))
    found = result.as_json()
    assert found["record"] == {"given": 2, "judged": 1, "right": 1, "mean": 1.0}
    (first, _) = found["recommendations"]
    assert first["type"] == "scale_out"
    assert first["instance"] == "light"
    assert first["applied"] is False
    assert first["predicted"]["gpus"] >= 1.0
    assert first["score"]["right"] is True
    text = page(result)
    assert "<h2>Recommendations (2)</h2><p>1 judged, 1 right, mean score 1.00</p>" in text
    assert "scale_out: run " in text
    assert "not followed; 1.00" in text
    assert text == page(fixed(Scenario((tier(),)), steady(12.0, 700.0)))


# --- one update -------------------------------------------------------------------------------------------


@dataclass
class PlayedEngine:
    worked_s: float = 0.0
    kv_usage_ratio: float = 0.0


@dataclass
class PlayedReplica:
    engine: PlayedEngine | None
    ready_s: float = 0.0


@dataclass
class PlayedFleet:
    replicas: dict[str, PlayedReplica] = field(default_factory=dict)

    def endpoints(self) -> list[Endpoint]:
        state = EndpointState.READY
        return [Endpoint(name, "light", "m", "simulated", "", state, 10) for name in self.replicas]


class Played:
    """A tier whose counters a test sets."""

    def __init__(self, gpus: float = 1.0) -> None:
        self.scenario = tier(gpus=gpus)
        self.fleet: Any = PlayedFleet()
        self.record = TierRecord("light")
        self.ended_total = 0
        self.queued = 0
        self.pool = TierPool(0, "light")
        made = simulated._TierWindow(self, self.pool, TierScaler(self.scenario.rule), 100.0)
        self.condition = made.condition

    def counts(self, arrived: int = 0, within_slo: int = 0, missed: int = 0, lost: int = 0) -> None:
        self.record.arrived += arrived
        self.record.within_slo += within_slo
        self.record.lost += lost
        self.ended_total += within_slo + missed + lost


def test_counts_are_those_of_the_window() -> None:
    played = Played()
    played.counts(arrived=500, within_slo=100, missed=300, lost=100)
    played.record.total_s.extend([9.0] * 400)
    played.condition(20.0)
    for at_s in (40.0, 60.0, 80.0, 100.0):
        played.condition(at_s)
    played.counts(arrived=200, within_slo=90, missed=5, lost=5)
    played.record.total_s.extend(i / 100 for i in range(1, 101))
    played.queued = 7
    seen = played.condition(120.0)
    assert seen.requests_per_s.fresh == 2.0
    assert seen.attainment.fresh == 0.9
    assert seen.error_ratio.fresh == 0.05
    assert seen.latency_ms.fresh == pytest.approx(950.0)
    assert seen.queue.fresh == 7.0
    assert seen.goal == 0.99
    assert seen.memory_ratio.freshness is Freshness.MISSING


def test_without_ended_requests_attainment_and_latency_are_missing() -> None:
    played = Played()
    played.counts(arrived=10)
    seen = played.condition(20.0)
    assert seen.requests_per_s.fresh == 0.5
    for signal in (seen.attainment, seen.error_ratio, seen.latency_ms, seen.gpu_ratio, seen.kv_ratio):
        assert signal.freshness is Freshness.MISSING


def test_utilisation_is_the_busiest_engines_share_of_the_window() -> None:
    played = Played()
    old, young = PlayedReplica(PlayedEngine()), PlayedReplica(PlayedEngine(), ready_s=150.0)
    played.fleet.replicas["a"] = old
    for at_s in range(20, 120, 20):
        old.engine = PlayedEngine(at_s * 1.0)
        assert played.condition(float(at_s)).gpu_ratio.fresh == 1.0
    old.engine = PlayedEngine(110.0, 0.3)
    assert played.condition(150.0).gpu_ratio.fresh == pytest.approx(70.0 / 110.0), "since 40 s"
    played.fleet.replicas["b"] = young
    young.engine = PlayedEngine(9.0, 0.8)
    seen = played.condition(160.0)
    assert seen.gpu_ratio.fresh == pytest.approx(0.9), "the new engine has worked 9 of its 10 s"
    assert seen.kv_ratio.fresh == 0.8
    assert seen.load_name == GPU_LOAD
    old.engine = PlayedEngine(5.0)
    old.ready_s = 155.0
    del played.fleet.replicas["b"]
    assert played.condition(165.0).gpu_ratio.fresh == pytest.approx(0.5), "the engine was restarted"
    old.engine = None
    assert played.condition(170.0).gpu_ratio.freshness is Freshness.MISSING


def test_without_a_gpu_the_used_share_of_slots_counts() -> None:
    played = Played(gpus=0.0)
    assert played.condition(20.0).gpu_ratio.freshness is Freshness.MISSING
    played.pool.limit, played.pool.in_flight = 20, 5
    seen = played.condition(40.0)
    assert (seen.gpu_ratio.fresh, seen.load_name) == (0.25, SLOT_LOAD)


def test_a_window_holds_few_points() -> None:
    played = Played()
    made = simulated._TierWindow(played, played.pool, TierScaler(ScalingRule("light", PRIOR, REQUEST)), 100.0)
    for step in range(1000):
        made.condition(20.0 * (step + 1))
    assert len(made._points) <= UPDATES + 2


def test_recommendations_are_based_on_what_the_policy_learned() -> None:
    played = Played()
    scaler = TierScaler(ScalingRule("light", PRIOR, REQUEST))
    asked: list[str] = []

    def learned(name: str) -> TierScaler | None:
        asked.append(name)
        return scaler

    run = SimulatedRecommendations(
        RecommendationSettings(), [played], [played.pool], learned, start_unix_s=START_UNIX_S
    )
    seen: TierCondition = run._tiers[0].condition(60.0)
    assert asked == ["light"]
    assert seen.capacity is scaler.capacity
    unknown = SimulatedRecommendations(
        RecommendationSettings(), [played], [played.pool], lambda _: None, start_unix_s=0.0
    )
    assumed = unknown._tiers[0].condition(60.0)
    assert assumed.capacity is not None
    assert (assumed.capacity.speed, assumed.mean_request) == (PRIOR, REQUEST)
