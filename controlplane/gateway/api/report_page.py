"""A report as a self-contained HTML page with tables and plots; the page loads nothing from the network.

All names and texts are escaped. Plots are SVG lines, with gaps where there is no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Final
from urllib.parse import parse_qs

from controlplane.core.reports.report import (
    MAX_WINDOW_MINUTES,
    MIN_WINDOW_MINUTES,
    InstanceReport,
    PlaneReport,
    Track,
    TrackPoint,
)
from controlplane.errors import BadRequest
from controlplane.gateway.api import svg_plot

CONTENT_SECURITY: Final = b"default-src 'none'; style-src 'unsafe-inline'"
"""The page may load nothing and run no script."""
DEFAULT_MINUTES: Final = 60.0
FORMATS: Final = ("json", "html")
_STYLE: Final = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:74em;padding:0 1em}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
td,th{padding:.2em .7em;border-bottom:1px solid #8884;text-align:right;white-space:nowrap}
td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
figure{display:inline-block;margin:0 1em 1em 0;max-width:100%}figcaption{font-weight:600}
svg{max-width:100%;height:auto}svg text{fill:currentColor;font:11px system-ui,sans-serif}
svg .grid{stroke:#8884}.key span{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
h1{font-size:1.4em}h2{font-size:1.15em}.gone{opacity:.6}.missed{color:#c0392b;font-weight:600}
@media(max-width:40em){body{margin:1em auto}figure{margin:0 0 1em}
table,tbody,tr,td{display:block}tr:first-child{display:none}
tr{border:1px solid #8884;border-radius:8px;padding:.4em .8em;margin:0 0 .8em}
td,td:first-child,td:nth-child(2){display:flex;justify-content:space-between;text-align:right;
border:0;padding:.1em 0}
td::before{content:attr(data-head);opacity:.7;padding-right:1em}td:first-child{font-weight:600}td:empty{display:none}}"""


def parse_query(query: str) -> tuple[float, str]:
    """``window_minutes`` and ``format`` from the query string of ``/report``. Raises BadRequest for invalid
    values."""
    found = parse_qs(query, keep_blank_values=True)
    text = found.get("window_minutes", [f"{DEFAULT_MINUTES:g}"])[0]
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not MIN_WINDOW_MINUTES <= minutes <= MAX_WINDOW_MINUTES:
        raise BadRequest(
            f"window_minutes must be a number from {MIN_WINDOW_MINUTES:g} to {MAX_WINDOW_MINUTES:g}, "
            f"not '{text[:40]}'",
            param="window_minutes",
        )
    form = found.get("format", [FORMATS[0]])[0]
    if form not in FORMATS:
        raise BadRequest(f"format must be one of {', '.join(FORMATS)}, not '{form[:40]}'", param="format")
    return minutes, form


def page(report: PlaneReport) -> str:
    """The report as an HTML page."""
    cost = ""
    if report.cost_per_gpu_hour:
        cost = f", cost {report.cost:.2f} at {report.cost_per_gpu_hour:g} per GPU hour"
    minutes = (report.until_unix_s - report.from_unix_s) / 60
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>tierplane report</title>",
            f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
            f"<h1>Report on {duration(minutes)}</h1>",
            f"<p>{svg_plot.span_text(*_span(report))}. {report.gpu_hours:.2f} GPU hours{cost}.</p>",
            "<h2>Tiers</h2>",
            _table(report.tiers),
            _key([track.tier for track in report.tracks]),
            *(
                _plot(title, report, value)
                for title, value in _PLOTS
                if any(value(point) is not None for track in report.tracks for point in track.points)
            ),
            "<h2>Endpoints</h2>",
            _table(report.endpoints),
            f"<p>{report.left_out} more are not shown.</p>" if report.left_out else "",
            "</html>",
        ]
    )


