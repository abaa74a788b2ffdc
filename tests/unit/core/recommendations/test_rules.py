from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.autoscaling.capacity import EngineSpeed, LatencyBounds, ReplicaCapacity
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.recommendations.rules import (
    Breach,
    Figure,
    Recommendation,
    RecommendationKind,
    Score,
    Thresholds,
    TierCondition,
    latency_limit_ms,
    recommend,
    score,
)
from controlplane.core.telemetry.series import Freshness, Signal, known_now, missing

CALM = TierCondition(
    "balanced",
    replicas=2,
    gpu_ratio=known_now(0.5),
    memory_ratio=known_now(0.6),
    latency_ms=known_now(900.0),
    queue=known_now(0.0),
    error_ratio=known_now(0.0),
    requests_per_s=known_now(5.0),
    attainment=known_now(0.999),
    capacity=ReplicaCapacity(EngineSpeed(0.02, 0.001, 0.0001)),
    mean_request=RequestShape(500.0, 100.0),
    bounds=LatencyBounds(16.0),
)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"gpu_ratio": known_now(0.97)}, RecommendationKind.SCALE_OUT, "97%, over 95%"),
        ({"memory_ratio": known_now(0.99)}, RecommendationKind.SCALE_OUT, "memory is 99%"),
        ({"queue": known_now(51.0)}, RecommendationKind.SCALE_OUT, "51 requests wait, over 50"),
        ({"latency_ms": known_now(3100.0)}, RecommendationKind.SCALE_UP, "3100 ms, over 3000 ms"),
        ({"attainment": known_now(0.9)}, RecommendationKind.SCALE_UP, "90.0% of the requests keep the SLO"),
        (
            {"latency_ms": known_now(3100.0), "queue": known_now(60.0)},
            RecommendationKind.SCALE_OUT,
            "60 requests wait",
        ),
        ({"error_ratio": known_now(0.2)}, RecommendationKind.SCALE_OUT, "20% of the requests fail"),
        (
            {"gpu_ratio": known_now(0.1), "requests_per_s": known_now(0.5)},
            RecommendationKind.SCALE_DOWN,
            "10%, under 20%",
        ),
    ],
)
def test_each_threshold(change: dict[str, Any], kind: RecommendationKind, words: str) -> None:
    (found,) = recommend([replace(CALM, **change)])
    assert found.kind is kind
    assert words in " ".join(found.reasons)
    assert found.suggestion
    assert 0.0 < found.confidence < 1.0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gpu_ratio": known_now(0.95)},
        {"queue": known_now(50.0)},
        {"gpu_ratio": known_now(0.1)},
        {"requests_per_s": known_now(0.1)},
        {"gpu_ratio": Signal(Freshness.STALE, 0.99, 9.0), "queue": missing("gone")},
        {"gpu_ratio": missing("gone"), "requests_per_s": known_now(0.0)},
        {"gpu_ratio": known_now(0.0), "requests_per_s": Signal(Freshness.STALE, 0.0, 9.0)},
        {"gpu_ratio": known_now(0.0), "requests_per_s": known_now(0.0), "replicas": 1},
    ],
)
def test_without_a_breach_nothing_is_recommended(change: dict[str, Any]) -> None:
    assert recommend([replace(CALM, **change)]) == ()


def test_the_effect_of_more_replicas_is_predicted() -> None:
    (found,) = recommend([replace(CALM, queue=known_now(200.0), requests_per_s=known_now(30.0), replicas=2)])
    assert found.replicas > 3
    assert found.effect.gpus == found.replicas - 2
    assert found.effect.attainment == 1.0
    assert found.effect.latency_ms is not None
    assert found.effect.latency_ms < 16 * 1000


def test_the_predicted_latency_is_the_measured_percentile_scaled() -> None:
    hot = replace(
        CALM, gpu_ratio=known_now(0.99), requests_per_s=known_now(6.0), latency_ms=known_now(9000.0)
    )
    (found,) = recommend([hot])
    assert found.replicas == 3
    assert hot.capacity is not None
    assert hot.mean_request is not None
    change = hot.capacity.residence_s(6.0 / 3, hot.mean_request) / hot.capacity.residence_s(
        6.0 / 2, hot.mean_request
    )
    assert 0.5 < change < 1.0
    assert found.effect.latency_ms == pytest.approx(9000.0 * change)
    # 12 queued requests at 6 a second are 2 s of it, and none waits afterwards.
    (found,) = recommend([replace(hot, queue=known_now(12.0))])
    assert found.effect.latency_ms == pytest.approx(7000.0 * change)
    # What is left is never less than one request takes.
    (found,) = recommend([replace(hot, queue=known_now(1000.0))])
    assert found.effect.latency_ms == pytest.approx(
        hot.capacity.residence_s(6.0 / 3, hot.mean_request) * 1000
    )


