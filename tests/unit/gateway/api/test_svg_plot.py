"""Ticks and dates of plots."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.api.svg_plot import (
    Curve,
    date,
    label,
    plot,
    span_text,
    ticks,
    time_label,
    time_ticks,
)

DAY_S = 86400
NOON_S = 1_793_448_000.0  # 31 Oct 2026, 12:00 UTC


@pytest.mark.parametrize(
    ("highest", "marks"),
    [
        (0.0, [0, 1]),
        (math.nan, [0, 1]),
        (1.0, [0, 0.5, 1.0]),
        (4.37, [0, 2, 4, 6]),
        (4_370_000, [0, 2e6, 4e6, 6e6]),
        (100.0, [0, 50, 100]),
        (0.03, [0, 0.01, 0.02, 0.03]),
    ],
)
def test_ticks_are_round(highest: float, marks: list[float]) -> None:
    assert ticks(highest) == pytest.approx(marks)


@given(st.floats(1e-6, 1e15))
def test_ticks_reach_the_highest_figure_and_are_few(highest: float) -> None:
    marks = ticks(highest)
    assert marks[0] == 0
    assert marks[-1] >= highest * (1 - 1e-9)
    assert len(marks) <= 6
    assert all(len(label(mark)) <= 6 for mark in marks), [label(mark) for mark in marks]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (437_000, "437k"),
        (4.37e5, "437k"),
        (1_500_000, "1.5M"),
        (0.25, "0.25"),
        (0, "0"),
        (999.9, "1k"),
        (20, "20"),
    ],
)
def test_labels_are_short(value: float, text: str) -> None:
    assert label(value) == text


@given(st.floats(1, 4e9), st.floats(60, 31 * DAY_S))
def test_times_are_round_and_few(from_s: float, span_s: float) -> None:
    marks = time_ticks(from_s, from_s + span_s)
    assert 1 <= len(marks) <= 6
    assert all(from_s <= mark <= from_s + span_s and mark % 10 == 0 for mark in marks)


def test_dates_are_written_as_people_do() -> None:
    assert date(NOON_S) == "31 Oct 2026"
    assert span_text(NOON_S, NOON_S + 3600) == "31 Oct 2026, 12:00 to 13:00 UTC"
    assert span_text(NOON_S, NOON_S + DAY_S) == "31 Oct 2026, 12:00 to 1 Nov 2026, 12:00 UTC"
    assert time_label(NOON_S, 3600) == "12:00"
    assert time_label(NOON_S + DAY_S / 2, DAY_S) == "1 Nov"
    assert time_label(NOON_S, 60) == "12:00:00"


def test_a_plot_stays_inside_its_frame() -> None:
    text = plot("a < b", NOON_S, NOON_S + 60, [Curve([[(NOON_S - 50, 1.0), (NOON_S + 100, 437_000.0)]])])
    assert "a &lt; b" in text
    assert ">437" not in text
    assert ">600k<" in text
    (points,) = [part.partition("'")[0] for part in text.split("points='")[1:]]
    assert all(
        0 <= float(x) <= 520 and 0 <= float(y) <= 190 for x, y in (pair.split(",") for pair in points.split())
    )