def duration(minutes: float) -> str:
    """A length of time in its largest unit that is whole, else in minutes."""
    for size, unit in ((24 * 60, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size and minutes % size == 0:
            count = round(minutes / size)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{minutes:g} minutes"


def row(item: InstanceReport) -> tuple[str, ...]:
    """An instance as cells of :data:`HEADS`; ``-`` means unknown."""
    return (
        item.tier,
        item.instance if item.instance != item.tier else "",
        f"{item.requests:.0f}",
        _shown(item.requests_per_s, "{:.2f}"),
        _shown(item.latency_mean_ms, "{:.0f}"),
        _shown(item.latency_p50_ms, "{:.0f}"),
        _shown(item.latency_p95_ms, "{:.0f}"),
        _shown(item.latency_p99_ms, "{:.0f}"),
        _shown(item.latency_max_ms, "{:.0f}"),
        _shown(item.ttft_p50_ms, "{:.0f}"),
        _shown(item.ttft_p95_ms, "{:.0f}"),
        _shown(item.ttft_p99_ms, "{:.0f}"),
        _shown(item.attainment, "{:.2%}"),
        _target(item),
        _shown(item.availability, "{:.2%}"),
        _shown(item.queue_mean, "{:.1f}"),
        _shown(item.queue_max, "{:.0f}"),
        _shown(item.gpu_ratio, "{:.0%}"),
        f"{item.prompt_tokens + item.generated_tokens:.0f}",
        f"{item.errors:.0f}",
        f"{item.resumed:.0f}",
        f"{item.spilled:.0f}",
        f"{item.gpu_hours:.2f}",
        f"{item.cost:.2f}",
    )


HEADS: Final = (
    *("tier", "endpoint", "requests", "per s", "mean ms", "p50 ms", "p95 ms", "p99 ms", "max ms"),
    *("first p50", "first p95", "first p99", "in SLO", "SLO target", "available"),
    *("queue", "max queue", "GPU", "tokens", "errors", "resumed", "spilled", "GPU h", "cost"),
)
"""Column heads of the cells that :func:`row` returns."""
OF_SLO: Final = ("in SLO", "SLO target")
"""Columns that are highlighted for a tier that missed its SLO."""

_PLOTS: Final[tuple[tuple[str, Callable[[TrackPoint], float | None]], ...]] = (
    ("Requests per second", lambda point: point.requests_per_s),
    ("Latency, mean, ms", lambda point: point.latency_mean_ms),
    ("Latency, maximum, ms", lambda point: point.latency_max_ms),
    ("Waiting requests", lambda point: point.queue),
    ("Within SLO, %", lambda point: None if point.attainment is None else point.attainment * 100),
    ("GPU utilisation, %", lambda point: None if point.gpu_ratio is None else point.gpu_ratio * 100),
)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _target(item: InstanceReport) -> str:
    """The share of requests that must meet the SLO, and whether it was missed."""
    if item.slo_target is None:
        return "-"
    return f"{100 * item.slo_target:.6g}%{', missed' if item.slo_missed else ''}"


def _span(report: PlaneReport) -> tuple[float, float]:
    return report.from_unix_s, report.until_unix_s


def _table(items: Iterable[InstanceReport]) -> str:
    head = "".join(f"<th>{escape(name)}" for name in HEADS)
    rows = "\n".join(f"<tr{' class=gone' if item.gone else ''}>{_cells(item)}" for item in items)
    return f"<table><tr>{head}\n{rows}</table>"


def _cells(item: InstanceReport) -> str:
    marked = OF_SLO if item.slo_missed else ()
    return "".join(
        f"<td data-head='{escape(head)}'{' class=missed' if head in marked else ''}>{escape(cell)}"
        for head, cell in zip(HEADS, row(item), strict=True)
    )


def _key(tiers: Sequence[str]) -> str:
    parts = [
        f"<span style='background:{svg_plot.COLOURS[i % len(svg_plot.COLOURS)]}'></span>{escape(tier)}"
        for i, tier in enumerate(tiers)
    ]
    return f"<p class=key>{''.join(parts)}</p>"


def _plot(title: str, report: PlaneReport, value: Callable[[TrackPoint], float | None]) -> str:
    curves = (svg_plot.Curve(_lines(track, value)) for track in report.tracks)
    return svg_plot.plot(title, *_span(report), curves)


def _lines(track: Track, value: Callable[[TrackPoint], float | None]) -> list[list[tuple[float, float]]]:
    """Runs of adjacent points; a point without neighbours becomes a short line."""
    lines: list[list[tuple[float, float]]] = []
    last_s: float | None = None
    for point in track.points:
        figure = value(point)
        if figure is None:
            continue
        if last_s is None or point.unix_s - last_s > 1.5 * track.step_s:
            lines.append([(point.unix_s, figure)])
        lines[-1].append((point.unix_s + track.step_s / 2, figure))
        last_s = point.unix_s
    return lines
