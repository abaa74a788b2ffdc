"""Tiers that share nodes: which replicas wait and start, and the effect of a lost node."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.placement.gangs import GangShape
from controlplane.core.routing.tier_table import OverflowDirection, TierPolicy
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.cluster import Cluster
from controlplane.simulation.engine import SimulatedTiming
from controlplane.simulation.fleet import EngineModel, ReplicaModel
from controlplane.simulation.outages import OutageModel
from controlplane.simulation.placement_text import placement_lines
from controlplane.simulation.plot import page
from controlplane.simulation.policies import MakePolicy, PolicyInput, decision, per_tier, reactive_policy
from controlplane.simulation.results import ClusterResult, SimulationResult
from controlplane.simulation.scenario import Scenario, TierScenario
from controlplane.simulation.simulator import replay
from controlplane.simulation.trace_rows import Arrival
from tests.support.nodes import plain_node

COLD_S = 30.0


def tier(name: str, replicas: int = 1, **shape: Any) -> TierScenario:
    asked = GangShape(**shape)
    engine = EngineModel(SimulatedTiming(0.05, 0.02, 0.01), 1e6, 256)
    gpus = asked.total_milli / 1000
    rule = ScalingRule(
        *(name, EngineSpeed(0.02, 0.0002, 1e-6), RequestShape(100.0, 50.0), gpus),
        max_replicas=20,
        cold_start_s=COLD_S,
        sequences=10.0,
        slo=Slo(2.0, 0.1),
    )
    return TierScenario(
        TierPolicy(name, f"{name}-model", spill=OverflowDirection.NONE),
        ReplicaModel(engine, 10, gpus=gpus, cold_start_s=COLD_S, shape=asked),
        rule,
        replicas,
    )


class Script:
    """Targets by time."""

    period_s = 10.0

    def __init__(self, steps: Mapping[float, int]) -> None:
        self.steps = steps

    def decide(self, tier: PolicyInput) -> ScalingDecision:
        begun = [target for at_s, target in self.steps.items() if at_s <= tier.observation.now_s]
        return decision(tier, begun[-1], "the script")


def scripted(scripts: Mapping[str, Mapping[float, int]]) -> MakePolicy:
    return per_tier(lambda tier: Script(scripts[tier.policy.name]))


def cluster_of(result: SimulationResult) -> ClusterResult:
    assert result.cluster is not None
    return result.cluster


def quiet(*tiers: str, until_s: float = 600.0) -> list[Arrival]:
    return [Arrival(at_s, 20, 10, tier=name) for at_s in range(0, int(until_s) + 1, 5) for name in tiers]


def ready_at(result: SimulationResult, name: str, count: int) -> float:
    samples = next(entry.samples for entry in result.tiers if entry.record.tier == name)
    return next(sample.at_s for sample in samples if sample.ready >= count)


def test_a_waiting_replica_starts_when_another_is_removed() -> None:
    scenario = Scenario((tier("one", 2), tier("two", 1)), nodes=(plain_node("a", 3),))
    scripts: dict[str, dict[float, int]] = {"one": {0: 2, 300: 1}, "two": {0: 1, 100: 2}}
    result = replay(scenario, scripted(scripts), quiet("one", "two"))
    first, second = result.tiers
    assert (first.placement.waited, second.placement.waited) == (0, 1)
    assert second.placement.waited_s == second.placement.longest_wait_s == pytest.approx(200.0)
    assert ready_at(result, "two", 2) == pytest.approx(300.0 + COLD_S, abs=2.0)
    waits = {sample.waiting for sample in second.samples if 101 <= sample.at_s <= 299}
    assert waits == {1}
    # A waiting replica uses no resources.
    assert second.replica_hours * 3600 == pytest.approx(600.0 + 300.0, abs=1.0)
    assert second.starts == 2
    assert (cluster_of(result).gpus, cluster_of(result).most_gpus) == (3.0, 3.0)


def test_waiting_replicas_are_removed_first() -> None:
    scenario = Scenario((tier("one", 1),), nodes=(plain_node("a", 2),))
    # The second starts at 20 and would be ready at 50; the third has no room.
    result = replay(scenario, scripted({"one": {0: 1, 20: 3, 40: 2}}), quiet("one", until_s=100.0))
    (only,) = result.tiers
    assert only.starts == 2
    assert (only.placement.waited, only.placement.waited_s, only.placement.waiting) == (
        1,
        pytest.approx(20.0),
        0,
    )
    assert only.samples[-1].ready == 2


def test_a_parallel_replica_waits_for_gpus_of_one_node() -> None:
    tiers = (tier("single", 2), tier("pair", 0, gpus=2))
    scenario = Scenario(tiers, nodes=(plain_node("a", 2), plain_node("b", 2)))
    scripts: dict[str, dict[float, int]] = {"single": {0: 2, 200: 1}, "pair": {0: 0, 50: 1}}
    result = replay(scenario, scripted(scripts), quiet("single"))
    pair = result.tiers[1]
    # Two GPUs were free all the time, one on each node.
    assert pair.placement.waited_s == pytest.approx(150.0)
    assert ready_at(result, "pair", 1) == pytest.approx(200.0 + COLD_S, abs=2.0)
    assert pair.placement.most_gpus == 2.0


def test_replicas_at_the_beginning_wait_too_without_room() -> None:
    result = replay(
        Scenario((tier("one", 3),), nodes=(plain_node("a", 2),)), scripted({"one": {0: 3}}), quiet("one")
    )
    (only,) = result.tiers
    assert (only.starts, only.placement.waited, only.placement.waiting) == (2, 1, 1)
    assert only.placement.waited_s == pytest.approx(600.0)


def busy(scenario: Scenario, policy: str = "tierplane", seed: int = 0) -> SimulationResult:
    """Some minutes in which both tiers want more GPUs than exist."""
    rng = random.Random(seed)
    arrivals, at_s = [], 0.0
    while at_s < 700:
        at_s += rng.expovariate(45.0 if 200 <= at_s < 350 else 2.0)
        name = rng.choice(["one", "two"])
        arrivals.append(Arrival(at_s, rng.randint(20, 200), rng.randint(10, 100), tier=name))
    return replay(scenario, reactive_policy(policy), arrivals, policy)


def failing(seed: int = 0) -> Scenario:
    return Scenario(
        (tier("one", 2), tier("two", 1, gpus=2)),
        nodes=(plain_node("a", 4), plain_node("b", 4)),
        outages=OutageModel(mtbf_s=400.0, recovery_s=100.0),
        seed=seed,
    )


def test_the_budget_is_the_setting_or_else_the_gpus_of_the_cluster() -> None:
    scenario = replace(failing(), outages=None)
    by_cluster, by_setting = busy(scenario), busy(replace(scenario, gpus=5.0))
    assert (by_cluster.gpu_budget, by_setting.gpu_budget) == (8.0, 5.0)
    assert cluster_of(by_setting).most_gpus < cluster_of(by_cluster).most_gpus <= 8.0
    for result, gpus in ((by_cluster, 8), (by_setting, 5)):
        assert sum(entry.limited_decisions for entry in result.tiers) > 0
        assert any(f"{gpus} GPUs are shared" in entry.reason for entry in result.decisions)


def test_a_limited_decision_is_recorded_once_even_if_no_target_changes() -> None:
    result = busy(Scenario((tier("one", 1), tier("two", 0)), nodes=(plain_node("a", 1),)))
    recorded = [entry for entry in result.decisions if entry.before == entry.target]
    assert 0 < len(recorded) < sum(entry.limited_decisions for entry in result.tiers) / 4
    assert all("1 GPUs are shared" in entry.reason for entry in recorded)


def test_replicas_of_policies_without_a_budget_wait() -> None:
    result = busy(replace(failing(), outages=None), "hpa-slots")
    assert sum(entry.placement.waited for entry in result.tiers) > 0
    assert sum(entry.limited_decisions for entry in result.tiers) == 0
    assert cluster_of(result).most_gpus <= 8.0


def test_replicas_of_a_lost_node_are_replaced_where_there_is_room() -> None:
    result = busy(failing())
    assert cluster_of(result).node_failures > 0
    assert sum(entry.failures for entry in result.tiers) > 0
    for entry in result.tiers:
        record = entry.record
        assert len(record.total_s) + record.refused + record.expired + record.lost == record.arrived
        assert record.retried > 0


def test_the_same_seed_gives_the_same_bytes() -> None:
    texts = [json.dumps(busy(failing(seed)).as_json(), sort_keys=True) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_an_engine_has_the_speed_of_its_gpu() -> None:
    slow = tier("one", 1)
    fast = EngineModel(SimulatedTiming(0.01, 0.001), 1e6, 256)
    slow = replace(slow, replica=replace(slow.replica, engines={"H100-80G": fast}))

    def latency_s(model: str) -> float:
        scenario = Scenario((slow,), nodes=(plain_node("a", 1, model),))
        return max(replay(scenario, scripted({"one": {0: 1}}), quiet("one")).tiers[0].record.total_s)

    assert latency_s("L4") > 5 * latency_s("H100-80G")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: busy(failing()),
            [
                "2 nodes with 8 usable GPUs",
                "node failures: ",
                "the tiers share 8 GPUs",
                "decisions limited by the GPU budget",
            ],
        ),
        (lambda: busy(replace(failing(), outages=None), "hpa-slots"), ["replicas that waited for room: "]),
    ],
)
def test_the_use_of_the_cluster_in_words(make: Callable[[], SimulationResult], words: list[str]) -> None:
    text = "\n".join(placement_lines(make()))
    for word in words:
        assert word in text


def test_the_plot_shows_waiting_replicas_only_if_there_were_any() -> None:
    scenario = Scenario((tier("one", 1),), nodes=(plain_node("a", 2),))
    enough, short = (replay(scenario, scripted({"one": {0: 1, 50: most}}), quiet("one")) for most in (2, 3))
    assert "no room" not in page(enough)
    assert "no room" in page(short)
    assert "replicas that waited for room: 1" in page(short)


def test_without_any_node_left_the_budget_is_zero_and_not_unlimited() -> None:
    cluster = Cluster(VirtualClock(), (plain_node("a", 2), plain_node("b", 1)))
    cluster.open()
    counted = [cluster.gpus]
    for change in (cluster.lose, cluster.restore):
        for node_id in ("a", "b"):
            change(node_id)
            counted.append(cluster.gpus)
    assert counted == [3.0, 1.0, 0.0, 2.0, 3.0]
    assert Cluster(VirtualClock(), (plain_node("cpu", 0),)).gpus is None
