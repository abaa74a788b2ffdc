from __future__ import annotations

import math
import random

import pytest

from controlplane.core.autoscaling.forecast import Forecaster


def feed(forecaster: Forecaster, rates: list[float], tick_s: float = 5.0, start_s: float = 0.0) -> float:
    at_s = start_s
    for rate in rates:
        at_s += tick_s
        forecaster.observe(at_s, rate * tick_s, tick_s)
    return at_s


def test_before_the_first_observation_all_rates_are_zero() -> None:
    forecast = Forecaster(60.0).forecast(0.0)
    assert forecast.mean_per_s == 0.0
    assert forecast.scored == 0
    assert forecast.confidence == 0.0


def test_a_steady_rate_is_forecast_and_its_spread_becomes_small() -> None:
    forecaster = Forecaster(60.0)
    now_s = feed(forecaster, [4.0] * 400)
    forecast = forecaster.forecast(now_s)
    assert forecast.mean_per_s == pytest.approx(4.0)
    assert forecast.spread < 0.06
    assert forecast.confidence > 0.8


def test_the_spread_of_noise_covers_the_actual_rate() -> None:
    rng = random.Random(1)
    forecaster = Forecaster(30.0)
    inside = total = 0
    counts: list[float] = []
    forecasts: list[tuple[int, float]] = []
    for tick in range(3000):
        rate = 5.0 * math.exp(rng.gauss(0.0, 0.4))
        counts.append(rate)
        forecaster.observe((tick + 1) * 5.0, rate * 5.0, 5.0)
        if tick > 500:
            forecast = forecaster.forecast((tick + 1) * 5.0)
            forecasts.append((tick, forecast.mean_per_s * math.exp(1.2816 * forecast.spread)))
    for tick, high in forecasts[:-12]:
        window = counts[tick + 7 : tick + 13]
        total += 1
        inside += sum(window) / len(window) <= high
    assert 0.85 < inside / total < 0.97


def test_a_ramp_is_followed_ahead_of_the_averages() -> None:
    forecaster = Forecaster(120.0)
    now_s = feed(forecaster, [1.0 + 0.05 * tick for tick in range(600)])
    forecast = forecaster.forecast(now_s)
    assert min(range(6), key=lambda bid: forecaster._losses[bid]) == 4, "the trend is the best bid"
    assert forecast.mean_per_s > max(forecaster._averages[1:])


def test_the_second_day_uses_the_first() -> None:
    forecaster = Forecaster(600.0)
    tick_s = 60.0

    def rate(at_s: float) -> float:
        return 10.0 if at_s % 86_400 < 43_200 else 1.0

    at_s = 0.0
    while at_s < 2 * 86_400 + 43_200 - 600:
        at_s += tick_s
        forecaster.observe(at_s, rate(at_s) * tick_s, tick_s)
    season = forecaster._bids(at_s)[-1]
    assert season == pytest.approx(1.0, rel=0.2)


def test_one_burst_hardly_moves_the_spread() -> None:
    quiet, burst = Forecaster(30.0), Forecaster(30.0)
    feed(quiet, [3.0] * 720)
    feed(burst, [3.0] * 350 + [30.0] * 20 + [3.0] * 350)
    assert burst.forecast(3600.0).spread < quiet.forecast(3600.0).spread + 0.1


def test_dispersion_distinguishes_bursts_from_a_steady_stream() -> None:
    rng = random.Random(2)
    bursty = Forecaster(30.0)
    for tick in range(1, 500):
        bursty.observe(tick * 5.0, 100.0 if rng.random() < 0.1 else 0.0, 5.0)
    steady = Forecaster(30.0)
    feed(steady, [2.0] * 500)
    assert bursty._dispersion > 10
    assert steady._dispersion == pytest.approx(1.0)


def test_the_past_can_not_be_changed() -> None:
    forecaster = Forecaster(30.0)
    forecaster.observe(10.0, 50.0, 5.0)
    forecaster.observe(5.0, 9000.0, 5.0)
    forecaster.observe(15.0, 1.0, 0.0)
    assert forecaster.forecast(15.0).mean_per_s == pytest.approx(10.0)


@pytest.mark.parametrize(("horizon_s", "window_s"), [(-1.0, 30.0), (30.0, 0.0)])
def test_a_window_has_a_length_and_lies_ahead(horizon_s: float, window_s: float) -> None:
    with pytest.raises(ValueError, match="horizon"):
        Forecaster(horizon_s, window_s)
