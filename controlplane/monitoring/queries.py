"""PromQL queries, built from metrics that exist. ValueError if a name or a label is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.monitoring.catalog import GATEWAY_LABEL, Metric, metrics

WINDOW = "5m"
"""The window of all rates."""


def total(name: str, by: Sequence[str] = (), **only: str) -> str:
    """The sum of a gauge over all gateways, each of which reports its own part."""
    metric = _metric(name, "gauge")
    return _sum(by, _once(metric, _select(metric, name, only)), metric)


def highest(name: str, by: Sequence[str] = (), **only: str) -> str:
    """The maximum over all gateways of a gauge that each reports for the whole plane."""
    metric = _metric(name, "gauge")
    _check(metric, by)
    return f"max by ({', '.join(by)}) ({_select(metric, name, only)})"


def rate(name: str, by: Sequence[str] = (), **only: str) -> str:
    """The increase of a counter per second."""
    metric = _metric(name, "counter")
    return _sum(by, _once(metric, f"rate({_select(metric, name, only)}[{WINDOW}])"), metric)


def quantile(quantile: float, name: str, by: Sequence[str] = (), **only: str) -> str:
    """A quantile of a histogram, in its unit."""
    metric = _metric(name, "histogram")
    buckets = _once(metric, f"rate({_select(metric, f'{name}_bucket', only)}[{WINDOW}])", "le")
    _check(metric, by)
    return f"histogram_quantile({quantile:g}, sum by ({', '.join([*by, 'le'])}) ({buckets}))"


def mean(name: str, by: Sequence[str] = (), **only: str) -> str:
    """The mean of a histogram, in its unit."""
    metric = _metric(name, "histogram")
    parts = [
        _sum(by, _once(metric, f"rate({_select(metric, f'{name}_{part}', only)}[{WINDOW}])"), metric)
        for part in ("sum", "count")
    ]
    return f"{parts[0]} / {parts[1]}"


def gpu(name: str) -> str:
    """One of Ray's GPU metrics, by node and GPU."""
    _metric(name, "gauge")
    return f"max by (ip, GpuIndex) ({name})"


def gpu_memory_ratio() -> str:
    """The used ratio of each GPU's memory."""
    used, free = gpu("ray_node_gram_used"), gpu("ray_node_gram_available")
    return f"{used} / ({used} + {free})"


def _metric(name: str, kind: str) -> Metric:
    metric = metrics().get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(f"there is no {kind} '{name}'; there is {', '.join(sorted(metrics()))}")
    return metric


def _check(metric: Metric, labels: Sequence[str]) -> None:
    wrong = set(labels) - {*metric.labels, GATEWAY_LABEL}
    if wrong:
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(wrong))}: {', '.join(metric.labels)}")


def _select(metric: Metric, name: str, only: dict[str, str]) -> str:
    _check(metric, list(only))
    matchers = [f'{label}{"=~" if "|" in value else "="}"{value}"' for label, value in only.items()]
    return f"{name}{{{', '.join(matchers)}}}" if matchers else name


def _once(metric: Metric, expression: str, *more: str) -> str:
    """``expression`` without the copies that exist if several gateways are scraped."""
    if metric.source != "gateway":
        return expression
    return f"max by ({', '.join([GATEWAY_LABEL, *metric.labels, *more])}) ({expression})"


def _sum(by: Sequence[str], expression: str, metric: Metric) -> str:
    _check(metric, by)
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"
