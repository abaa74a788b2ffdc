"""The gateway's metrics copied to Ray metrics, for the Ray dashboard and its Prometheus.

They are copied every few seconds; no request waits for that. Of a histogram, only ``_sum`` and ``_count`` are
copied; the gateway's own ``/metrics`` has the buckets.
"""

from __future__ import annotations

import asyncio
from typing import Final, NoReturn

from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample
from ray.util.metrics import Counter, Gauge

from controlplane.gateway.gateway import Gateway

INTERVAL_S: Final = 5.0
_COUNTING: Final = ("_total", "_sum", "_count")

_Series = tuple[str, tuple[tuple[str, str], ...]]


class MetricsMirror:
    """Copies a registry's samples into Ray metrics of the same names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._seen: dict[_Series, float] = {}
        self._shown: dict[_Series, Sample] = {}

    def copy(self) -> None:
        """Update Ray's metrics to the registry's values. A series of a gauge that no longer exists is set to
        0, because Ray would continue to export its last value."""
        before, self._shown = self._shown, {}
        for family in self._registry.collect():
            for sample in family.samples:
                if family.type in {"counter", "histogram"}:
                    if sample.name.endswith(_COUNTING):
                        self._count(sample, family.documentation)
                elif family.type == "gauge":
                    self._shown[_key(sample)] = sample
                    self._set(sample, family.documentation)
        for key in before.keys() - self._shown.keys():
            self._gauges[before[key].name].set(0.0, before[key].labels)

    def _count(self, sample: Sample, description: str) -> None:
        key = _key(sample)
        grown = sample.value - self._seen.get(key, 0.0)
        if grown <= 0:
            return
        counter = self._counters.get(sample.name)
        if counter is None:
            counter = Counter(sample.name, description, tuple(sample.labels))
            self._counters[sample.name] = counter
        counter.inc(grown, sample.labels)
        self._seen[key] = sample.value

    def _set(self, sample: Sample, description: str) -> None:
        gauge = self._gauges.get(sample.name)
        if gauge is None:
            gauge = self._gauges[sample.name] = Gauge(sample.name, description, tuple(sample.labels))
        gauge.set(sample.value, sample.labels)


def _key(sample: Sample) -> _Series:
    return sample.name, tuple(sorted(sample.labels.items()))


async def mirror_metrics(gateway: Gateway) -> NoReturn:
    """Copy a gateway's metrics every :data:`INTERVAL_S`."""
    mirror = MetricsMirror(gateway.metrics.registry)
    while True:
        gateway.refresh_metrics()
        mirror.copy()
        await asyncio.sleep(INTERVAL_S)
