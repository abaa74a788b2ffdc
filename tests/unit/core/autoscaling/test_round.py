from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.decision import ScaleDirection, ScalingDecision, TierObservation
from controlplane.core.autoscaling.round import ScalingRound
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.autoscaling.schedules import Schedule
from controlplane.core.domain.request import RequestShape
from controlplane.core.telemetry.series import known_now, missing

SPEED = EngineSpeed(0.02, 0.001, 0.0001)
REQUEST = RequestShape(500.0, 100.0)
MONDAY_UNIX_S = 1_767_571_200.0


def rule(tier: str, **more: Any) -> ScalingRule:
    made = ScalingRule(tier, SPEED, REQUEST, max_replicas=20, cold_start_s=30.0, sequences=16.0)
    return replace(made, **more)


class Plane:
    """Tiers that get what a round decides at once."""

    def __init__(self, *rules: ScalingRule, gpus: float | None = None) -> None:
        self.round = ScalingRound(rules)
        self.gpus = gpus
        self.targets = {entry.tier: 1 for entry in rules}
        self.now_s = 0.0

    def tick(self, **rates: float) -> dict[str, ScalingDecision]:
        self.now_s += 5.0
        seen = [self.seen(tier, rate) for tier, rate in rates.items()]
        decisions = {decision.tier: decision for decision in self.round.decide(seen, self.gpus)}
        self.targets |= {tier: decision.target for tier, decision in decisions.items()}
        return decisions

    def seen(self, tier: str, rate: float, **more: Any) -> TierObservation:
        target = self.targets[tier]
        made = TierObservation(
            tier, self.now_s, MONDAY_UNIX_S + self.now_s, target, target, 5.0, known_now(rate * 5.0),
            known_now(rate * 2.0), known_now(0.0),
        )  # fmt: skip
        return replace(made, **more)

    def run(self, seconds: float, **rates: float) -> dict[str, ScalingDecision]:
        for _ in range(int(seconds / 5)):
            decisions = self.tick(**rates)
        return decisions


class Busy(Plane):
    """One whose requests end, so that it is known what a replica carries."""

    def seen(self, tier: str, rate: float, **more: Any) -> TierObservation:
        tokens = {"input_tokens": known_now(500.0), "output_tokens": known_now(100.0)}
        return super().seen(tier, rate, in_flight=known_now(0.0), finished=rate * 5.0, **tokens, **more)


def test_without_a_budget_each_tier_gets_what_it_requests() -> None:
    decisions = Plane(rule("a"), rule("b")).run(600, a=30.0, b=60.0)
    assert decisions["b"].target > decisions["a"].target > 1
    assert all(found.target == found.requested and not found.shortfall for found in decisions.values())


def test_the_more_important_tier_gets_gpus_first_and_the_other_its_minimum() -> None:
    plane = Plane(rule("a"), rule("b", priority=1), gpus=5.0)
    decisions = plane.run(600, a=60.0, b=60.0)
    assert (decisions["a"].target, decisions["b"].target) == (1, 4)
    short = decisions["a"]
    assert short.requested > 1
    assert short.shortfall == short.requested - 1
    assert "5 GPUs are shared" in short.reason
    assert f"it wants {short.requested}" in short.reason


def test_an_important_tier_takes_running_replicas_from_another() -> None:
    plane = Plane(rule("a"), rule("b", priority=1), gpus=5.0)
    assert plane.run(600, a=60.0, b=1.0)["a"].target == 4
    wakes = plane.tick(a=60.0, b=80.0)
    assert (wakes["b"].target, wakes["b"].direction) == (4, ScaleDirection.UP)
    assert (wakes["a"].target, wakes["a"].direction) == (1, ScaleDirection.DOWN)


def test_equal_tiers_do_not_take_replicas_from_each_other_for_small_differences() -> None:
    plane = Plane(rule("a"), rule("b"), gpus=6.0)
    first = plane.run(600, a=60.0, b=60.0)
    changes = 0
    for step in range(200):
        wobble = 3.0 if step % 2 else -3.0
        now = plane.tick(a=60.0 + wobble, b=60.0 - wobble)
        changes += sum(decision.direction is not ScaleDirection.STAY for decision in now.values())
    assert first["a"].target + first["b"].target == 6
    assert changes == 0


def test_of_equal_tiers_the_one_whose_last_replica_would_carry_less_goes_without() -> None:
    plane = Busy(rule("a"), rule("b"))
    both = {"a": 40.0, "b": 44.0}
    free = plane.run(600, **both)
    last_carries = {}
    for tier, decision in free.items():
        each_per_s = plane.round.scaler(tier).each_per_s
        needed_per_s = decision.needed_per_s
        assert (decision.target - 1) * each_per_s < needed_per_s <= decision.target * each_per_s
        last_carries[tier] = needed_per_s - (decision.target - 1) * each_per_s
    first, second = sorted(last_carries, key=lambda tier: last_carries[tier])
    assert last_carries[second] > 1.5 * last_carries[first]
    plane.gpus = sum(decision.target for decision in free.values()) - 1.0
    short = plane.tick(**both)
    assert (short[first].shortfall, short[second].shortfall) == (1, 0)