@pytest.mark.parametrize(
    "change",
    [
        {"latency_ms": missing("gone")},
        {"mean_request": RequestShape(1.0, 0.0)},
        {"requests_per_s": missing("gone")},
    ],
)
def test_without_figures_there_is_no_prediction(change: dict[str, Any]) -> None:
    (found,) = recommend([replace(CALM, gpu_ratio=known_now(0.99), **change)])
    assert found.effect.latency_ms is None


def test_without_free_gpus_an_idle_tier_gives_one() -> None:
    idle = replace(CALM, tier="light", gpu_ratio=known_now(0.05), requests_per_s=known_now(0.0), replicas=3)
    hot = replace(CALM, gpu_ratio=known_now(0.99))
    (found,) = recommend([idle, hot], free_gpus=0.0)
    assert found.kind is RecommendationKind.REBALANCE
    assert found.instance == "balanced"
    assert "take a replica from tier 'light'" in found.suggestion
    assert found.effect.gpus == 0.0
    assert {entry.kind for entry in recommend([idle, hot], free_gpus=4.0)} == {
        RecommendationKind.SCALE_OUT,
        RecommendationKind.SCALE_DOWN,
    }


def test_a_small_share_grows_before_the_parallel_size() -> None:
    slow = replace(CALM, latency_ms=known_now(5000.0))
    (share,) = recommend([replace(slow, gpus_per_replica=0.25)])
    assert "0.5 of a GPU instead of 0.25" in share.suggestion
    (parallel,) = recommend([slow])
    assert "tensor_parallel_size to 2 instead of 1" in parallel.suggestion


def test_at_max_replicas_it_suggests_raising_the_bound() -> None:
    (found,) = recommend([replace(CALM, queue=known_now(99.0), replicas=10)])
    assert found.replicas == 10
    assert "raise the most replicas" in found.suggestion


@pytest.mark.parametrize(
    ("slo", "limit_ms"),
    [
        (None, 3000.0),
        (Slo(), math.inf),
        (Slo(total_s=8.0), 8000.0),
        (Slo(total_s=8.0, attainment=0.95), 8000.0),
        # A tenth of the answers may take longer, so the 95th percentile does.
        (Slo(total_s=8.0, attainment=0.9), math.inf),
    ],
)
def test_the_latency_limit_follows_from_the_slo(slo: Slo | None, limit_ms: float) -> None:
    assert latency_limit_ms(slo) == limit_ms


def test_a_gpu_that_is_busy_without_a_request_is_a_weak_reason() -> None:
    busy = replace(
        CALM, gpu_ratio=known_now(0.97), requests_per_s=known_now(0.0), attainment=missing("no request")
    )
    (weak,) = recommend([busy])
    assert weak.reasons[-1] == "but no request came: see first what else keeps the GPU busy"
    assert weak.confidence == 0.2
    (unknown,) = recommend([replace(busy, requests_per_s=missing("gone"))])
    assert unknown.confidence > 0.2


def test_a_configured_threshold_applies_to_all_tiers() -> None:
    slow = replace(CALM, latency_ms=known_now(5000.0))
    promised = replace(slow, latency_limit_ms=math.inf)
    assert [item.reasons[0] for item in recommend([slow])] == ["latency is 5000 ms, over 3000 ms"]
    assert recommend([promised]) == ()
    assert recommend([replace(promised, latency_limit_ms=6000.0)]) == ()
    (missed,) = recommend([replace(promised, latency_limit_ms=4000.0)])
    assert missed.reasons[0] == "latency is 5000 ms, over 4000 ms"
    for tier in (slow, promised):
        (found,) = recommend([tier], Thresholds(latency_ms=4500.0))
        assert found.reasons[0] == "latency is 5000 ms, over 4500 ms"
        assert recommend([tier], Thresholds(latency_ms=5500.0)) == ()


def test_a_tier_that_is_only_busy_is_a_weak_reason() -> None:
    busy = replace(CALM, gpu_ratio=known_now(0.97))
    (weak,) = recommend([busy])
    assert weak.reasons == ("GPU utilisation is 97%, over 95%", "but the SLO is met and nothing waits")
    assert weak.confidence == 0.2
    changes: tuple[dict[str, Any], ...] = (
        {"queue": known_now(1.0)},
        {"queue": missing("gone")},
        {"attainment": known_now(0.98)},
        {"attainment": missing("gone")},
        {"latency_ms": known_now(3100.0)},
        {"kv_ratio": known_now(0.99)},
        {"error_ratio": known_now(0.2)},
    )
    for change in changes:
        (found,) = recommend([replace(busy, **change)])
        assert found.confidence > 0.4, change
        assert not any("SLO is met" in reason for reason in found.reasons)


