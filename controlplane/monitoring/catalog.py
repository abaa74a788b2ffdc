"""The metrics that queries may use: all of the gateway's, and some of Ray's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from prometheus_client import Counter, Gauge, Histogram

from controlplane.gateway.telemetry.metrics import Metrics

Kind = Literal["counter", "gauge", "histogram"]
_KINDS: Final[Mapping[type, Kind]] = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}

GATEWAY_LABEL: Final = "gateway"
"""Identifies the gateway that counted a series. Every gateway exports the series of all gateways, so each
series exists once per scraped gateway, and the copies must be removed before a sum."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``name`` is the name in queries: a counter's ends in ``_total``, a histogram's has no
    ``_bucket``."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    about: str
    source: Literal["gateway", "ray"]


RAY: Final = tuple(
    Metric(name, "gauge", ("ip", "GpuIndex", "GpuDeviceName"), about, "ray")
    for name, about in (
        ("ray_node_gpus_utilization", "GPU utilisation, percent."),
        ("ray_node_gram_used", "GPU memory used, MB."),
        ("ray_node_gram_available", "GPU memory free, MB."),
        ("ray_node_gpu_power_milliwatts", "GPU power draw."),
        ("ray_node_gpu_temperature_celsius", "GPU temperature."),
    )
)
"""The metrics of each node's GPUs that Ray's agent exports (Ray 2.60, ``reporter_agent.py``); a test checks
the names."""


@cache
def metrics() -> Mapping[str, Metric]:
    """Every metric that a query may use, by its name."""
    found = list(RAY)
    for series in vars(Metrics()).values():
        if isinstance(series, Counter | Gauge | Histogram):
            (family,) = series.describe()
            kind = _KINDS[type(series)]
            name = f"{family.name}_total" if kind == "counter" else family.name
            labels = tuple(series._labelnames)
            found.append(Metric(name, kind, labels, family.documentation, "gateway"))
    return {metric.name: metric for metric in found}
