"""From samples to a report: means, maxima, ratios, and sums that add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.reports import ring_buffer
from controlplane.core.reports.report import (
    GAUGES,
    MAX_ENDPOINTS,
    SUMS,
    Instance,
    InstanceKind,
    InstanceReport,
    ReportSample,
    Totals,
    instance_report,
    plane_report,
    track,
    track_step_s,
)
from controlplane.core.reports.ring_buffer import ReportRing, SampleRound, tally
from controlplane.core.traffic.counters import LATENCY_BOUNDS_S
from tests.support.reports import added_up

LIGHT = Instance(InstanceKind.TIER, "light", "light")
ONE = Instance(InstanceKind.ENDPOINT, "light", "light-1")
SAMPLES = (
    ReportSample(
        watched_s=60,
        up_s=60,
        counted_s=60,
        requests=100,
        answered=98,
        errors=1,
        shed=1,
        retried=4,
        resumed=2,
        spilled=3,
        judged=100,
        missed=10,
        prompt_tokens=700,
        generated_tokens=5000,
        latency_s=19.6,
        gpu_s=120.0,
        queue=4.0,
        in_flight=1.0,
        gpu_ratio=0.5,
        latency_max_s=0.9,
    ),
    ReportSample(
        watched_s=60,
        up_s=30,
        counted_s=60,
        requests=300,
        answered=294,
        errors=3,
        judged=100,
        missed=0,
        generated_tokens=9000,
        latency_s=117.6,
        gpu_s=120.0,
        queue=8.0,
        in_flight=3.0,
        gpu_ratio=0.9,
        latency_max_s=2.5,
    ),
    ReportSample(watched_s=60, gpu_s=120.0),
)


def test_figures_of_a_window() -> None:
    found = instance_report(LIGHT, added_up(SAMPLES), cost_per_gpu_hour=3.0)
    assert found.covered_s == 120
    assert found.latency_mean_ms == pytest.approx(350.0)
    assert found.latency_max_ms == 2500.0
    assert found.gpu_ratio == pytest.approx(0.7)
    assert found.requests == 400
    assert found.requests_per_s == pytest.approx(400 / 120)
    assert (found.queue_mean, found.queue_max, found.in_flight_mean) == (6.0, 8.0, 2.0)
    assert found.availability == pytest.approx(0.5)
    assert (found.prompt_tokens, found.generated_tokens) == (700, 14000)
    assert (found.errors, found.shed, found.retried, found.resumed, found.spilled) == (4, 1, 4, 2, 3)
    assert found.error_ratio == pytest.approx(0.01)
    assert found.attainment == pytest.approx(0.95)
    assert found.gpu_hours == pytest.approx(0.1)
    assert found.cost == pytest.approx(0.3)


def test_no_percentile_is_over_the_maximum() -> None:
    found = totals_of(2.021, 3)
    assert found.quantile_ms("latency_counts", 0.99) == 2021.0
    assert (totals_of(1.5, 3).quantile_ms("latency_counts", 0.99) or 0) > 2000, "the bucket is right"


def totals_of(high_s: float, count: int) -> Totals:
    """Requests between 2 and 3 s, of which the maximum is known."""
    found = Totals()
    found.add("latency_max_s", 1.0, high_s, high_s)
    found.add_count("latency_counts", LATENCY_BOUNDS_S.index(3.0), count)
    return found


def test_what_was_not_measured_is_not_zero() -> None:
    unmeasured = instance_report(LIGHT, added_up(SAMPLES[2:]))
    assert unmeasured.covered_s == 0
    assert unmeasured.availability == 0.0
    unknown = {
        "requests_per_s", "latency_mean_ms", "latency_max_ms", "queue_mean", "queue_max", "in_flight_mean",
        "error_ratio", "attainment", "slo_target", "slo_missed", "gpu_ratio",
        "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms",
    }  # fmt: skip
    assert {name for name in InstanceReport.__slots__ if getattr(unmeasured, name) is None} == unknown
    assert instance_report(LIGHT, Totals()).availability is None


@pytest.mark.parametrize(("target", "missed"), [(0.96, True), (0.95, False), (0.9, False), (None, None)])
def test_a_tier_missed_its_slo_if_its_attainment_is_below_the_target(
    target: float | None, missed: bool | None
) -> None:
    found = instance_report(LIGHT, added_up(SAMPLES), slo_target=target)
    assert (found.slo_target, found.slo_missed) == (target, missed)
    unmeasured = instance_report(LIGHT, added_up(SAMPLES[2:]), slo_target=target)
    assert unmeasured.slo_missed is None, "no request was judged"


def test_a_figure_that_samples_lack_is_refused() -> None:
    with pytest.raises(ValueError, match="latency_p99"):
        Totals().add("latency_p99", 1, 1, 1)


def test_tiers_are_in_the_configurations_order_and_what_is_gone_comes_last() -> None:
    old = Instance(InstanceKind.TIER, "old", "old")
    gone = Instance(InstanceKind.ENDPOINT, "light", "light-0")
    found_by_instance = {old: Totals(), LIGHT: Totals(), gone: Totals(), ONE: Totals()}
    more: dict[str, float] = {"from_unix_s": 0, "until_unix_s": 60}
    found = plane_report(
        found_by_instance, {}, tiers={"big": 0.9, "light": 0.99}, present=["light-1"], step_s=10, **more
    )
    assert [(item.instance, item.gone) for item in found.tiers] == [("light", False), ("old", True)]
    assert [(item.instance, item.gone) for item in found.endpoints] == [("light-1", False), ("light-0", True)]
    assert [item.tier for item in found.tracks] == ["light", "old"]
    assert [item.slo_target for item in (*found.tiers, *found.endpoints)] == [0.99, None, None, None]


def test_a_report_lists_the_busiest_of_very_many_endpoints() -> None:
    many = {
        Instance(InstanceKind.ENDPOINT, "light", f"light-{number}"): added_up([ReportSample(requests=number)])
        for number in range(MAX_ENDPOINTS + 5)
    }
    found = plane_report(
        many, {}, tiers={"light": None}, present=[], from_unix_s=0, until_unix_s=60, step_s=10
    )
    assert (len(found.endpoints), found.left_out) == (MAX_ENDPOINTS, 5)
    assert min(item.requests for item in found.endpoints) == 5


def test_a_track_has_no_point_without_samples() -> None:
    found = track("light", {3: added_up(SAMPLES[:1]), 0: added_up(SAMPLES[2:])}, 1000.0, 60)
    assert [point.unix_s for point in found.points] == [1000.0, 1180.0]
    assert found.points[0].requests_per_s is None
    assert found.points[1].attainment == pytest.approx(0.9)


@pytest.mark.parametrize(("window_s", "step_s"), [(60, 10), (1200, 10), (3600, 30), (7 * 86400, 5040)])
def test_a_track_has_few_parts(window_s: float, step_s: int) -> None:
    assert track_step_s(window_s) == step_s


# --- in memory -----------------------------------------------------------------------------------------


def test_memory_is_bounded_in_rounds_and_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_buffer, "MAX_ROWS", 5)
    ring = ReportRing(limit=3)
    for at_s in range(4):
        ring.add(SampleRound.of(at_s, {LIGHT: SAMPLES[0]}))
    assert [each.unix_s for each in ring.rounds] == [1, 2, 3]
    assert ring.rounds[0].instances is ring.rounds[2].instances
    ring.add(SampleRound.of(4, {LIGHT: SAMPLES[0], ONE: SAMPLES[1]}))
    ring.add(SampleRound.of(5, {LIGHT: SAMPLES[0], ONE: SAMPLES[1]}))
    assert [each.unix_s for each in ring.rounds] == [3, 4, 5]
    ring.add(SampleRound.of(6, {LIGHT: SAMPLES[0], ONE: SAMPLES[1]}))
    assert [each.unix_s for each in ring.rounds] == [5, 6], "three would be six rows"


counts = st.integers(0, 1000)
samples = st.builds(
    ReportSample,
    **dict.fromkeys(SUMS, counts),
    **dict.fromkeys(GAUGES, st.none() | counts),
)
rounds = st.lists(st.dictionaries(st.sampled_from([LIGHT, ONE]), samples), max_size=12)


def tally_between(blocks: list[SampleRound], from_s: int, until_s: int) -> dict[Instance, Totals]:
    inside = [each for each in blocks if from_s <= each.unix_s < until_s]
    return {instance: found for (instance, _), found in tally(inside, lambda each: each).items()}


@given(rounds, st.integers(0, 12))
def test_two_windows_side_by_side_are_the_window_over_both(
    taken: list[dict[Instance, ReportSample]], middle: int
) -> None:
    blocks = [SampleRound.of(at_s, each) for at_s, each in enumerate(taken)]
    first, second = tally_between(blocks, 0, middle), tally_between(blocks, middle, 12)
    both = tally_between(blocks, 0, 12)
    for instance, found in second.items():
        joint = first.setdefault(instance, Totals())
        for name, total in found.sums.items():
            joint.add(name, 1.0, total, total)
        for name, (count, total, high) in found.gauges.items():
            joint.add(name, count, total, high)
    assert {key: value for key, value in first.items() if value.sums} == {
        key: value for key, value in both.items() if value.sums
    }


@given(rounds)
def test_memory_adds_up_the_samples_of_each_part(taken: list[dict[Instance, ReportSample]]) -> None:
    by_part: dict[tuple[Instance, int], list[ReportSample]] = {}
    for at_s, each in enumerate(taken):
        for instance, sample in each.items():
            by_part.setdefault((instance, at_s // 5), []).append(sample)
    expected = {key: added_up(found) for key, found in by_part.items()}
    blocks = [SampleRound.of(at_s, each) for at_s, each in enumerate(taken)]
    assert tally(blocks, lambda instance: instance, lambda each: each.unix_s // 5) == expected


def test_instances_without_a_key_are_left_out() -> None:
    blocks = [SampleRound.of(0, {LIGHT: SAMPLES[0], ONE: SAMPLES[1]}), SampleRound.of(1, {ONE: SAMPLES[1]})]
    found = tally(blocks, lambda each: each.tier if each.kind is InstanceKind.TIER else None)
    assert found == {("light", 0): added_up(SAMPLES[:1])}
    assert tally(blocks, lambda each: None) == {}
