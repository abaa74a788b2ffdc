from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.decision import ScaleDirection, ScalingDecision, TierObservation
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.autoscaling.schedules import Schedule
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.telemetry.series import Freshness, Signal, known_now, missing

SPEED = EngineSpeed(0.02, 0.001, 0.0001)
REQUEST = RequestShape(500.0, 100.0)
MONDAY_UNIX_S = 1_767_571_200.0
STALE = Signal(Freshness.STALE, 0.0, 10.0, "the last sample is 10 s old")
GONE = missing("no sample for 60 s")


class Harness:
    """A tier that gets what it asks for at once."""

    def __init__(self, rule: ScalingRule, target: int = 1) -> None:
        self.scaler = TierScaler(rule)
        self.target = target
        self.now_s = 0.0
        self.decision: ScalingDecision

    def tick(
        self,
        rate: float,
        *,
        in_flight: float | None = None,
        queued: float = 0.0,
        signals: dict[str, Any] | None = None,
        **more: Any,
    ) -> int:
        self.now_s += 5.0
        flight = in_flight if in_flight is not None else rate * 2.5
        seen = TierObservation(
            "light", self.now_s, MONDAY_UNIX_S + self.now_s, self.target, self.target, 5.0,
            known_now(rate * 5.0), known_now(flight), known_now(queued),
        )  # fmt: skip
        self.decision = self.scaler.decide(replace(seen, **more, **(signals or {})))
        self.target = self.decision.target
        return self.target

    def run(self, rate: float, seconds: float) -> int:
        for _ in range(int(seconds / 5)):
            self.tick(rate)
        return self.target


RULE = ScalingRule("light", SPEED, REQUEST, max_replicas=50, cold_start_s=30.0, sequences=16.0)


def test_it_scales_out_and_in_with_the_load() -> None:
    tier = Harness(RULE)
    low = tier.run(2.0, 900)
    high = tier.run(40.0, 900)
    assert high > 3 * low
    # One tick of quiet takes nothing away; quiet for longer than the hold time does.
    assert tier.tick(2.0) == high
    assert tier.run(2.0, 1800) < high / 2


def test_every_decision_has_a_reason_with_figures() -> None:
    tier = Harness(RULE)
    tier.tick(2.0)
    assert tier.decision is not None
    assert "requests/s are forecast" in tier.decision.reason
    tier.run(30.0, 60)
    assert tier.decision.forecast is not None
    assert 0.0 < tier.decision.confidence < 1.0


def test_a_queue_that_will_not_clear_by_itself_orders_replicas() -> None:
    tier = Harness(RULE)
    tier.run(2.0, 600)
    before = tier.target
    after = tier.tick(2.0, in_flight=16.0 * before, queued=2000.0)
    assert after > before
    assert "wait" in tier.decision.reason


@pytest.mark.parametrize("signal", ["arrivals", "in_flight", "queued"])
@pytest.mark.parametrize("how", [STALE, GONE])
def test_unknown_signals_never_scale_down(signal: str, how: Signal) -> None:
    tier = Harness(RULE)
    high = tier.run(40.0, 900)
    for _ in range(500):
        assert tier.tick(0.0, signals={signal: how}) == high
    assert "no scale-down without fresh signals" in tier.decision.reason


def test_a_new_scaler_does_not_scale_down_before_it_has_observed_for_a_while() -> None:
    tier = Harness(RULE, target=20)
    assert tier.run(1.0, 290) == 20
    assert tier.run(1.0, 600) < 20


def test_targets_stay_inside_the_bounds() -> None:
    tier = Harness(replace(RULE, min_replicas=2, max_replicas=5), target=2)
    assert tier.run(1000.0, 300) == 5
    assert "bounds" in tier.decision.reason
    assert tier.run(0.0, 7200) == 2


def test_a_target_above_the_maximum_is_lowered_at_once() -> None:
    tier = Harness(replace(RULE, max_replicas=5), target=9)
    assert tier.tick(100.0) == 5


def test_steps_are_limited() -> None:
    tier = Harness(replace(RULE, step_up=2, step_down=1))
    for _ in range(4):
        before = tier.target
        assert tier.tick(100.0) == before + 2
    tier.run(0.0, 1200)
    changes = []
    for _ in range(10):
        before = tier.target
        changes.append(before - tier.tick(0.0))
    assert max(changes) <= 1


