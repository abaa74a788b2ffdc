"""The telemetry of each engine from its metrics, and which engines are stalled."""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Final

from controlplane.core.domain.endpoint import SERVING, Endpoint
from controlplane.core.telemetry.engine import EngineTelemetry
from controlplane.core.telemetry.samples import EngineSample
from controlplane.core.telemetry.series import FreshnessLimits
from controlplane.core.telemetry.stalled_engine import StalledEngine, StallRules, stall_reason

LIMITS: Final = FreshnessLimits(stale_after_s=15.0, missing_after_s=60.0)
"""Engines are read every few seconds."""
STALL_MEMORY_S: Final = 30.0
"""An engine counts as stalled for this long after the last sample that showed it stalled."""


class EngineReadings:
    """Telemetry by endpoint id."""

    def __init__(self, rules: StallRules) -> None:
        self._rules = rules
        self._telemetry: dict[str, EngineTelemetry] = {}
        self.telemetry: Final = MappingProxyType(self._telemetry)
        """By endpoint id: the engines that were read at least once."""
        self._stalled: dict[str, StalledEngine] = {}

    def observe(self, sample: EngineSample, now_s: float) -> None:
        """Record one sample."""
        name = sample.endpoint_id
        telemetry = self._telemetry.setdefault(name, EngineTelemetry(LIMITS))
        telemetry.observe(sample, now_s)
        reason = stall_reason(telemetry.load(now_s))
        if not reason:
            self._stalled.pop(name, None)
            return
        known = self._stalled.get(name)
        self._stalled[name] = StalledEngine(known.since_s if known else now_s, now_s, reason)

    def stalled(self, endpoints: Mapping[str, Endpoint], now_s: float) -> dict[str, str]:
        """Endpoint id → why its engine counts as stalled: it serves, and has produced nothing for too
        long."""
        found = {}
        for name, stall in list(self._stalled.items()):
            endpoint = endpoints.get(name)
            if endpoint is None or endpoint.state not in SERVING or now_s - stall.seen_s > STALL_MEMORY_S:
                del self._stalled[name]
                continue
            lasted_s = stall.seen_s - stall.since_s
            if lasted_s >= self._rules.after_s:
                found[name] = f"{stall.reason} for {lasted_s:.0f} s"
        return found

    def keep_only(self, endpoint_ids: Container[str]) -> None:
        """Drop the telemetry of all other endpoints."""
        for gone in [name for name in self._telemetry if name not in endpoint_ids]:
            del self._telemetry[gone]
