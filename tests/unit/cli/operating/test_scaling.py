"""scale, recommendations and report, with a controller that is played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.cli.operating import recommendations, report, scale
from controlplane.core.recommendations.log import IssuedRecommendation, TrackRecord
from controlplane.core.recommendations.rules import Effect, Recommendation, RecommendationKind, Score
from controlplane.core.recommendations.views import ScalingReport, TierScalingView
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from tests.support.fake_plane import FakePlane
from tests.support.reports import EVIL, sample_report

RECOMMENDATION = Recommendation(
    "small",
    RecommendationKind.SCALE_OUT,
    ("60 requests wait, over 50",),
    "run 3 replicas instead of 2",
    Effect(900, 1, 1),
    0.7,
    3,
)
OPEN = IssuedRecommendation(1, 0.0, RECOMMENDATION, 2, 0.0)
SCORED = IssuedRecommendation(
    2, 0.0, RECOMMENDATION, 2, 0.0, True, Score(True, 0.8, "1000 ms measured, 900 predicted")
)
VIEW = TierScalingView("small", 2, 2, 3, "5 requests/s are forecast", "advise", 5.0, 2.5, 21.0, 0.6)


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> FakePlane:
    played = FakePlane(
        scale=ActionResponse(ActionOutcome.DONE, "tier small: 3 replicas", ("small",)),
        scaling=ScalingReport(
            "advise", (VIEW,), (OPEN, SCORED), TrackRecord(2, 1, 1, 0.8), unix_s=OPEN.again_unix_s + 60.0
        ),
        plane_report=sample_report(),
    )
    played.connect(monkeypatch, scale, recommendations, report)
    return played


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (("3",), ("small", 3, None, "")),
        (("0", "--for", "90s", "--reason", "a test"), ("small", 0, 90.0, "a test")),
        (("2", "--for", "15m"), ("small", 2, 900.0, "")),
        (("2", "--for", "1.5h"), ("small", 2, 5400.0, "")),
        (("auto",), ("small", None, None, "")),
    ],
)
def test_scale_calls_the_controller(
    plane: FakePlane, words: tuple[str, ...], arguments: tuple[Any, ...]
) -> None:
    done = run("scale", "small", *words)
    assert (done.exit_code, done.output) == (0, "tier small: 3 replicas\n")
    assert plane.calls == [("scale", *arguments)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("many",), "neither a number nor 'auto'"),
        (("3", "--for", "soon"), "not a duration"),
        (("3", "--for", "0"), "not a duration"),
        (("auto", "--for", "2h"), "'auto' takes no duration"),
    ],
)
def test_scale_names_the_wrong_argument(plane: FakePlane, words: tuple[str, ...], says: str) -> None:
    done = run("scale", "small", *words)
    assert done.exit_code == 2
    assert says in done.output
    assert not plane.calls


def test_a_refusal_is_an_error(plane: FakePlane) -> None:
    plane.answers["scale"] = ActionResponse(
        ActionOutcome.REFUSED, "tier small: 0 to 4 replicas, not 9", ("small",)
    )
    done = run("scale", "small", "9")
    assert done.exit_code == 1
    assert "0 to 4" in done.output
    done = run("scale", "small", "9", "--json")
    assert (done.exit_code, json.loads(done.output)["outcome"]) == (1, "refused")


def test_recommendations_are_shown_with_targets_or_if_scored_with_outcomes(plane: FakePlane) -> None:
    done = run("recommendations")
    assert done.exit_code == 0
    assert "5 requests/s are forecast" in done.output
    assert "scale_out" in done.output
    assert "followed" not in done.output
    assert "1 of 1 scored recommendations were right, mean score 0.80" in done.output
    done = run("recommendations", "--scored")
    assert "followed; 0.80" in done.output
    assert "forecast" not in done.output
    output = json.loads(run("recommendations", "--json").output)
    assert [each["type"] for each in output["recommendations"]] == ["scale_out", "scale_out"]
    assert output["tiers"][0]["wanted"] == 3


def test_report_prints_a_table_json_and_a_page(plane: FakePlane, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    done = run("report", "--window", "5", "--html", str(path))
    assert done.exit_code == 0, done.output
    assert "75.00%" in done.output
    assert "cost 2.00" in done.output
    assert path.read_text().startswith("<!doctype html>")
    assert json.loads(run("report", "--json").output)["tiers"][0]["tier"] == EVIL
    assert plane.calls == [("plane_report", 5.0), ("plane_report", 60.0)]
    assert run("report", "--window", "0").exit_code == 2
