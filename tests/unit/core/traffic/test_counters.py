"""Gateways' counts: added up over gateways and restarts, windows of them, and the SLO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.domain.slo import Slo
from controlplane.core.telemetry.series import Freshness
from controlplane.core.traffic.counters import (
    KEEP_GONE_S,
    LATENCY_BOUNDS_S,
    MAX_GONE,
    MAX_POINTS,
    TrafficCounters,
    TrafficLedger,
    TrafficWindow,
    named,
    quantile_s,
    since,
    within_slo,
)
from controlplane.core.traffic.demand import TierDemandTracker


def counted(**values: Any) -> TrafficCounters:
    return TrafficCounters("small", **values)


def buckets(**at: Any) -> tuple[int, ...]:
    """``_0_5=3``: three observations in the bucket up to 0.5 s."""
    expected = {float(name[1:].replace("_", ".")): count for name, count in at.items()}
    assert expected.keys() <= set(LATENCY_BOUNDS_S)
    return tuple(expected.get(bound, 0) for bound in LATENCY_BOUNDS_S)


def test_what_a_gateway_counted_before_its_first_report_is_not_added() -> None:
    ledger = TrafficLedger()
    ledger.observe("g1", [counted(arrived=1000, ok=900)], 0.0)
    assert ledger.reading("small").arrived == 0
    ledger.observe("g1", [counted(arrived=1010, ok=905, waiting=4)], 2.0)
    assert ledger.reading("small") == counted(arrived=10, ok=5, waiting=4)


def test_two_gateways_add_up_and_one_that_restarts_counts_from_zero() -> None:
    ledger = TrafficLedger()
    for at_s, one, two in ((0.0, 5, 50), (2.0, 8, 54)):
        ledger.observe("g1", [counted(arrived=one, in_flight=1)], at_s)
        ledger.observe("g2", [counted(arrived=two, in_flight=2)], at_s)
    assert ledger.reading("small") == counted(arrived=7, in_flight=3)
    ledger.observe("g1", [counted(arrived=2)], 4.0)
    assert ledger.reading("small").arrived == 9
    ledger.forget("g2")
    assert ledger.reading("small") == counted(arrived=9)


@given(st.lists(st.tuples(st.sampled_from(["g1", "g2"]), st.integers(0, 20), st.booleans()), max_size=40))
def test_the_sum_never_falls_whatever_gateways_do(
    steps: list[tuple[str, int, bool]],
) -> None:
    ledger = TrafficLedger()
    counts = {"g1": 0, "g2": 0}
    last = 0
    for at_s, (gateway, more, restarted) in enumerate(steps):
        counts[gateway] = more if restarted else counts[gateway] + more
        ledger.observe(gateway, [counted(arrived=counts[gateway])], float(at_s))
        now = ledger.reading("small").arrived
        assert now >= last
        assert now <= sum(step[1] for step in steps)
        last = now


def test_a_window_covers_the_nearest_readings() -> None:
    window = TrafficWindow(60.0)
    assert window.over_last(10.0) is None
    for at_s in range(0, 100, 5):
        window.observe(counted(arrived=at_s), float(at_s))
    found = window.over_last(10.0)
    assert found is not None
    assert (found[0].arrived, found[1]) == (10, 10.0)
    found = window.over_last(1000.0)
    assert found is not None
    assert found[1] == 60.0
    window.observe(counted(arrived=1), 100.0)
    assert window.over_last(10.0) is None, "the ledger started again"


def test_a_long_window_is_thinned_and_still_begins_where_it_should() -> None:
    window = TrafficWindow(3600.0)
    most = 0
    for at_s in range(8000):
        window.observe(counted(arrived=at_s * 7), float(at_s))
        most = max(most, len(window))
    assert MAX_POINTS * 0.9 < most <= MAX_POINTS + 2
    for span_s in (60.0, 300.0, 3600.0):
        found = window.over_last(span_s)
        assert found is not None
        counted_since, over_s = found
        assert span_s <= over_s <= span_s + 3600.0 / MAX_POINTS + 1.0
        assert counted_since.arrived == over_s * 7, "the counts cover exactly that time"


def test_a_longer_window_retains_its_readings_and_a_shorter_one_drops_the_oldest() -> None:
    window = TrafficWindow(100.0)
    for at_s in range(0, 205, 5):
        window.observe(counted(arrived=at_s), float(at_s))
    window.set_length(400.0)
    for at_s in range(205, 405, 5):
        window.observe(counted(arrived=at_s), float(at_s))
    found = window.over_last(400.0)
    assert found is not None
    assert found[1] == 300.0, "100 s from before and 200 s since"
    window.set_length(50.0)
    window.observe(counted(arrived=405), 405.0)
    found = window.over_last(400.0)
    assert found is not None
    assert found[1] == 50.0


@pytest.mark.parametrize(("window_s", "over_s"), [(60.0, 300.0), (300.0, 300.0), (3600.0, 3600.0)])
def test_windows_follow_the_setting_but_are_long_enough_for_alerts(window_s: float, over_s: float) -> None:
    demand = TierDemandTracker()
    demand.sample(["small"], [], 0.0)
    demand.set_window(window_s)
    # One arrival a second for an hour, then two for five minutes.
    for at_s in range(0, 3905, 5):
        arrived = at_s if at_s <= 3600 else 3600 + 2 * (at_s - 3600)
        demand.observe("g1", (counted(arrived=arrived),), float(at_s))
        demand.sample(["small", "new"], [], float(at_s))
    expected = (over_s - 300 + 600) / over_s
    assert demand.figures(3900.0, 2.0, 3600.0)["small"].arrivals_per_s.fresh == pytest.approx(expected)
    assert demand.figures(3900.0, 2.0)["small"].arrivals_per_s.fresh == pytest.approx(2.0)
    assert demand.figures(3900.0, 2.0, 60.0)["small"].arrivals_per_s.fresh == pytest.approx(2.0)


def test_figures_are_ratios_rates_and_percentiles_over_the_span() -> None:
    demand = TierDemandTracker()
    info = GatewayInfo("g1", "n1", "")
    first = counted(arrived=100, ok=100)
    then = replace(
        first,
        arrived=160,
        judged=50,
        missed=5,
        ok=136,
        failed=10,
        shed=4,
        retried=10,
        latency_counts=buckets(_0_5=18, _5=18),
        ttft_counts=buckets(_0_1=36),
        waiting=7,
    )
    demand.observe(info.gateway_id, (first,), 0.0)
    demand.sample(["small"], [], 0.0)
    demand.observe(info.gateway_id, (then,), 60.0)
    demand.sample(["small"], [], 60.0)
    found = demand.figures(61.0, 2.0)["small"]
    assert found.arrivals_per_s.fresh == 1.0
    assert found.requests_per_s.fresh == pytest.approx(50 / 60)
    assert found.failed_ratio.fresh == 0.2
    assert found.shed_ratio.fresh == 0.08
    assert found.attainment.fresh == 0.9
    assert found.waiting.fresh == 7
    assert found.latency_p95_s.fresh == pytest.approx(4.9)
    assert 0.05 < (found.ttft_p95_s.fresh or 0.0) <= 0.1
    assert named({"small": found})["tier/waiting"] == {"small": found.waiting}


def test_a_silent_gateway_makes_figures_stale_and_then_missing_and_none_makes_them_missing() -> None:
    demand = TierDemandTracker()
    demand.sample(["small"], [], 0.0)
    assert demand.figures(0.0, 2.0)["small"].waiting.freshness is Freshness.MISSING
    demand.observe("g1", (counted(arrived=1),), 0.0)
    demand.observe("g2", (counted(arrived=1),), 5.0)
    demand.sample(["small"], [], 5.0)
    assert demand.figures(5.0, 2.0)["small"].waiting.freshness is Freshness.FRESH
    assert demand.figures(7.0, 2.0)["small"].waiting.freshness is Freshness.STALE
    assert demand.figures(40.0, 2.0)["small"].waiting.freshness is Freshness.MISSING


@pytest.mark.parametrize(
    ("ttft_s", "itl_s", "total_s", "tokens", "expected"),
    [
        (1.0, 0.1, 5.0, 40, True),
        (4.0, 0.1, 5.0, 40, False),
        (1.0, 0.3, 5.0, 40, False),
        (1.0, None, 1.0, 1, True),
        (1.0, 0.1, 31.0, 40, False),
        (None, None, 4.8, 10, True),
        (None, None, 4.9, 10, False),
        (None, None, 3.1, 0, False),
    ],
)
def test_whether_a_response_met_the_slo(
    ttft_s: float | None, itl_s: float | None, total_s: float, tokens: int, expected: bool
) -> None:
    slo = Slo(ttft_s=3.0, itl_s=0.2, total_s=30.0)
    assert within_slo(slo, ttft_s=ttft_s, itl_s=itl_s, total_s=total_s, tokens=tokens) is expected


def test_differences_and_quantiles() -> None:
    assert quantile_s((0,) * len(LATENCY_BOUNDS_S), 0.5) is None
    assert since(counted(arrived=5, waiting=3), counted(arrived=2, waiting=9)) == counted(
        arrived=3, waiting=3
    )


def test_the_counts_of_subjects_that_are_gone_are_kept_for_a_while_and_bounded() -> None:
    ledger = TrafficLedger()
    names = [f"small-{number}" for number in range(MAX_GONE + 5)]
    for ok in (0, 3):
        ledger.observe("g1", [TrafficCounters(name, ok=ok) for name in names], 0.0)
    ledger.retain_subjects(names[:2], 0.0)
    assert sum(ledger.knows(name) for name in names) == MAX_GONE + 2
    ledger.observe("g1", [TrafficCounters(names[-1], ok=5)], 1.0)
    assert ledger.reading(names[-1]).ok == 5
    ledger.retain_subjects(names[:2], KEEP_GONE_S)
    assert [name for name in names if ledger.knows(name)] == names[:2]
