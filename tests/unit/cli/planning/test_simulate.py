from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.core.recommendations.log import IssuedRecommendation
from controlplane.core.recommendations.rules import Effect, Recommendation, RecommendationKind
from controlplane.core.recommendations.views import effect_text, recommendation_as_json
from tests.support.repository import ROOT

CONFIG = str(ROOT / "configs" / "simulated.yaml")
CLUSTER = str(ROOT / "configs" / "clusters" / "one-node.yaml")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    rows = [f"{i * 0.2},{50 + i % 60},{10 + i % 30}" for i in range(1500)]
    path.write_text("at_s,input_tokens,output_tokens\n" + "\n".join(rows), "utf-8")
    return str(path)


def simulate(*args: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *args])


def test_json_is_the_same_each_time_and_files_are_written(trace: str, tmp_path: Path) -> None:
    args = ["--trace", trace, "--config", CONFIG, "--json", "--mix", "simple=3,complex=1", "--seed", "4"]
    html, png = tmp_path / "out.html", tmp_path / "out.png"
    first = simulate(*args, "--html", str(html), "--png", str(png))
    assert first.exit_code == 0, first.output
    data = json.loads(first.stdout)
    assert data["requests"] == 1500
    assert {tier["tier"]: tier["requests"] > 0 for tier in data["tiers"]} == {
        "lightweight": True,
        "balanced": False,
        "capable": True,
    }
    assert data["slo_attainment"] > 0.9
    assert "a second" in first.stderr
    assert html.stat().st_size > 1000
    assert png.stat().st_size > 1000
    assert simulate(*args).stdout == first.stdout
    assert simulate(*args[:-1], "5").stdout != first.stdout


def test_recommendations_follow_the_configuration_in_the_gateways_format(
    tmp_path: Path,
) -> None:
    trace, config = tmp_path / "trace.csv", tmp_path / "config.yaml"
    rows = [f"{i * 0.05},{50 + i % 60},{200 + i % 30},balanced" for i in range(12000)]
    trace.write_text("at_s,input_tokens,output_tokens,tier\n" + "\n".join(rows), "utf-8")
    scaling = "{advice_interval_s: 60, score_after_s: 120, window_s: 100, thresholds: {latency_ms: 1000}}"
    text = Path(CONFIG).read_text("utf-8")
    config.write_text(f"{text}      controller:\n        scaling: {scaling}\n", "utf-8")
    args = ["--trace", str(trace), "--config", str(config), "--max-replicas", "1"]
    done = simulate(*args, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["record"]["given"] == len(data["recommendations"]) > 2
    assert data["record"]["judged"] > 0
    first = data["recommendations"][0]
    start_s = 1_767_571_200
    assert first["given_unix_s"] == start_s + 20, "the first update: a fifth of window_s"
    assert first["instance"] == "balanced"
    assert any("over 1000 ms" in reason for reason in first["reasons"])
    known = IssuedRecommendation(
        1,
        0.0,
        Recommendation("a", RecommendationKind.SCALE_OUT, (), "", Effect(None, None, 1.0), 0.5, 2),
        1,
        0.0,
    )
    assert first.keys() == recommendation_as_json(known).keys()
    text = simulate(*args).stdout
    record = data["record"]
    assert f"{record['given']} recommendations, {record['judged']} scored, {record['right']} right" in text
    assert f"mean score {record['mean']:.2f}" in text
    assert f"predicted {effect_text(Effect(**data['recommendations'][-1]['predicted']))}" in text


def test_the_output_is_a_table_by_default(trace: str) -> None:
    done = simulate("--trace", trace, "--config", CONFIG, "--policy", "kpa", "--hours", "0.05")
    assert done.exit_code == 0, done.output
    assert "met the SLO" in done.stdout


def test_replicas_run_on_the_nodes_of_a_cluster_file(trace: str) -> None:
    args = ["--trace", trace, "--config", str(ROOT / "configs" / "gpu.yaml"), "--cluster", CLUSTER]
    failing = [*args, "--node-mtbf-hours", "0.03", "--node-recovery-s", "60", "--json"]
    first = simulate(*failing)
    assert first.exit_code == 0, first.output
    data = json.loads(first.stdout)
    assert data["gpu_budget"] == 4.0
    assert data["cluster"] == {"nodes": 1, "gpus": 4.0, "most_gpus": 4.0, "node_failures": 1}
    rooms = {tier["tier"]: tier["room"] for tier in data["tiers"]}
    # Two with half a GPU, one with one, one with two: all that there are.
    assert {name: room["most_gpus"] for name, room in rooms.items()} == {
        "lightweight": 1.0,
        "balanced": 1.0,
        "capable": 2.0,
    }
    # While the node is unavailable there is no room.
    assert rooms["capable"]["waited_s"] >= 60.0
    assert simulate(*failing).stdout == first.stdout
    text = simulate(*args)
    assert "1 node with 4 usable GPUs" in text.stdout


def test_a_gpu_tier_needs_a_gpu_model(trace: str) -> None:
    done = simulate("--trace", trace, "--config", str(ROOT / "configs" / "gpu.yaml"))
    assert done.exit_code != 0
    assert "--gpu L4" in done.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "oracle"], "works for one tier"),
        (["--mix", "simple"], "not a share"),
        (["--mix", "simple=0"], "all shares are 0"),
        (["--min-replicas", "5", "--max-replicas", "2"], "--min-replicas"),
        (["--skip-hours", "9"], "no requests"),
        (["--node-mtbf-hours", "9"], "needs nodes: set --cluster"),
        (["--gpu", "L4", "--cluster", CLUSTER], "--gpu can't be combined with --cluster"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_options_are_named(trace: str, args: list[str], words: str) -> None:
    done = simulate("--trace", trace, "--config", CONFIG, *args)
    assert done.exit_code != 0
    assert words in done.output


def test_a_tier_that_is_not_configured_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s,input_tokens,output_tokens,tier\n0,1,1,nowhere\n", "utf-8")
    done = simulate("--trace", str(path), "--config", CONFIG)
    assert done.exit_code != 0
    assert "tier 'nowhere' is not in the configuration" in done.output
