"""Samples added up, and a report to show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from controlplane.core.reports.report import (
    GAUGES,
    SUMS,
    Instance,
    InstanceKind,
    PlaneReport,
    ReportSample,
    Totals,
    plane_report,
)

EVIL = "<script>alert('x')</script>"
"""A name that runs as a program if a page does not escape it."""


def added_up(samples: Iterable[ReportSample]) -> Totals:
    """The samples' totals, added one by one."""
    found = Totals()
    for sample in samples:
        for name in (*SUMS, *GAUGES):
            value = getattr(sample, name)
            if value is not None:
                found.add(name, 1.0, value, value)
    return found


def totals(**more: float) -> Totals:
    sample: dict[str, Any] = {
        "counted_s": 60.0,
        "watched_s": 60.0,
        "up_s": 45.0,
        "requests": 10,
        "answered": 8,
        "errors": 2,
    }
    more = {"latency_s": 4.0, "latency_max_s": 1.5, "judged": 10, "missed": 1, "gpu_s": 3600.0, **more}
    return added_up([ReportSample(**{**sample, **more})])


def sample_report(target: float | None = 0.95) -> PlaneReport:
    """A minute of one tier, whose name is HTML, and of its endpoint."""
    tier = Instance(InstanceKind.TIER, EVIL, EVIL)
    endpoint = Instance(InstanceKind.ENDPOINT, EVIL, "small-1&2")
    tracks = {EVIL: {0: totals(), 1: totals(), 4: totals(queue=3.0)}}
    return plane_report(
        {tier: totals(), endpoint: totals()},
        tracks,
        tiers={EVIL: target},
        present=[],
        from_unix_s=1_000_000.0,
        until_unix_s=1_000_060.0,
        step_s=10.0,
        cost_per_gpu_hour=2.0,
    )
