from __future__ import annotations

from typing import Any, ClassVar

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from deployments import ray_metrics


class FakeMetric:
    """A fake Ray metric that remembers its values."""

    made: ClassVar[dict[str, FakeMetric]] = {}

    def __init__(self, name: str, description: str, tags: tuple[str, ...]) -> None:
        self.calls: list[tuple[float, dict[str, str]]] = []
        self.tags = tags
        FakeMetric.made[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((value, tags))

    set = inc


def test_counters_are_copied_by_their_increase(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMetric.made = {}
    fake: Any = FakeMetric
    monkeypatch.setattr(ray_metrics, "Counter", fake)
    monkeypatch.setattr(ray_metrics, "Gauge", fake)
    registry = CollectorRegistry()
    requests = Counter("requests", "R.", ["tier"], registry=registry)
    depth = Gauge("depth", "D.", registry=registry)
    seconds = Histogram("seconds", "S.", registry=registry)
    mirror = ray_metrics.MetricsMirror(registry)
    requests.labels("a").inc(3)
    depth.set(7)
    seconds.observe(0.5)
    mirror.copy()
    requests.labels("a").inc(2)
    mirror.copy()
    made = FakeMetric.made
    assert made["requests_total"].calls == [(3.0, {"tier": "a"}), (2.0, {"tier": "a"})]
    assert made["depth"].calls == [(7.0, {}), (7.0, {})]
    assert made["seconds_sum"].calls == [(0.5, {})]
    assert made["seconds_count"].calls == [(1.0, {})]
    assert "requests_created" not in made


def test_a_series_of_a_gauge_that_is_gone_becomes_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMetric.made = {}
    fake: Any = FakeMetric
    monkeypatch.setattr(ray_metrics, "Gauge", fake)
    registry = CollectorRegistry()
    alerts = Gauge("alerts", "A.", ["subject"], registry=registry)
    mirror = ray_metrics.MetricsMirror(registry)
    alerts.labels("a").set(1)
    alerts.labels("b").set(1)
    mirror.copy()
    alerts.clear()
    alerts.labels("b").set(1)
    mirror.copy()
    mirror.copy()
    calls = FakeMetric.made["alerts"].calls
    assert [value for value, tags in calls if tags == {"subject": "a"}] == [1.0, 0.0]
    assert [value for value, tags in calls if tags == {"subject": "b"}] == [1.0, 1.0, 1.0]
