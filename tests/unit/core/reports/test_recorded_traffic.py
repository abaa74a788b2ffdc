"""From stored figures to windows of traffic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.reports.recorded_traffic import (
    FIGURES,
    RecordedWindow,
    StoredPoint,
    relative_to_first,
    traffic_windows,
)
from controlplane.core.reports.report import SUMS

Figures = dict[str, list[StoredPoint]]


def figures(*points: tuple[int, int, dict[str, float]]) -> Figures:
    found: Figures = {}
    for at_s, step_s, values in points:
        for name, total in values.items():
            found.setdefault(name, []).append(StoredPoint(at_s, step_s, total))
    return found


def spans(made: Figures) -> list[tuple[float, float, int]]:
    return [(w.start_s, w.seconds, w.requests) for w in traffic_windows("small", made)]


def test_figures_are_fields_of_samples() -> None:
    assert set(FIGURES) <= set(SUMS)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((), []),
        # a sample is stored when it ends
        (((1010, 1, {"counted_s": 10, "arrived": 4}),), [(1000, 10, 4)]),
        # nothing arrived, and that is known
        (((1010, 1, {"counted_s": 10}),), [(1000, 10, 0)]),
        # nothing was counted, so arrivals have no duration
        (((1010, 1, {"arrived": 4}),), []),
        (((1010, 1, {"counted_s": 0, "arrived": 4}),), []),
        # merged into a minute, a third of which is covered
        (((1020, 60, {"counted_s": 20, "arrived": 4}),), [(1060, 20, 4)]),
        # samples that overlap a merged minute are not counted twice
        (
            (
                (960, 60, {"counted_s": 61, "arrived": 30}),
                (1024, 1, {"counted_s": 10.5, "arrived": 5}),
                (1034, 1, {"counted_s": 9.5, "arrived": 6}),
            ),
            [(959, 61, 30), (1020, 4, 5), (1024.5, 9.5, 6)],
        ),
    ],
)
def test_a_window_covers_the_counted_time(
    points: tuple[tuple[int, int, dict[str, float]], ...], expected: list[tuple[float, float, int]]
) -> None:
    assert spans(figures(*points)) == expected


def test_token_means_are_of_the_window_or_else_of_the_tier() -> None:
    made = figures(
        (10, 1, {"counted_s": 10, "arrived": 3, "answered": 2, "prompt_tokens": 100, "generated_tokens": 20}),
        (20, 1, {"counted_s": 10, "arrived": 3}),
        (30, 1, {"counted_s": 10, "answered": 2, "prompt_tokens": 60, "generated_tokens": 60}),
    )
    found = traffic_windows("small", made)
    assert [(w.input_tokens, w.output_tokens) for w in found] == [(50, 10), (40, 20), (30, 30)]
    [never] = traffic_windows("small", figures((10, 1, {"counted_s": 10, "arrived": 3})))
    assert (never.input_tokens, never.output_tokens) == (None, None)


def test_times_are_relative_to_the_first_window() -> None:
    made = [RecordedWindow(start_s, 10, tier, 1, None, None) for start_s, tier in ((30, "a"), (20, "b"))]
    assert [(w.start_s, w.tier) for w in relative_to_first(made)] == [(0, "b"), (10, "a")]
    assert relative_to_first([]) == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5000), st.sampled_from([1, 60, 600]), st.floats(0, 700), st.integers(0, 10**6)
        ),
        max_size=40,
    )
)
def test_windows_never_overlap_and_no_request_is_counted_twice(
    points: list[tuple[int, int, float, int]],
) -> None:
    unique = {(at_s, step_s): (counted_s, arrived) for at_s, step_s, counted_s, arrived in points}
    made = figures(*((*key, {"counted_s": c, "arrived": a}) for key, (c, a) in unique.items()))
    found = traffic_windows("small", made)
    assert sum(w.requests for w in found) <= sum(arrived for _, arrived in unique.values())
    ended_s = float("-inf")
    for window in found:
        assert window.seconds > 0
        assert window.start_s >= ended_s - 1e-6
        ended_s = window.start_s + window.seconds
