"""The traffic of all tiers: the gateways' counts added up, and a window for each tier."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from controlplane.core.telemetry.series import FreshnessLimits, Signal, signal_of
from controlplane.core.traffic.counters import (
    WINDOW_S,
    TierFigures,
    TrafficCounters,
    TrafficLedger,
    TrafficWindow,
    figures,
)

SAMPLE_MINUTES: Final = 3
"""Requests in fewer different minutes are no sample: one burst says little about a tier."""
SILENT_REPORTS = 3
"""The figures of traffic are STALE once a gateway has missed this many reports."""


class TierDemandTracker:
    """Adds up the gateways' reports; :meth:`sample` adds a reading to each tier's window."""

    def __init__(self) -> None:
        self.ledger = TrafficLedger()
        self._window_s = WINDOW_S
        self._windows: dict[str, TrafficWindow] = {}

    def set_window(self, window_s: float) -> None:
        """Change the length of the windows; never below :data:`WINDOW_S`, which alerts need."""
        self._window_s = max(window_s, WINDOW_S)
        for window in self._windows.values():
            window.set_length(self._window_s)

    def observe(self, gateway_id: str, traffic: Sequence[TrafficCounters], now_s: float) -> None:
        """Add a gateway's report."""
        self.ledger.observe(gateway_id, traffic, now_s)

    def sample(self, tiers: Collection[str], subjects: Collection[str], now_s: float) -> None:
        """Add a reading of every tier, and drop the data of other tiers and of endpoints not in ``subjects``;
        their counts stay for a while (:meth:`TrafficLedger.retain_subjects`)."""
        self.ledger.retain_subjects({*tiers, *subjects}, now_s)
        for tier in self._windows.keys() - set(tiers):
            del self._windows[tier]
        for tier in tiers:
            window = self._windows.setdefault(tier, TrafficWindow(self._window_s))
            window.observe(self.ledger.reading(tier), now_s)

    @staticmethod
    def limits(heartbeat_s: float) -> FreshnessLimits:
        """How old a gateway's last report may be until its figures are STALE, and then MISSING."""
        return FreshnessLimits(SILENT_REPORTS * heartbeat_s, 5 * SILENT_REPORTS * heartbeat_s)

    def samples(self, now_s: float, heartbeat_s: float, span_s: float) -> dict[str, Signal]:
        """The requests of each tier that ended in the last ``span_s``; 0 if they ended in fewer than
        :data:`SAMPLE_MINUTES` different minutes."""
        limits, reported_s = self.limits(heartbeat_s), self.ledger.oldest_report_s()
        return {
            tier: signal_of(window.sample(span_s, SAMPLE_MINUTES), reported_s, now_s, limits, "")
            for tier, window in self._windows.items()
        }

    def figures(self, now_s: float, heartbeat_s: float, span_s: float = WINDOW_S) -> dict[str, TierFigures]:
        """The figures of every tier over ``span_s``, or over the window if that is shorter, up to the last
        :meth:`sample`."""
        limits = self.limits(heartbeat_s)
        reported_s = self.ledger.oldest_report_s()
        return {
            tier: figures(window, self.ledger.reading(tier), reported_s, now_s, limits, span_s)
            for tier, window in self._windows.items()
        }
