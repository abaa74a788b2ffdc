"""PromQL from metrics that exist. A wrong name or label is a ValueError when the query is made."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.monitoring.catalog import GATEWAY_LABEL, Metric, metrics

WINDOW = "5m"


def total(name: str, by: Sequence[str] = (), **only: str) -> str:
    """A gauge, added up over gateways: what all of them have."""
    metric = _metric(name, "gauge")
    return _sum(by, _once(metric, _select(metric, name, only)), metric)


def seen(name: str, by: Sequence[str] = (), **only: str) -> str:
    """A gauge that every gateway sees whole: the most that any of them says."""
    metric = _metric(name, "gauge")
    _check(metric, by)
    return f"max by ({', '.join(by)}) ({_select(metric, name, only)})"


def rate(name: str, by: Sequence[str] = (), window: str = WINDOW, **only: str) -> str:
    """A counter's growth per second."""
    metric = _metric(name, "counter")
    return _sum(by, _once(metric, f"rate({_select(metric, name, only)}[{window}])"), metric)


def quantile(share: float, name: str, by: Sequence[str] = (), window: str = WINDOW, **only: str) -> str:
    """A histogram's quantile, in its unit."""
    metric = _metric(name, "histogram")
    buckets = _once(metric, f"rate({_select(metric, f'{name}_bucket', only)}[{window}])", "le")
    _check(metric, by)
    return f"histogram_quantile({share:g}, sum by ({', '.join([*by, 'le'])}) ({buckets}))"


def mean(name: str, by: Sequence[str] = (), window: str = WINDOW, **only: str) -> str:
    """A histogram's mean, in its unit."""
    metric = _metric(name, "histogram")
    parts = [
        _sum(by, _once(metric, f"rate({_select(metric, f'{name}_{part}', only)}[{window}])"), metric)
        for part in ("sum", "count")
    ]
    return f"{parts[0]} / {parts[1]}"


def gpu(name: str, expression: str = "{}") -> str:
    """One of Ray's GPU metrics, by node and GPU; ``expression`` is put around it."""
    _metric(name, "gauge")
    return expression.format(f"max by (ip, GpuIndex) ({name})")


def gpu_memory_ratio() -> str:
    """Used share of each GPU's memory."""
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
    """``expression`` without the copies that come of scraping several gateways."""
    if metric.source != "gateway":
        return expression
    return f"max by ({', '.join([GATEWAY_LABEL, *metric.labels, *more])}) ({expression})"


def _sum(by: Sequence[str], expression: str, metric: Metric) -> str:
    _check(metric, by)
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"
