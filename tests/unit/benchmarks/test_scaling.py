from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from controlplane.cli import main


def trace(folder: Path, count: int, gap_s: float) -> str:
    path = folder / "small.csv"
    rows = [f"{i * gap_s},{200 + i % 300},{20 + i % 50}" for i in range(count)]
    path.write_text("at_s,input_tokens,output_tokens\n" + "\n".join(rows), "utf-8")
    return str(path)


def test_rows_have_what_they_are_compared_by(tmp_path: Path) -> None:
    args = ["--trace", trace(tmp_path, 800, 0.5), "--cold-start-s", "30", "--json"]
    for policy in ("tierplane", "serve", "oracle"):
        args += ["--policy", policy]
    done = CliRunner().invoke(main, ["bench", "scaling", *args])
    assert done.exit_code == 0, done.output
    found = {row["policy"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(found) == {"tierplane", "serve", "oracle"}
    for row in found.values():
        assert row["trace"] == "small"
        assert row["cold_start_s"] == 30.0
        assert 0.0 <= row["slo_attainment"] <= 1.0
        assert row["gpu_hours"] > 0
    assert found["oracle"]["oracle_ratio"] == 1.0


def test_a_frontier_asks_each_policy_for_more_than_one_goal_or_target(tmp_path: Path) -> None:
    svg = tmp_path / "picture.svg"
    args = ["--trace", trace(tmp_path, 3000, 0.1), "--cold-start-s", "30"]
    args += ["--json", "--frontier", "--svg", str(svg)]
    for policy in ("tierplane", "static", "kpa", "oracle"):
        args += ["--policy", policy]
    done = CliRunner().invoke(main, ["bench", "scaling", *args])
    assert done.exit_code == 0, done.output
    assert "cold start 30 s" in svg.read_text("utf-8")
    rows = json.loads(done.stdout)["rows"]
    [first, *_] = rows
    assert (first["policy"], first["goal"], first["target"]) == ("tierplane", 0.99, None)
    goals = {row["goal"] for row in rows if row["policy"] == "tierplane"}
    assert {0.9, 0.99, 0.999} <= goals
    assert {row["goal"] for row in rows if row["policy"] != "tierplane"} == {0.99}
    hours = {row["target"]: row["gpu_hours"] for row in rows if row["policy"] == "static"}
    assert hours[0.7] < hours[1.0] < hours[1.25]
    kpa = {row["target"]: row for row in rows if row["policy"] == "kpa"}
    assert kpa[1.0]["gpu_hours"] < kpa[0.7]["gpu_hours"] < kpa[0.4]["gpu_hours"]
    for row in rows:
        if row["better"] == "tierplane":
            assert row["gpu_hours"] >= first["gpu_hours"]
            assert row["slo_attainment"] <= first["slo_attainment"] + 1e-4
    by_name = {f"{row['policy']}@{row['target']:g}": row for row in rows if row["target"] is not None}
    by_name |= {"static": by_name["static@1"], "kpa": by_name["kpa@0.7"]}
    for name in first["better"].split():
        assert by_name[name]["gpu_hours"] <= first["gpu_hours"]
        assert by_name[name]["slo_attainment"] >= first["slo_attainment"] - 1e-4