def test_cool_downs_separate_changes() -> None:
    tier = Harness(replace(RULE, cool_down_up_s=60.0, cool_down_down_s=120.0))
    moves: list[tuple[float, ScaleDirection]] = []
    for rate in [5.0] * 60 + [20.0] * 60 + [60.0] * 60 + [1.0] * 400:
        tier.tick(rate)
        if tier.decision.direction is not ScaleDirection.STAY:
            moves.append((tier.now_s, tier.decision.direction))
    ups = [at_s for at_s, move in moves if move is ScaleDirection.UP]
    downs = [at_s for at_s, move in moves if move is ScaleDirection.DOWN]
    assert ups
    assert downs
    assert all(later - earlier >= 60.0 for earlier, later in pairwise(ups))
    assert all(later - earlier >= 120.0 for earlier, later in pairwise(downs))


def test_zero_when_idle_long_enough_and_back_for_one_request() -> None:
    tier = Harness(replace(RULE, min_replicas=0, idle_to_zero_s=600.0))
    tier.run(1.0, 400)
    assert tier.run(0.0, 590) >= 1
    assert tier.run(0.0, 900) == 0
    assert tier.tick(0.0, queued=1.0) == 1


def test_a_tier_with_a_minimum_is_never_empty() -> None:
    tier = Harness(RULE)
    assert tier.run(0.0, 7200) == 1


def test_a_schedule_raises_the_floor_before_it_begins() -> None:
    rush = Schedule(3600, 7200, min_replicas=6)
    tier = Harness(replace(RULE, schedules=(rush,)))
    assert tier.run(0.5, 3560) == 1
    assert tier.run(0.5, 30) == 6
    assert tier.run(0.5, 3600) == 6
    assert tier.run(0.5, 1200) == 1


def test_an_override_takes_precedence() -> None:
    tier = Harness(RULE, target=3)
    assert tier.tick(500.0, override=2) == 2
    assert tier.decision.reason == "set by hand"
    assert tier.tick(0.0, override=9, arrivals=GONE) == 9


def test_the_factor_follows_the_misses_of_requests_that_waited() -> None:
    tier = Harness(RULE)
    tier.run(10.0, 600)
    start = tier.scaler.headroom.correction
    for _ in range(100):
        tier.tick(10.0, queued=5.0, finished=50.0, missed=5.0)
    raised = tier.scaler.headroom.correction
    assert raised > start + 0.1
    assert tier.scaler.headroom.factor > 1.0
    for _ in range(5000):
        tier.tick(10.0, finished=50.0, missed=0.0)
    assert tier.scaler.headroom.correction < start


def test_misses_while_nothing_waits_order_no_replicas() -> None:
    tier = Harness(RULE)
    tier.run(10.0, 600)
    before = tier.target
    start_allowed = tier.scaler.headroom.allowed
    for _ in range(1000):
        tier.tick(10.0, finished=50.0, missed=5.0)
    assert tier.scaler.headroom.correction < 0.05
    assert tier.target == before
    # It uses up what is allowed, but never all of it.
    assert 0.0 < tier.scaler.headroom.allowed < start_allowed


def test_one_burst_of_misses_changes_the_factor_only_slightly() -> None:
    tier = Harness(RULE)
    tier.run(10.0, 600)
    start = tier.scaler.headroom.correction
    for _ in range(12):
        tier.tick(10.0, queued=50.0, finished=50.0, missed=50.0)
    assert 0.0 < tier.scaler.headroom.correction - start < 0.05


def test_the_forecast_of_a_single_tick_orders_no_replicas() -> None:
    tier = Harness(RULE, target=2)
    assert tier.tick(500.0, in_flight=10.0) == 2
    assert tier.run(500.0, 60) > 10


def test_a_rush_of_seconds_is_not_assumed_to_last_for_a_long_cold_start() -> None:
    tier = Harness(replace(RULE, cold_start_s=600.0, max_replicas=500))
    tier.run(10.0, 3600)
    held = tier.target * tier.scaler.each_per_s
    tier.tick(60.0, in_flight=16.0 * tier.target, queued=50.0)
    forecast = tier.decision.forecast
    assert forecast is not None
    excess_per_s = forecast.surely_per_s - forecast.mean_per_s
    assert excess_per_s > 1.0
    # If the rush lasted until the replicas are there, its whole excess would wait for them.
    left = 50.0 + (forecast.surely_per_s - held) * 600.0
    assert tier.target * tier.scaler.each_per_s < left / 30.0 / 2


def test_another_rule_loses_nothing_of_what_was_learned() -> None:
    tier = Harness(RULE)
    tier.run(10.0, 7200)
    factor, forecaster = tier.scaler.headroom.factor, tier.scaler.forecaster
    # A newly measured cold start is another rule, too.
    tier.scaler.adopt(replace(RULE, cold_start_s=33.0, slo=Slo(attainment=0.98)))
    tier.tick(10.0)
    assert tier.scaler.headroom.factor == pytest.approx(factor, rel=0.06)
    assert tier.scaler.headroom.factor < 1.15
    assert tier.scaler.forecaster is forecaster
