from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.telemetry.samples import Absence, Missing
from controlplane.core.telemetry.series import (
    CounterSeries,
    Freshness,
    FreshnessLimits,
    GaugeSeries,
    Signal,
    histogram_quantile,
)

INF = math.inf
LIMITS = FreshnessLimits(stale_after_s=5, missing_after_s=30, window_s=60, half_life_s=10, max_points=50)
GONE = Missing(Absence.ERROR, "connection refused")


def test_a_missing_reading_is_neither_true_nor_false() -> None:
    with pytest.raises(TypeError, match="connection refused"):
        bool(GONE)


@pytest.mark.parametrize(
    ("age_s", "freshness", "value"),
    [
        (0, Freshness.FRESH, 7),
        (5, Freshness.FRESH, 7),
        (5.1, Freshness.STALE, 7),
        (30, Freshness.STALE, 7),
        (30.1, Freshness.MISSING, None),
    ],
)
def test_a_value_grows_old(age_s: float, freshness: Freshness, value: float | None) -> None:
    series = GaugeSeries(LIMITS)
    series.observe(100, 7)
    signal = series.latest(100 + age_s)
    assert (signal.freshness, signal.value, signal.age_s) == (freshness, value, pytest.approx(age_s))
    assert (signal.reason == "") is (freshness is Freshness.FRESH)
    assert signal.fresh == (7 if freshness is Freshness.FRESH else None)


def test_what_went_wrong_is_the_reason() -> None:
    series = GaugeSeries(LIMITS)
    assert series.latest(0) == Signal(Freshness.MISSING, None, None, "no sample yet")
    series.observe(0, GONE)
    assert series.latest(0).reason == "connection refused"
    series.observe(1, 3)
    series.observe(8, GONE)
    assert series.latest(8) == Signal(Freshness.STALE, 3, 7, "connection refused")
    assert series.latest(100).reason == "connection refused"
    series.observe(101, 4)
    assert series.latest(101) == Signal(Freshness.FRESH, 4, 0)


def test_busy_is_the_share_of_points_over_zero_and_their_mean() -> None:
    series = GaugeSeries(LIMITS)
    for at_s, value in [(0, 100), (50, 1), (70, 0), (90, 6)]:
        assert series.busy(at_s) is None, "fewer than three points"
        series.observe(at_s, value)
    assert series.busy(90) == (pytest.approx(2 / 3), 3.5), "the point at 0 s is outside the window"
    assert series.busy(96) is None, "the newest point is stale"


def test_a_rate_needs_two_samples() -> None:
    series = CounterSeries(LIMITS)
    assert series.rate(0).freshness is Freshness.MISSING
    series.observe(0, 1_000_000)
    assert series.rate(0) == Signal(Freshness.MISSING, None, 0, "a rate needs two samples")
    series.observe(10, 1_000_050)
    assert series.rate(10) == Signal(Freshness.FRESH, 5, 0)
    assert series.rate(20).freshness is Freshness.STALE
    assert series.rate(50).freshness is Freshness.MISSING


def test_a_reset_counts_what_came_after_it() -> None:
    series = CounterSeries(LIMITS)
    for at_s, value in [(0, 1000), (10, 1100), (20, 30), (30, 60), (40, 5)]:
        series.observe(at_s, value)
    assert series.increase(40).value == 100 + 30 + 30 + 5
    assert series.rate(40).value == pytest.approx(165 / 40)


def test_a_rate_is_over_the_window_only() -> None:
    series = CounterSeries(LIMITS)
    for at_s, value in [(0, 0), (10, 10_000), (80, 10_000), (100, 10_020)]:
        series.observe(at_s, value)
    assert series.rate(100).value == 1


def test_time_that_goes_back_is_left_out() -> None:
    series = CounterSeries(LIMITS)
    for at_s, value in [(10, 0), (20, 10), (15, 3), (30, 20)]:
        series.observe(at_s, value)
    assert series.rate(30).value == 1


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=2, max_size=40),
)
def test_increase_is_what_was_counted_whatever_the_resets(steps: list[tuple[int, bool]]) -> None:
    """A source that counts ``step`` between two scrapes, and may restart right before it counts."""
    series = CounterSeries(LIMITS)
    shown, counted = 0, 0
    series.observe(0, shown)
    for at_s, (step, restarts) in enumerate(steps, start=1):
        if restarts and step < shown:  # a reset that shows: less than before
            shown = 0
        shown += step
        counted += step
        series.observe(at_s, shown)
    increase = series.increase(len(steps)).value
    assert increase == counted
    rate = series.rate(len(steps)).value
    assert rate is not None
    assert rate >= 0


@given(st.integers(51, 500))
def test_a_series_is_bounded(count: int) -> None:
    series = GaugeSeries(LIMITS)
    for step in range(count):
        series.observe(step * 0.001, step)
    assert series.busy(count * 0.001) == (1, pytest.approx(sum(range(count - 50, count)) / 50))


@pytest.mark.parametrize(
    ("quantile", "bounds", "counts", "value"),
    [
        pytest.param(0.5, (0, 0.5, 1, INF), (6, 11, 14, 19), 0.35, id="ClickHouse's documented example"),
        pytest.param(0.5, (1, 2, INF), (10, 10, 10), 0.5, id="the lowest bucket starts at 0"),
        pytest.param(0.0, (1, 2, INF), (10, 20, 20), 0.0, id="smallest"),
        pytest.param(1.0, (1, 2, INF), (10, 20, 20), 2.0, id="largest"),
        pytest.param(0.75, (1, 2, INF), (10, 20, 20), 1.5, id="linear inside"),
        pytest.param(0.99, (1, 2, INF), (1, 2, 100), 2.0, id="past the last bound: that bound"),
        pytest.param(0.1, (-1, 1, INF), (10, 20, 20), -1.0, id="a lowest bound under 0"),
        pytest.param(0.5, (1, INF), (0, 0), None, id="nothing observed"),
        pytest.param(0.5, (INF,), (5,), None, id="one bucket"),
        pytest.param(0.5, (1, 2), (5, 6), None, id="no infinite bucket"),
        pytest.param(0.5, (1, 2, INF), (4, 3, 4), 0.5, id="scraped while it changed"),
        pytest.param(2.0, (1, 2, INF), (10, 20, 20), 2.0, id="clamped"),
    ],
)
def test_histogram_quantile(
    quantile: float, bounds: tuple[float, ...], counts: tuple[float, ...], value: float | None
) -> None:
    assert histogram_quantile(quantile, bounds, counts) == (value if value is None else pytest.approx(value))


@given(
    observations=st.lists(st.floats(0.001, 30), min_size=1, max_size=200),
    quantile=st.floats(0.001, 1),
)
def test_a_quantile_lies_in_the_bucket_of_the_true_one(observations: list[float], quantile: float) -> None:
    bounds = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, INF)
    counts = tuple(float(sum(value <= bound for value in observations)) for bound in bounds)
    estimate = histogram_quantile(quantile, bounds, counts)
    assert estimate is not None
    true = sorted(observations)[max(0, math.ceil(quantile * len(observations)) - 1)]
    bucket = next(index for index, bound in enumerate(bounds) if true <= bound)
    low = bounds[bucket - 1] if bucket else 0.0
    assert low - 1e-9 <= estimate <= min(bounds[bucket], 10.0) + 1e-9
