"""Writes the result of a run as a PNG file, or as a self-contained HTML page."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from controlplane.core.recommendations.views import effect_text, outcome_text
from controlplane.simulation.placement_text import placement_lines
from controlplane.simulation.results import SimulationResult, TierResult, hours_since_start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS: Final = 3
_MOST_ROWS: Final = 200
"""Maximum number of rows in a table."""
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd}
td,th{text-align:right}td:first-child,th:first-child,td.text{text-align:left}
svg{max-width:100%;height:auto}h1{font-size:1.4em}"""


def write_png(result: SimulationResult, path: Path) -> None:
    """Write the plots as a PNG file."""
    _figure(result).savefig(path, format="png", dpi=110, metadata={"Software": None})


def write_html(result: SimulationResult, path: Path) -> None:
    """Write plots, tables, recommendations and decisions as one HTML page."""
    path.write_text(page(result), "utf-8")


def page(result: SimulationResult) -> str:
    """The HTML page. Equal results give equal text."""
    head = (
        f"{result.requests} requests in {result.simulated_s / 3600:.2f} h, policy {result.policy}, seed "
        f"{result.seed}: {result.attainment:.2%} met the SLO with {result.gpu_hours:.2f} GPU hours"
    )
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>Simulation</title>",
            f"<style>{_STYLE}</style><h1>Simulation</h1><p>{html.escape(head)}</p>",
            _svg(result),
            _tier_table(result),
            "".join(f"<p>{html.escape(line)}</p>" for line in placement_lines(result)),
            _recommendation_table(result),
            _decision_table(result),
            "</html>",
        ]
    )


def _svg(result: SimulationResult) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Without a fixed salt the ids in the file are random.
    with mpl.rc_context({"svg.hashsalt": "tierplane", "svg.fonttype": "none"}):
        _figure(result).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(result: SimulationResult) -> Figure:
    from matplotlib.figure import Figure

    count = len(result.tiers)
    figure = Figure(figsize=(7.0 * min(count, 3), 7.5), layout="constrained")
    axes = figure.subplots(_ROWS, count, sharex=True, squeeze=False)
    for column, tier in enumerate(result.tiers):
        _draw([axes[row][column] for row in range(_ROWS)], tier)
    return figure


def _draw(axes: list[Any], tier: TierResult) -> None:
    hours = [sample.at_s / 3600 for sample in tier.samples]
    load, fleet, attainment = axes
    load.set_title(tier.record.tier)
    load.plot(
        hours, [s.arrivals_per_s for s in tier.samples], linewidth=0.8, color="#666", label="requests/s"
    )
    load.set_ylabel("requests/s")
    placed = [s.placed for s in tier.samples]
    fleet.fill_between(hours, placed, step="post", color="#9bc", label="placed")
    fleet.step(hours, [s.ready for s in tier.samples], where="post", linewidth=1, color="#036", label="ready")
    if any(s.waiting for s in tier.samples):
        ordered = [s.placed + s.waiting for s in tier.samples]
        fleet.fill_between(hours, placed, ordered, step="post", color="#eb9", label="no room")
    fleet.set_ylabel("replicas")
    fleet.legend(loc="upper right", fontsize="small")
    attainment.plot(hours, [s.attainment for s in tier.samples], linewidth=0.8, color="#181")
    attainment.set_ylim(-0.02, 1.04)
    attainment.set_ylabel("met the SLO")
    queued = attainment.twinx()
    queued.plot(hours, [s.queued for s in tier.samples], linewidth=0.8, color="#b30")
    queued.set_ylabel("waiting", color="#b30")
    attainment.set_xlabel("hours")
    for axis in (load, fleet, queued):
        axis.set_ylim(bottom=0)


def _tier_table(result: SimulationResult) -> str:
    rows = []
    for tier in result.tiers:
        data = tier.as_json()
        cells = [
            data["requests"],
            f"{data['slo_attainment']:.2%}",
            data["gpu_hours"],
            data["cost"],
            *(_ms(data[name][q]) for name in ("queue_ms", "ttft_ms", "latency_ms") for q in ("p50", "p99")),
        ]
        inner = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        rows.append(f"<tr><td>{html.escape(data['tier'])}</td>{inner}</tr>")
    titles = (
        *("tier", "requests", "met the SLO", "GPU hours", "cost", "queue p50", "queue p99"),
        *("first token p50", "first token p99", "answer p50", "answer p99"),
    )
    return _table(titles, rows)


def _recommendation_table(result: SimulationResult) -> str:
    rows = []
    for item in result.recommendations[-_MOST_ROWS:]:
        recommendation = item.recommendation
        cells = (
            recommendation.instance,
            f"{recommendation.kind}: {recommendation.suggestion}",
            "; ".join(recommendation.reasons),
            effect_text(recommendation.effect),
            f"{recommendation.confidence:.0%}",
            outcome_text(item),
        )
        inner = "".join(f"<td class=text>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{hours_since_start(item):.3f} h</td>{inner}</tr>")
    record = result.record
    mean = "" if record.mean is None else f", mean score {record.mean:.2f}"
    summary = f"{record.judged} judged, {record.right} right{mean}"
    titles = ("when", "tier", "recommendation", "why", "predicted", "sure", "judged")
    head = f"<h2>Recommendations ({_shown(rows, record.given)})</h2><p>{summary}</p>"
    return head + _table(titles, rows)


def _decision_table(result: SimulationResult) -> str:
    rows = [
        f"<tr><td>{entry.at_s / 3600:.3f} h</td><td class=text>{html.escape(entry.tier)}</td>"
        f"<td>{entry.before} to {entry.target}</td><td class=text>{html.escape(entry.reason)}</td></tr>"
        for entry in result.decisions[:_MOST_ROWS]
    ]
    head = f"<h2>Changes ({_shown(rows, result.decisions_total)})</h2>"
    return head + _table(("when", "tier", "replicas", "why"), rows)


def _shown(rows: list[str], total: int) -> str:
    return f"{len(rows)} of {total}" if len(rows) < total else f"{total}"


def _table(titles: tuple[str, ...], rows: list[str]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"
