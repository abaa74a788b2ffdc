"""The report's page: which queries are valid, and that names of instances can't inject anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from controlplane.core.reports.report import (
    PlaneReport,
)
from controlplane.errors import BadRequest
from controlplane.gateway.api.report_page import HEADS, page, parse_query, row
from tests.support.gateway import running
from tests.support.reports import EVIL, sample_report


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", (60.0, "json")),
        ("window_minutes=5", (5.0, "json")),
        ("window_minutes=43200&format=html", (43200.0, "html")),
    ],
)
def test_valid_queries(query: str, expected: tuple[float, str]) -> None:
    assert parse_query(query) == expected


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("window_minutes=0", "window_minutes"),
        ("window_minutes=43201", "window_minutes"),
        ("window_minutes=soon", "window_minutes"),
        ("window_minutes=nan", "window_minutes"),
        ("window_minutes=", "window_minutes"),
        ("format=pdf", "format"),
    ],
)
def test_invalid_queries_name_the_parameter(query: str, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_query(query)
    assert raised.value.param == param


def test_a_row_has_a_cell_for_each_head_and_a_dash_for_the_unknown() -> None:
    (tier,) = sample_report().tiers
    cells = dict(zip(HEADS, row(tier), strict=True))
    assert cells["requests"] == "10"
    assert cells["mean ms"] == "500"
    assert (cells["in SLO"], cells["SLO target"]) == ("90.00%", "95%, missed")
    assert cells["available"] == "75.00%"
    assert cells["GPU"] == "-"
    assert cells["cost"] == "2.00"


@pytest.mark.parametrize(
    ("target", "shown", "marked"), [(0.9999, "99.99%, missed", 2), (0.9, "90%", 0), (None, "-", 0)]
)
def test_a_tier_that_missed_its_slo_is_marked(target: float | None, shown: str, marked: int) -> None:
    report = sample_report(target=target)
    assert row(report.tiers[0])[HEADS.index("SLO target")] == shown
    assert row(report.endpoints[0])[HEADS.index("SLO target")] == "-"
    text = page(report)
    assert text.count(" class=missed>") == marked
    assert f">{shown}<" in text


def test_the_page_escapes_what_comes_from_outside_and_loads_nothing() -> None:
    text = page(sample_report())
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert "small-1&amp;2" in text
    assert not re.search(r"(src|href)\s*=|url\(|<script", text)


def test_a_line_has_a_gap_where_data_is_missing() -> None:
    text = page(sample_report())
    requests = text.split("Requests per second")[1].split("</figure>")[0]
    assert requests.count("<polyline") == 2
    assert "GPU utilisation" not in text, "no GPU was measured"


async def test_the_route_queries_the_controller_and_responds_in_both_formats() -> None:
    report = sample_report()
    windows: list[float] = []

    class Played:
        """A controller that has one report."""

        async def query(self, name: str, arguments: Mapping[str, Any]) -> Any:
            raise NotImplementedError

        async def plane_report(self, window_minutes: float) -> PlaneReport:
            windows.append(window_minutes)
            return report

        async def gpus(self) -> Any:
            raise NotImplementedError

        async def nodes(self) -> Any:
            raise NotImplementedError

        async def scaling(self) -> Any:
            raise NotImplementedError

    async with running() as rig:
        status, _ = await rig.get("/report")
        assert status == 503, "there is no controller"
        rig.gateway.controller = Played()
        status, value = await rig.get("/report?window_minutes=5")
        assert status == 200
        assert value["tiers"][0]["requests"] == 10
        assert value.keys() == asdict(report).keys()
        async with rig.client.get(f"{rig.base}/report?format=html") as response:
            assert response.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "<h2>Tiers</h2>" in await response.text()
        status, value = await rig.get("/report?window_minutes=x")
        assert (status, value["error"]["param"]) == (400, "window_minutes")
    assert windows == [5.0, 60.0]
