from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.capacity import Bounds, Capacity, EngineSpeed, Work
from controlplane.core.recommendations import Kind, TierCondition, advise, score
from controlplane.core.telemetry import Freshness, Signal, missing


def fresh(value: float) -> Signal:
    return Signal(Freshness.FRESH, value, 0.0)


CALM = TierCondition(
    "balanced",
    replicas=2,
    gpu_ratio=fresh(0.5),
    memory_ratio=fresh(0.6),
    latency_ms=fresh(900.0),
    queue=fresh(0.0),
    error_ratio=fresh(0.0),
    requests_per_s=fresh(5.0),
    attainment=fresh(0.999),
    capacity=Capacity(EngineSpeed(0.02, 0.001, 0.0001)),
    work=Work(500.0, 100.0),
    bounds=Bounds(16.0),
)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"gpu_ratio": fresh(0.97)}, Kind.SCALE_OUT, "97%, over 95%"),
        ({"memory_ratio": fresh(0.99)}, Kind.SCALE_OUT, "memory is 99%"),
        ({"queue": fresh(51.0)}, Kind.SCALE_OUT, "51 requests wait, over 50"),
        ({"latency_ms": fresh(3100.0)}, Kind.SCALE_UP, "3100 ms, over 3000 ms"),
        ({"attainment": fresh(0.9)}, Kind.SCALE_UP, "90.0% of the requests keep the SLO"),
        ({"latency_ms": fresh(3100.0), "queue": fresh(60.0)}, Kind.SCALE_OUT, "60 requests wait"),
        ({"error_ratio": fresh(0.2)}, Kind.SCALE_OUT, "20% of the requests fail"),
        ({"gpu_ratio": fresh(0.1), "requests_per_s": fresh(0.5)}, Kind.SCALE_DOWN, "10%, under 20%"),
    ],
)
def test_each_threshold(change: dict[str, Signal], kind: Kind, words: str) -> None:
    (advice,) = advise([replace(CALM, **change)])
    assert advice.kind is kind
    assert words in " ".join(advice.reasons)
    assert advice.suggestion
    assert 0.0 < advice.confidence < 1.0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gpu_ratio": fresh(0.95)},
        {"queue": fresh(50.0)},
        {"gpu_ratio": fresh(0.1)},
        {"requests_per_s": fresh(0.1)},
        {"gpu_ratio": Signal(Freshness.STALE, 0.99, 9.0), "queue": missing("gone")},
        {"gpu_ratio": missing("gone"), "requests_per_s": fresh(0.0)},
        {"gpu_ratio": fresh(0.0), "requests_per_s": Signal(Freshness.STALE, 0.0, 9.0)},
        {"gpu_ratio": fresh(0.0), "requests_per_s": fresh(0.0), "replicas": 1},
    ],
)
def test_no_breach_no_advice(change: dict[str, object]) -> None:
    assert advise([replace(CALM, **change)]) == ()


def test_the_effect_of_more_replicas_is_predicted() -> None:
    (advice,) = advise([replace(CALM, queue=fresh(200.0), requests_per_s=fresh(30.0), replicas=2)])
    assert advice.replicas > 3
    assert advice.effect.gpus == advice.replicas - 2
    assert advice.effect.attainment == 1.0
    assert advice.effect.latency_ms is not None
    assert advice.effect.latency_ms < 16 * 1000


def test_without_free_gpus_an_idle_tier_gives_one() -> None:
    idle = replace(CALM, tier="light", gpu_ratio=fresh(0.05), requests_per_s=fresh(0.0), replicas=3)
    hot = replace(CALM, gpu_ratio=fresh(0.99))
    (advice,) = advise([idle, hot], free_gpus=0.0)
    assert advice.kind is Kind.REBALANCE
    assert advice.instance == "balanced"
    assert "take a replica from tier 'light'" in advice.suggestion
    assert advice.effect.gpus == 0.0
    assert {entry.kind for entry in advise([idle, hot], free_gpus=4.0)} == {Kind.SCALE_OUT, Kind.SCALE_DOWN}


def test_a_small_share_grows_before_the_parallel_size() -> None:
    slow = replace(CALM, latency_ms=fresh(5000.0))
    (share,) = advise([replace(slow, gpus_per_replica=0.25)])
    assert "0.5 of a GPU instead of 0.25" in share.suggestion
    (parallel,) = advise([slow])
    assert "tensor_parallel_size to 2 instead of 1" in parallel.suggestion


def test_at_the_bound_it_says_so() -> None:
    (advice,) = advise([replace(CALM, queue=fresh(99.0), replicas=10)])
    assert advice.replicas == 10
    assert "raise the most replicas" in advice.suggestion


def test_scores() -> None:
    (advice,) = advise([replace(CALM, queue=fresh(200.0), requests_per_s=fresh(10.0))])
    predicted = advice.effect.latency_ms
    assert predicted is not None
    assert score(advice, applied=True, latency_ms=predicted, attainment=1.0).value == pytest.approx(1.0)
    assert not score(advice, applied=True, latency_ms=predicted * 50, attainment=0.5).right
    assert score(advice, applied=False, latency_ms=9000.0, attainment=0.8).right
    assert not score(advice, applied=False, latency_ms=100.0, attainment=1.0).right
