"""Reports' figures in the store: the names of their series, and adding them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Final

from controlplane.core.reports.report import (
    GAUGES,
    HISTOGRAMS,
    SUMS,
    Instance,
    InstanceKind,
    ReportSample,
    Totals,
)
from controlplane.core.traffic.counters import LATENCY_BOUNDS_S

PREFIX: Final = "report/"
"""Prefix of the names of reports' series in the store."""

HISTOGRAM_PREFIX: Final = "histogram/"
"""Prefix of the series that count a bucket of a tier's histogram."""

_BUCKETS: Final = frozenset(map(str, range(len(LATENCY_BOUNDS_S))))

Summary = Callable[[str, int, int, int], Iterable[tuple[str, int, int, float, float]]]
"""As :func:`controlplane.controller.store_reads.summary`, of one store."""


def series_of(instance: Instance, figure: str) -> str:
    """The name in the store of one figure of an instance's samples."""
    return f"{PREFIX}{instance.kind}/{instance.tier}/{instance.name}/{figure}"


def bucket_values(tier: str, sample: ReportSample) -> dict[str, float]:
    """The buckets of a tier's sample that have something in them, by the names of their series."""
    return {
        f"{HISTOGRAM_PREFIX}{tier}/{name}/{bucket}": float(count)
        for name in HISTOGRAMS
        for bucket, count in enumerate(getattr(sample, name))
        if count
    }


def add_stored_buckets(
    summary: Summary, totals: dict[Instance, Totals], from_s: int, until_s: int, whole_s: int
) -> None:
    """Add the tiers' stored histograms of [``from_s``, ``until_s``); ``whole_s`` as for
    :func:`add_stored`."""
    for series, _, _, total, _ in summary(HISTOGRAM_PREFIX, from_s, until_s, whole_s):
        _, tier, name, bucket = series.split("/", 3)
        found = totals.get(Instance(InstanceKind.TIER, tier, tier))
        if found is not None and name in HISTOGRAMS and bucket in _BUCKETS and isfinite(total):
            found.add_count(name, int(bucket), total)


def _parsed(series: str) -> tuple[Instance, str]:
    _, kind, tier, rest = series.split("/", 3)
    name, _, figure = rest.rpartition("/")
    return Instance(InstanceKind(kind), tier, name), figure


def add_stored(
    summary: Summary,
    totals: dict[Instance, Totals],
    tracks: dict[str, dict[int, Totals]],
    from_s: int,
    until_s: int,
    step_s: int,
    whole_s: int,
) -> None:
    """Add what is stored of [``from_s``, ``until_s``) to the totals of each instance, and to the parts of
    ``step_s`` seconds of each tier's track. ``whole_s`` is at least the length of the window."""
    for kind, width_s in ((InstanceKind.TIER, step_s), (InstanceKind.ENDPOINT, whole_s)):
        for series, part, count, total, high in summary(f"{PREFIX}{kind}/", from_s, until_s, width_s):
            instance, name = _parsed(series)
            if name not in SUMS and name not in GAUGES:
                continue  # another version wrote it
            totals.setdefault(instance, Totals()).add(name, count, total, high)
            if kind is InstanceKind.TIER:
                tracks.setdefault(instance.tier, {}).setdefault(part, Totals()).add(name, count, total, high)