def scored(recommendation: Recommendation, tier: TierCondition, *, applied: bool = False) -> Score:
    result = score(recommendation, tier, applied=applied)
    assert result is not None
    return result


def test_a_followed_recommendation_is_scored_by_its_prediction() -> None:
    (found,) = recommend([replace(CALM, queue=known_now(200.0), requests_per_s=known_now(10.0))])
    predicted = found.effect.latency_ms
    assert predicted is not None
    near = replace(CALM, latency_ms=known_now(predicted), attainment=known_now(1.0))
    assert scored(found, near, applied=True).value == pytest.approx(1.0)
    far = replace(CALM, latency_ms=known_now(predicted * 50), attainment=known_now(0.5))
    assert not scored(found, far, applied=True).right


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu_ratio": known_now(0.97)}, "GPU utilisation is 97%, over 95%"),
        ({"memory_ratio": known_now(0.99)}, "GPU memory is 99% used, over 95%"),
        ({"kv_ratio": known_now(0.99)}, "a KV cache is 99% full, over 95%"),
        ({"queue": known_now(51.0)}, "51 requests wait, over 50"),
        ({"latency_ms": known_now(3100.0)}, "latency is 3100 ms, over 3000 ms"),
        ({"error_ratio": known_now(0.2)}, "20% of the requests fail, over 10%"),
    ],
)
def test_one_not_followed_was_right_while_its_breaches_still_exist(
    change: dict[str, Any], words: str
) -> None:
    calm = replace(CALM, kv_ratio=known_now(0.1))
    (found,) = recommend([replace(calm, **change)])
    still = scored(found, replace(calm, **change))
    assert (still.right, still.value) == (True, 1.0)
    assert still.reason == f"not applied; still {words}; attainment is 99.9%"
    over = scored(found, calm)
    assert (over.right, over.value) == (False, 0.0)
    assert over.reason == "not applied; attainment is 99.9%, and what it named is over"
    assert scored(found, replace(calm, attainment=known_now(0.9))).right, "the SLO is missed"
    other = replace(calm, queue=known_now(70.0), latency_ms=known_now(3200.0), gpu_ratio=known_now(0.99))
    named = {breach.figure for breach in found.named}
    elsewhere = bool(named & {Figure.QUEUE, Figure.LATENCY, Figure.LOAD})
    assert scored(found, other).right is elsewhere, "other breaches do not count"


def test_stale_figures_give_no_score() -> None:
    (found,) = recommend([replace(CALM, queue=known_now(99.0))])
    assert found.named == (Breach(Figure.QUEUE, 50.0),)
    stale = Signal(Freshness.STALE, 99.0, 9.0)
    assert score(found, replace(CALM, queue=stale), applied=False) is None
    assert scored(found, replace(CALM, queue=stale, attainment=known_now(0.5))).right
    gone = missing("gone")
    for blind in (
        replace(CALM, queue=known_now(99.0), latency_ms=gone),
        replace(CALM, queue=known_now(99.0), attainment=gone),
    ):
        for applied in (False, True):
            assert score(found, blind, applied=applied) is None


def test_scale_down_was_right_where_the_slo_is_met() -> None:
    (found,) = recommend([replace(CALM, gpu_ratio=known_now(0.1), requests_per_s=known_now(0.5))])
    assert (found.kind, found.named) == (RecommendationKind.SCALE_DOWN, ())
    assert scored(found, CALM).right
    assert not scored(found, replace(CALM, attainment=known_now(0.9))).right


def test_the_score_depends_on_the_tiers_own_goal() -> None:
    (found,) = recommend([replace(CALM, queue=known_now(200.0))])
    for goal, still_there in ((0.99, True), (0.9, False)):
        result = scored(found, replace(CALM, attainment=known_now(0.95), goal=goal))
        assert result.right is still_there
    lenient = replace(CALM, attainment=known_now(0.95), goal=0.9)
    strict = replace(CALM, tier="strict", attainment=known_now(0.998), goal=0.999)
    (only,) = recommend([lenient, strict])
    assert only.instance == "strict"
    assert only.reasons[0] == "99.8% of the requests keep the SLO, under 99.9%"
