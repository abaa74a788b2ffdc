"""The tiers' traffic as the controller sees it: all gateways' counts, and the last minutes of each tier."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from controlplane.core.telemetry.series import FreshnessLimits
from controlplane.core.traffic.counters import (
    WINDOW_S,
    TierFigures,
    TrafficCounters,
    TrafficLedger,
    TrafficWindow,
    figures,
)

SILENT_REPORTS = 3
"""So many reports that a gateway misses and what is known of its traffic is STALE."""


class TierDemandTracker:
    """Fed with gateways' reports; :meth:`look` takes a reading every few seconds."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.book = TrafficLedger()
        self._window_s = max(window_s, WINDOW_S)
        self._windows: dict[str, TrafficWindow] = {}

    def remember(self, window_s: float) -> None:
        """Look back so far from now on; never less than :data:`WINDOW_S`, which alerts go by."""
        self._window_s = max(window_s, WINDOW_S)
        for window in self._windows.values():
            window.remember(self._window_s)

    def observe(self, gateway_id: str, traffic: Sequence[TrafficCounters], now_s: float) -> None:
        """Take in what a gateway reports."""
        self.book.observe(gateway_id, traffic, now_s)

    def look(self, tiers: Collection[str], subjects: Collection[str], now_s: float) -> None:
        """Take a reading of every tier; of nobody but them and ``subjects`` (endpoints) is anything kept."""
        self.book.keep_only({*tiers, *subjects})
        for tier in self._windows.keys() - set(tiers):
            del self._windows[tier]
        for tier in tiers:
            window = self._windows.setdefault(tier, TrafficWindow(self._window_s))
            window.observe(self.book.reading(tier), now_s)

    @staticmethod
    def limits(heartbeat_s: float) -> FreshnessLimits:
        """How old a gateway's report may be."""
        return FreshnessLimits(SILENT_REPORTS * heartbeat_s, 5 * SILENT_REPORTS * heartbeat_s)

    def figures(self, now_s: float, heartbeat_s: float, span_s: float = WINDOW_S) -> dict[str, TierFigures]:
        """Of every tier over ``span_s``, or what is remembered if that is less; as of the last look."""
        limits = self.limits(heartbeat_s)
        heard_s = self.book.heard_s()
        return {
            tier: figures(window, self.book.reading(tier), heard_s, now_s, limits, span_s)
            for tier, window in self._windows.items()
        }
