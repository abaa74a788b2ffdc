"""Generates the reference of all metrics, ``docs/reference/metrics.md``, from the catalog.

``python -m controlplane.monitoring.reference`` writes it; `make docs` runs this, and a test compares the file
with the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from controlplane.monitoring.catalog import GATEWAY_LABEL, Metric, metrics

PAGE: Final = Path("docs/reference/metrics.md")
"""The page's path in the repository."""

_HEAD: Final = f"""\
<!-- Written by `make docs` from controlplane/monitoring/catalog.py: change the metrics, not this page. -->

# Metrics

`GET /metrics` responds in Prometheus' text format. Names are those to use in queries: a counter ends in
`_total`, and a histogram has the series `_bucket`, `_sum` and `_count`.

Every gateway exports the series of all gateways, and the label `{GATEWAY_LABEL}` identifies each. Scrape one,
or scrape all and take `max by ({GATEWAY_LABEL}, …)` before a sum: otherwise each series counts once for every
gateway that was scraped.

[Alerts](../guide/alerts.md) and [monitoring](../guide/operating.md#monitoring) are built on these metrics.
"""
_GATEWAY: Final = "## Gateway metrics\n"
_RAY: Final = """\
## Ray metrics

Ray's own agent exports these metrics for each node, and the dashboards use them. The gateways' `/metrics`
does not include them.
"""


def metrics_page() -> str:
    """The whole page: a table of the gateways' metrics, and one of Ray's."""
    found = metrics().values()
    own = _table(metric for metric in found if metric.source == "gateway")
    of_ray = _table(metric for metric in found if metric.source == "ray")
    return "\n".join([_HEAD, _GATEWAY, own, _RAY, of_ray])


def _table(found: Iterable[Metric]) -> str:
    lines = ["| metric | type | labels | what |", "|---|---|---|---|"]
    for metric in sorted(found, key=lambda metric: metric.name):
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.about} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(metrics_page(), "utf-8")
