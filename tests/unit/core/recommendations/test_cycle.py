"""When advice is given and judged."""

from __future__ import annotations

import json
from dataclasses import replace

from controlplane.core.recommendations.cycle import RecommendationChanges, RecommendationRules, Recommender
from controlplane.core.recommendations.log import RecommendationLog
from controlplane.core.recommendations.rules import RecommendationKind, Thresholds, TierCondition
from controlplane.core.telemetry.series import known_now, missing

RULES = RecommendationRules(interval_s=300.0, score_after_s=600.0)


CALM = TierCondition(
    "small",
    replicas=2,
    gpu_ratio=known_now(0.5),
    latency_ms=known_now(900.0),
    queue=known_now(0.0),
    error_ratio=known_now(0.0),
    requests_per_s=known_now(5.0),
    attainment=known_now(1.0),
)
FULL = replace(CALM, queue=known_now(99.0), attainment=known_now(0.5))
SLOW = replace(CALM, latency_ms=known_now(5000.0))


class Run:
    """An adviser that is asked at given times."""

    def __init__(self, most: int = 200) -> None:
        self.adviser = Recommender(RecommendationLog(most))

    def at(self, now_s: float, *tiers: TierCondition, gpus: float | None = None) -> RecommendationChanges:
        found = {tier.tier: tier for tier in tiers}
        return self.adviser.look(found, RULES, gpus, now_s=now_s, unix_s=1000.0 + now_s)

    def kinds(self, now_s: float, *tiers: TierCondition, gpus: float | None = None) -> list[str]:
        return [item.advice.kind.value for item in self.at(now_s, *tiers, gpus=gpus).new]


def test_a_new_breach_is_advised_on_at_once_and_an_open_advice_not_again() -> None:
    run = Run()
    assert run.kinds(0.0, CALM) == []
    assert run.kinds(5.0, FULL) == ["scale_out"]
    assert run.kinds(10.0, FULL) == []
    assert run.kinds(15.0, CALM) == []
    assert run.kinds(20.0, FULL) == [], "the advice of before is open"
    assert run.kinds(25.0, SLOW) == ["scale_up"], "another trouble is another advice"
    (first, _) = run.adviser.book.given
    assert first.unix_s == first.again_unix_s - 15.0 == 1005.0


def test_what_lasts_is_said_again_every_interval_and_after_it_was_judged() -> None:
    run = Run()
    run.at(0.0, FULL)
    run.at(200.0, FULL)
    assert run.adviser.book.given[0].again_unix_s == 1000.0
    run.at(300.0, FULL)
    assert run.adviser.book.given[0].again_unix_s == 1300.0
    assert run.at(599.0, FULL) == RecommendationChanges()
    done = run.at(600.0, FULL)
    assert [item.number for item in done.judged] == [1]
    assert [item.number for item in done.new] == [2]


def test_each_tier_is_advised_on_and_judged_by_its_own_slo() -> None:
    run = Run()
    ok = replace(CALM, tier="lenient", queue=known_now(99.0), attainment=known_now(0.95), goal=0.9)
    bad = replace(ok, tier="strict", goal=0.99)
    run.at(0.0, ok, bad)
    # Nothing waits any more: what is left is whether each attains its own goal.
    later = [replace(tier, queue=known_now(0.0)) for tier in (ok, bad)]
    judged = {item.advice.instance: item.score for item in run.at(600.0, *later).judged}
    assert {tier: score.right for tier, score in judged.items() if score} == {
        "lenient": False,
        "strict": True,
    }
    reasons = {item.advice.instance: item.advice.reasons for item in run.adviser.book.given}
    assert any("keep the SLO" in reason for reason in reasons["strict"])
    assert not any("keep the SLO" in reason for reason in reasons["lenient"])


def test_what_is_not_measured_is_waited_for_and_then_ends_unjudged() -> None:
    run = Run()
    run.at(0.0, FULL)
    blind = replace(FULL, attainment=missing("gone"))
    assert run.at(600.0, blind).judged == ()
    assert run.at(1799.0, blind).judged == ()
    (ended,) = run.at(1800.0, blind).judged
    assert (ended.applied, ended.score) == (False, None)
    assert run.adviser.book.record().judged == 0


def test_a_tier_that_is_gone_is_not_taken_for_one_that_followed() -> None:
    run = Run()
    run.at(0.0, FULL)
    assert run.at(600.0).judged == ()
    (ended,) = run.at(1800.0).judged
    assert (ended.applied, ended.score) == (False, None)


def test_free_gpus_are_what_the_tiers_do_not_hold() -> None:
    idle = replace(CALM, tier="idle", gpu_ratio=known_now(0.0), requests_per_s=known_now(0.0))
    assert Run().kinds(0.0, FULL, idle, gpus=4.0) == ["rebalance"]
    assert set(Run().kinds(0.0, FULL, idle, gpus=5.0)) == {"scale_out", "scale_down"}
    assert set(Run().kinds(0.0, FULL, idle)) == {"scale_out", "scale_down"}


def test_two_tiers_with_different_slos_do_not_take_from_the_same_idle_one() -> None:
    idle = replace(CALM, tier="idle", gpu_ratio=known_now(0.0), requests_per_s=known_now(0.0))
    other = replace(FULL, tier="other", goal=0.9)
    assert sorted(Run().kinds(0.0, FULL, other, idle, gpus=6.0)) == ["rebalance", "scale_out"]


def test_thresholds_are_the_rules() -> None:
    rules = RecommendationRules(Thresholds(queue=100.0))
    assert Recommender().look({"small": CALM}, rules, None, now_s=0.0, unix_s=0.0) == RecommendationChanges()
    calm = replace(FULL, attainment=known_now(1.0))
    assert Recommender().look({"small": calm}, rules, None, now_s=0.0, unix_s=0.0) == RecommendationChanges()
    assert len(Recommender().look({"small": calm}, RULES, None, now_s=0.0, unix_s=0.0).new) == 1


def test_the_book_forgets_the_oldest_and_what_was_open_of_it() -> None:
    run = Run(most=2)
    for number in range(4):
        run.at(number * 1.0, replace(FULL, tier=f"t{number}"))
    assert [item.number for item in run.adviser.book.given] == [3, 4]
    assert [item.number for item in run.adviser.book.open] == [3, 4]
    assert run.kinds(9.0, replace(FULL, tier="t0")) == ["scale_out"], "nobody remembers that it is open"


def test_a_book_survives_as_json() -> None:
    run = Run()
    run.at(0.0, FULL)
    run.at(600.0, FULL)
    kept = json.loads(json.dumps(run.adviser.book.values()))
    again = RecommendationLog()
    again.restore(kept)
    assert again.given == run.adviser.book.given
    assert again.open == run.adviser.book.open
    assert again.given[0].advice.kind is RecommendationKind.SCALE_OUT
    later = Recommender(again)
    found = later.look({"small": FULL}, RULES, None, now_s=0.0, unix_s=1700.0)
    assert found == RecommendationChanges(), "what was open still is"
