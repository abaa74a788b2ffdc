from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from controlplane.cli import main

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "simulated.yaml")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    rows = [f"{i * 0.2},{50 + i % 60},{10 + i % 30}" for i in range(1500)]
    path.write_text("at_s,input_tokens,output_tokens\n" + "\n".join(rows), "utf-8")
    return str(path)


def simulate(*args: str):
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


def test_people_get_a_table(trace: str) -> None:
    done = simulate("--trace", trace, "--config", CONFIG, "--policy", "kpa", "--hours", "0.05")
    assert done.exit_code == 0, done.output
    assert "kept the SLO" in done.stdout


def test_a_gpu_tier_needs_to_know_its_gpu(trace: str) -> None:
    done = simulate("--trace", trace, "--config", str(ROOT / "configs" / "gpu.yaml"))
    assert done.exit_code != 0
    assert "--gpu L4" in done.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "oracle"], "plans for one tier"),
        (["--mix", "simple"], "no share"),
        (["--mix", "simple=0"], "all 0"),
        (["--min-replicas", "5", "--max-replicas", "2"], "--min-replicas"),
        (["--skip-hours", "9"], "no requests"),
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
