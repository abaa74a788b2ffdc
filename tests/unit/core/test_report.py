from __future__ import annotations

import pytest

from controlplane.core.report import ReportSample, report


def samples() -> list[ReportSample]:
    return [
        ReportSample(60, 60, True, 100, 1, 2, 3, 5000, 99, 200.0, 900.0, 4.0, 0.5, 2.0),
        ReportSample(120, 60, True, 300, 3, 0, 1, 9000, 270, 400.0, 2500.0, 8.0, 0.9, 2.0),
        ReportSample(180, 60, False, gpus=2.0),
    ]


def test_figures_of_a_window() -> None:
    found = report("light", samples(), 0.0, 180.0, cost_per_gpu_hour=3.0)
    assert found.latency_mean_ms == pytest.approx(350.0)
    assert found.latency_max_ms == 2500.0
    assert found.gpu_ratio == pytest.approx(0.7)
    assert found.requests == 400
    assert found.requests_per_s == pytest.approx(400 / 180)
    assert (found.queue_mean, found.queue_max) == (6.0, 8.0)
    assert found.availability == pytest.approx(2 / 3)
    assert (found.tokens, found.errors, found.resumed, found.spilled) == (14000, 4, 2, 4)
    assert found.error_ratio == pytest.approx(0.01)
    assert found.attainment == pytest.approx(369 / 400)
    assert found.gpu_hours == pytest.approx(0.1)
    assert found.cost == pytest.approx(0.3)


def test_a_sample_counts_for_its_part_in_the_window() -> None:
    found = report("light", samples(), 30.0, 60.0)
    assert found.requests == 50
    assert found.covered_s == 30.0
    assert found.availability == 1.0


def test_what_was_not_measured_is_not_zero() -> None:
    found = report("light", samples()[2:], 0.0, 180.0)
    assert found.latency_mean_ms is None
    assert found.gpu_ratio is None
    assert found.queue_max is None
    assert found.attainment is None
    assert found.availability == 0.0
    nothing = report("light", [], 0.0, 60.0)
    assert nothing.availability is None
    assert nothing.requests_per_s == 0.0


def test_a_window_has_a_length() -> None:
    with pytest.raises(ValueError, match="window"):
        report("light", [], 5.0, 5.0)
