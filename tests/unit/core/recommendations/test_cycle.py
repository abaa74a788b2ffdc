"""When recommendations are issued and scored."""

from __future__ import annotations

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
    """A recommender that is updated at given times."""

    def __init__(self, limit: int = 200) -> None:
        self.recommender = Recommender(RecommendationLog(limit))
        self.log = self.recommender.log

    def at(self, now_s: float, *tiers: TierCondition, gpus: float | None = None) -> RecommendationChanges:
        found = {tier.tier: tier for tier in tiers}
        return self.recommender.update(found, RULES, gpus, now_s=now_s, unix_s=1000.0 + now_s)

    def kinds(self, now_s: float, *tiers: TierCondition, gpus: float | None = None) -> list[str]:
        return [item.recommendation.kind.value for item in self.at(now_s, *tiers, gpus=gpus).issued]


def test_a_new_breach_is_recommended_on_at_once_and_an_open_recommendation_not_again() -> None:
    run = Run()
    assert run.kinds(0.0, CALM) == []
    assert run.kinds(5.0, FULL) == ["scale_out"]
    assert run.kinds(10.0, FULL) == []
    assert run.kinds(15.0, CALM) == []
    assert run.kinds(20.0, FULL) == [], "the recommendation before is open"
    assert run.kinds(25.0, SLOW) == ["scale_up"], "other trouble is another recommendation"
    (first, _) = run.log.issued
    assert first.unix_s == first.again_unix_s - 15.0 == 1005.0


def test_what_still_applies_is_noted_every_interval_and_issued_again_once_scored() -> None:
    run = Run()
    run.at(0.0, FULL)
    run.at(200.0, FULL)
    assert run.log.issued[0].again_unix_s == 1200.0, "at every update, within half a minute"
    run.at(300.0, FULL)
    assert run.log.issued[0].again_unix_s == 1300.0
    assert run.at(599.0, FULL) == RecommendationChanges()
    done = run.at(600.0, FULL)
    assert [item.number for item in done.scored] == [1]
    assert [item.number for item in done.issued] == [2]


def test_each_tiers_recommendations_and_scores_depend_on_its_own_slo() -> None:
    run = Run()
    ok = replace(CALM, tier="lenient", queue=known_now(99.0), attainment=known_now(0.95), goal=0.9)
    bad = replace(ok, tier="strict", goal=0.99)
    run.at(0.0, ok, bad)
    # Nothing waits any more, so the score depends on whether each tier reaches its own goal.
    later = [replace(tier, queue=known_now(0.0)) for tier in (ok, bad)]
    scores = {item.recommendation.instance: item.score for item in run.at(600.0, *later).scored}
    assert {tier: score.right for tier, score in scores.items() if score} == {
        "lenient": False,
        "strict": True,
    }
    reasons = {item.recommendation.instance: item.recommendation.reasons for item in run.log.issued}
    assert any("keep the SLO" in reason for reason in reasons["strict"])
    assert not any("keep the SLO" in reason for reason in reasons["lenient"])


def test_scoring_waits_for_missing_figures_and_then_closes_without_a_score() -> None:
    run = Run()
    run.at(0.0, FULL)
    blind = replace(FULL, attainment=missing("gone"))
    assert run.at(600.0, blind).scored == ()
    assert run.at(1799.0, blind).scored == ()
    (ended,) = run.at(1800.0, blind).scored
    assert (ended.applied, ended.score) == (False, None)
    assert run.log.record().judged == 0


def test_a_tier_that_is_gone_did_not_follow() -> None:
    run = Run()
    run.at(0.0, FULL)
    assert run.at(600.0).scored == ()
    (ended,) = run.at(1800.0).scored
    assert (ended.applied, ended.score) == (False, None)


def test_free_gpus_are_what_the_tiers_do_not_hold() -> None:
    idle = replace(CALM, tier="idle", gpu_ratio=known_now(0.0), requests_per_s=known_now(0.0))
    assert Run().kinds(0.0, FULL, idle, gpus=4.0) == ["rebalance"]
    assert set(Run().kinds(0.0, FULL, idle, gpus=5.0)) == {"scale_out", "scale_down"}
    assert set(Run().kinds(0.0, FULL, idle)) == {"scale_out", "scale_down"}


def test_two_tiers_do_not_take_from_the_same_idle_one() -> None:
    idle = replace(CALM, tier="idle", gpu_ratio=known_now(0.0), requests_per_s=known_now(0.0))
    other = replace(FULL, tier="other", goal=0.9)
    assert sorted(Run().kinds(0.0, FULL, other, idle, gpus=6.0)) == ["rebalance", "scale_out"]


def test_thresholds_come_with_the_rules() -> None:
    def issued(tier: TierCondition, rules: RecommendationRules) -> int:
        return len(Recommender().update({"small": tier}, rules, None, now_s=0.0, unix_s=0.0).issued)

    rules = RecommendationRules(Thresholds(queue=100.0))
    calm = replace(FULL, attainment=known_now(1.0))
    assert issued(CALM, rules) == issued(calm, rules) == 0
    assert issued(calm, RULES) == 1


def test_the_log_drops_the_oldest_even_if_it_is_open() -> None:
    run = Run(limit=2)
    for number in range(4):
        run.at(number * 1.0, replace(FULL, tier=f"t{number}"))
    assert [item.number for item in run.log.issued] == [3, 4]
    assert [item.number for item in run.log.open] == [3, 4]
    assert run.kinds(9.0, replace(FULL, tier="t0")) == ["scale_out"], "the open one was dropped"


def test_a_log_is_restored_with_its_open_recommendations() -> None:
    run = Run()
    run.at(0.0, FULL)
    run.at(600.0, FULL)
    again = RecommendationLog()
    again.restore(reversed(run.log.issued))
    assert again.issued == run.log.issued
    assert again.open == run.log.open
    assert again.issued[0].recommendation.kind is RecommendationKind.SCALE_OUT
    later = Recommender(again)
    found = later.update({"small": FULL}, RULES, None, now_s=0.0, unix_s=1700.0)
    assert found == RecommendationChanges(), "what was open still is"


def test_there_is_one_recommendation_at_a_time_for_a_tier() -> None:
    run = Run()
    assert run.kinds(0.0, FULL) == ["scale_out"]
    assert run.kinds(5.0, SLOW) == ["scale_up"]
    (first, second) = run.log.issued
    assert (first.applied, first.ended) == (False, "replaced by scale_up")
    assert run.log.open == (second,)


def test_a_recommendation_that_no_longer_applies_is_no_current_one() -> None:
    run = Run()
    run.at(0.0, FULL)
    (item,) = run.log.open
    assert item.applies(1000.0 + 60.0)
    assert not item.applies(1000.0 + 130.0)


def test_a_tier_is_not_idle_seconds_after_a_start() -> None:
    idle = replace(
        CALM, replicas=2, gpu_ratio=known_now(0.0), requests_per_s=known_now(0.0), min_observed_s=600.0
    )
    run = Run()
    assert run.kinds(0.0, replace(idle, observed_s=30.0)) == []
    assert run.kinds(5.0, replace(idle, observed_s=601.0)) == ["scale_down"]