def test_a_tier_that_is_woken_gains_a_whole_replica() -> None:
    plane = Busy(rule("a"), rule("sleeper", min_replicas=0, idle_to_zero_s=60.0))
    plane.targets["sleeper"] = 0
    busy = plane.run(600, a=40.0, sleeper=0.0)["a"]
    plane.gpus = float(busy.target)
    waits = replace(plane.seen("sleeper", 0.0), now_s=plane.now_s + 5.0, queued=known_now(1.0))
    a, sleeper = plane.round.decide([replace(plane.seen("a", 40.0), now_s=waits.now_s), waits], plane.gpus)
    assert (sleeper.target, a.shortfall) == (1, 1), "the last replica of the other carries less"


def test_an_override_takes_precedence_over_the_budget() -> None:
    plane = Plane(rule("a", priority=9), rule("b"), gpus=4.0)
    plane.run(600, a=60.0, b=1.0)
    seen = [plane.seen("a", 60.0), plane.seen("b", 1.0, override=3)]
    by_tier = {decision.tier: decision for decision in plane.round.decide(seen, 4.0)}
    assert (by_tier["a"].target, by_tier["b"].target) == (1, 3)
    assert by_tier["b"].reason == "set by hand"
    over = plane.round.decide([plane.seen("b", 1.0, override=9)], 4.0)
    assert over[0].target == 9


def test_a_tier_with_unknown_signals_retains_its_replicas_when_gpus_are_short() -> None:
    plane = Plane(rule("a"), rule("b", priority=1), gpus=5.0)
    assert plane.run(600, a=60.0, b=1.0)["a"].target == 4
    seen = [plane.seen("a", 60.0, queued=missing("gateway gone")), plane.seen("b", 80.0)]
    by_tier = {decision.tier: decision for decision in plane.round.decide(seen, 5.0)}
    assert (by_tier["a"].target, by_tier["b"].target) == (4, 1)


def test_tiers_without_gpus_are_not_limited_by_the_budget() -> None:
    plane = Plane(rule("cpu", gpus_per_replica=0.0), rule("b", priority=1), gpus=1.0)
    decisions = plane.run(600, cpu=60.0, b=60.0)
    assert decisions["cpu"].target == decisions["cpu"].requested > 2
    assert decisions["b"].target == 1


def test_schedules_count_as_minimums_of_the_budget() -> None:
    night = (Schedule(0, 3600, min_replicas=3),)
    plane = Plane(rule("a", schedules=night), rule("b", priority=1), gpus=5.0)
    decisions = plane.run(600, a=0.0, b=90.0)
    assert (decisions["a"].target, decisions["b"].target) == (3, 2)


def test_rules_change_at_run_time_and_what_was_learned_remains() -> None:
    plane = Plane(rule("a"), rule("b"))
    plane.run(600, a=60.0, b=60.0)
    scaler = plane.round.scaler("a")
    plane.round.configure([rule("a", max_replicas=2, cold_start_s=120.0)])
    assert plane.round.scaler("a") is scaler
    assert scaler.forecaster.horizon_s == 120.0
    decision = plane.tick(a=60.0)["a"]
    assert decision.target == 2
    assert decision.forecast is not None
    assert decision.forecast.mean_per_s == pytest.approx(60.0, rel=0.1)
    with pytest.raises(KeyError):
        plane.round.decide([plane.seen("b", 1.0)])
    plane.round.configure([rule("a", prior=EngineSpeed(0.01, 0.001, 0.0001))])
    assert plane.round.scaler("a") is not scaler


def test_a_refused_order_does_not_start_the_cool_down() -> None:
    plane = Plane(rule("a", cool_down_up_s=600.0), gpus=1.0)
    assert plane.run(300, a=60.0)["a"].target == 1
    plane.gpus = None
    assert plane.tick(a=60.0)["a"].target > 1


def test_while_a_node_is_lost_the_running_part_of_a_minimum_remains() -> None:
    plane = Plane(rule("a", min_replicas=2), rule("b", min_replicas=2, priority=1), gpus=8.0)
    plane.targets = {"a": 2, "b": 2}
    # The important tier's replicas were on the node that is away.
    seen = [plane.seen("a", 1.0), plane.seen("b", 1.0, ready=0)]
    decisions = plane.round.decide(seen, 2.0)
    assert [decision.target for decision in decisions] == [2, 2]
    assert [decision.direction for decision in decisions] == [ScaleDirection.STAY, ScaleDirection.STAY]
