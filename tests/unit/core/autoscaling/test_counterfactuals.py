from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from controlplane.core.autoscaling.counterfactuals import (
    _FACTORS,
    ForecastPrior,
    HeadroomChoice,
    SlidingMaximum,
    VirtualQueues,
)

ALLOWED = 0.01
PRIOR = ForecastPrior(1.2, 300.0)


def play(
    loads: list[float], *, forecast: float = 10.0, cold_start_s: float = 60.0, patience_s: float = 4.0
) -> VirtualQueues:
    """Ticks of 5 s of that many replicas' work, under a constant forecast."""
    queues = VirtualQueues([PRIOR], allowed=ALLOWED, hold_s=90.0)
    for number, load in enumerate(loads, 1):
        queues.observe(
            number * 5.0, 5.0, arrived=load * 5.0, work=load * 5.0, forecasts=[forecast],
            cold_start_s=cold_start_s, patience_s=patience_s,
        )  # fmt: skip
    return queues


def factor(queues: VirtualQueues) -> float:
    return queues.choose(ALLOWED).factor


def of_choice(queues: VirtualQueues, values: NDArray[np.float64]) -> float:
    """Of a value for each pair, that of the pair in use."""
    choice = queues.choose(ALLOWED)
    return float(values[choice.forecast, np.argmin(abs(_FACTORS - choice.factor))])


def missed(queues: VirtualQueues) -> float:
    return of_choice(queues, queues._missed_ratios())


def test_before_the_first_arrival_the_prior_is_chosen() -> None:
    queues = VirtualQueues(
        [ForecastPrior(1.2, 300.0), ForecastPrior(1.4, 300.0)], allowed=ALLOWED, hold_s=90.0
    )
    choice = queues.choose(ALLOWED)
    assert choice.forecast == 0
    assert choice.factor == pytest.approx(1.2, rel=0.05)


def test_steady_work_needs_no_headroom() -> None:
    queues = play([10.0] * 1500)
    assert 1.0 <= factor(queues) <= 1.06
    used = of_choice(queues, queues._used) / queues._seen_s
    assert used == pytest.approx(10.0 * factor(queues), abs=1.0)


def test_bursts_need_headroom_and_less_with_more_patience() -> None:
    rng = random.Random(1)
    loads = [rng.choice((7.0,) * 5 + (16.0,)) for _ in range(3000)]
    hasty, patient = play(loads, patience_s=1.0), play(loads, patience_s=60.0)
    assert factor(hasty) > 1.3
    assert factor(patient) < factor(hasty)
    assert max(missed(hasty), missed(patient)) <= ALLOWED


def test_a_forecast_that_is_always_too_high_is_corrected_downwards() -> None:
    assert factor(play([7.5] * 6000)) < 0.85


def test_misses_that_no_headroom_would_have_avoided_raise_no_factor() -> None:
    loads = ([10.0] * 58 + [1000.0] * 2) * 40
    assert missed(play(loads, cold_start_s=600.0)) > ALLOWED
    quiet = play([10.0] * 2400, cold_start_s=600.0)
    assert factor(play(loads, forecast=10.0, cold_start_s=600.0)) >= factor(quiet)


def test_the_forecast_that_costs_less_is_chosen() -> None:
    def chosen(loads: list[float], soon: list[float]) -> HeadroomChoice:
        queues = VirtualQueues([PRIOR, PRIOR], allowed=ALLOWED, hold_s=90.0)
        for number, (load, fast) in enumerate(zip(loads, soon, strict=True), 1):
            queues.observe(
                number * 5.0, 5.0, arrived=load * 5.0, work=load * 5.0, forecasts=[fast, 10.0],
                cold_start_s=10.0, patience_s=4.0,
            )  # fmt: skip
        return queues.choose(ALLOWED)

    # The changes are noise: the steady forecast needs fewer replicas.
    rng = random.Random(3)
    noise = chosen([10.0] * 2000, [10.0 * rng.uniform(0.6, 1.6) for _ in range(2000)])
    assert noise.forecast == 1
    # The changes are real: the steady forecast would be too low for long, or too high for longer.
    waves = [4.0 + 12.0 * (tick // 240 % 2) for tick in range(2000)]
    assert chosen(waves, waves).forecast == 0


def test_a_minimum_factor_applies_and_can_be_changed() -> None:
    queues = VirtualQueues([PRIOR], allowed=ALLOWED, hold_s=90.0, least=1.3)

    def run() -> float:
        for number in range(1500):
            queues.observe(
                number * 5.0,
                5.0,
                arrived=50.0,
                work=50.0,
                forecasts=[10.0],
                cold_start_s=10.0,
                patience_s=4.0,
            )
        return queues.choose(ALLOWED).factor

    assert 1.3 <= run() < 1.4
    queues.adopt(allowed=ALLOWED, hold_s=90.0, least=1.0)
    # Nothing observed is lost: it is known at once that the smaller factor is enough.
    assert queues.choose(ALLOWED).factor < 1.1
    queues.adopt(allowed=ALLOWED, hold_s=90.0, least=9.0)
    assert queues.choose(ALLOWED).factor == pytest.approx(1.82, rel=0.01)


def test_a_forecast_is_needed_for_each_prior() -> None:
    with pytest.raises(ValueError, match="zip"):
        VirtualQueues([PRIOR, PRIOR], allowed=ALLOWED, hold_s=90.0).observe(
            5.0, 5.0, arrived=1.0, work=1.0, forecasts=[1.0], cold_start_s=10.0, patience_s=4.0
        )


def test_the_maximum_of_a_window() -> None:
    sliding = SlidingMaximum()
    assert sliding.since(0.0) == 0.0
    for at_s, value in ((1.0, 5.0), (2.0, 9.0), (3.0, 4.0), (4.0, 6.0)):
        sliding.push(at_s, value, 0.0)
    assert [sliding.since(at_s) for at_s in (0.0, 2.0, 2.5, 4.0, 9.0)] == [9.0, 9.0, 6.0, 6.0, 6.0]
    sliding.push(5.0, 1.0, 3.0)
    assert sliding.since(0.0) == 6.0
