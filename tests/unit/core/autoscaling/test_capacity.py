from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from controlplane.core.autoscaling.capacity import (
    EngineObservation,
    EngineSpeed,
    LatencyBounds,
    ReplicaCapacity,
)
from controlplane.core.domain.request import RequestShape

PRIOR = EngineSpeed(0.02, 0.001, 0.0001)
TRUTH = EngineSpeed(0.03, 0.0015, 0.0003)
REQUEST = RequestShape(500.0, 100.0)


def teach(capacity: ReplicaCapacity, truth: EngineSpeed, ticks: int = 4000) -> None:
    """Ticks of a busy engine that obeys the equation exactly; its load is another each minute."""
    for tick in range(ticks):
        batch = 2.0 + tick // 12 % 15
        prompts = 200.0 + 300.0 * (tick // 12 % 4)
        steps = (1.0 - prompts * truth.prompt_s_per_token) / (
            truth.step_s + truth.step_s_per_sequence * batch
        )
        capacity.observe(
            EngineObservation(
                generation_tokens_per_s=steps * batch,
                prompt_tokens_per_s=prompts,
                batch=batch,
                busy_ratio=1.0,
            ),
            5.0,
        )


def test_the_estimate_starts_at_the_prior() -> None:
    capacity = ReplicaCapacity(PRIOR)
    assert capacity.speed == PRIOR
    assert capacity.confidence == 0.0


def test_it_learns_the_speed_of_the_engine() -> None:
    capacity = ReplicaCapacity(PRIOR)
    teach(capacity, TRUTH)
    speed = capacity.speed
    assert speed.step_s == pytest.approx(TRUTH.step_s, rel=0.1)
    assert speed.step_s_per_sequence == pytest.approx(TRUTH.step_s_per_sequence, rel=0.1)
    assert speed.prompt_s_per_token == pytest.approx(TRUTH.prompt_s_per_token, rel=0.1)
    assert capacity.confidence > 0.8


@pytest.mark.parametrize(
    "reading",
    [
        {"batch": 0.0},
        {"busy_ratio": 0.1},
        {"interval_s": 0.0},
        {"generation_tokens_per_s": math.nan},
        {"prompt_tokens_per_s": -1.0},
        {"generation_tokens_per_s": math.inf},
    ],
)
def test_impossible_and_idle_readings_are_ignored(reading: dict[str, float]) -> None:
    capacity = ReplicaCapacity(PRIOR)
    good = {
        "generation_tokens_per_s": 100.0,
        "prompt_tokens_per_s": 100.0,
        "batch": 4.0,
        "busy_ratio": 1.0,
        "interval_s": 5.0,
    }
    values = {**good, **reading}
    capacity.observe(interval_s=values.pop("interval_s"), engine=EngineObservation(**values))
    assert capacity.speed == PRIOR
    assert capacity.observed_s == 0.0


def test_prompts_counted_too_early_and_batches_of_one_size_cause_no_bias() -> None:
    capacity, rng = ReplicaCapacity(PRIOR), random.Random(1)
    worked = [rng.choice((0.0, 0.0, 0.3, 0.6, 1.0)) for _ in range(4000)]
    for share, counted in pairwise(worked):
        # A share of the tick goes to prompts; the engine counts those of the next tick in this one.
        steps = (1.0 - share) / (TRUTH.step_s + TRUTH.step_s_per_sequence * 16.0)
        capacity.observe(
            EngineObservation(
                generation_tokens_per_s=steps * 16.0,
                prompt_tokens_per_s=counted / TRUTH.prompt_s_per_token,
                batch=16.0,
                busy_ratio=1.0,
            ),
            5.0,
        )
    true = ReplicaCapacity(TRUTH)
    request = RequestShape(1200.0, 100.0)
    assert capacity.requests_per_s(request, 16.0) == pytest.approx(
        true.requests_per_s(request, 16.0), rel=0.1
    )


def test_rate_and_batch_are_each_others_inverse() -> None:
    capacity = ReplicaCapacity(PRIOR)
    for batch in (1.0, 8.0, 50.0):
        rate = capacity.requests_per_s(REQUEST, batch)
        assert capacity.batch(rate, REQUEST) == pytest.approx(batch)
        # Little's law: a sequence is there for all its tokens.
        assert capacity.residence_s(rate, REQUEST) == pytest.approx(
            REQUEST.output_tokens * capacity.itl_s(batch, REQUEST)
        )


def test_a_rate_that_is_too_high_has_an_infinite_batch() -> None:
    capacity = ReplicaCapacity(PRIOR)
    assert capacity.batch(1e6, REQUEST) == math.inf


def test_the_time_per_token_of_the_slo_limits_the_batch() -> None:
    capacity = ReplicaCapacity(PRIOR)
    most = capacity.most_sequences(REQUEST, LatencyBounds(1000.0, itl_s=0.05))
    assert capacity.itl_s(most, REQUEST) == pytest.approx(0.05)
    assert capacity.most_sequences(REQUEST, LatencyBounds(10.0, itl_s=0.05)) == 10.0
    assert capacity.most_sequences(REQUEST, LatencyBounds(10.0, itl_s=0.001)) == 1.0


def test_replicas_follow_the_rate() -> None:
    capacity = ReplicaCapacity(PRIOR)
    bounds = LatencyBounds(16.0)
    each = capacity.requests_per_s(REQUEST, 16.0)
    assert capacity.replicas(0.0, REQUEST, bounds) == 0
    assert capacity.replicas(each, REQUEST, bounds) == 1
    assert capacity.replicas(each * 7.5, REQUEST, bounds) == 8


def test_rounding_errors_are_not_amplified_by_forgetting() -> None:
    """The two halves of the covariance stay the same, and it stays one."""
    rng = random.Random(3)
    capacity = ReplicaCapacity(PRIOR)
    for _ in range(5000):
        capacity.observe(
            EngineObservation(
                generation_tokens_per_s=20.0 * rng.random(),
                prompt_tokens_per_s=3000.0 * rng.lognormvariate(0.0, 0.5),
                batch=rng.choice((1.0, 2.0, 8.0, 16.0)),
                busy_ratio=rng.uniform(0.2, 1.0),
            ),
            60.0,
        )
    cov = capacity._cov
    assert all(cov[i][j] == cov[j][i] for i in range(3) for j in range(3))
    assert np.linalg.eigvalsh(cov).min() > 0
