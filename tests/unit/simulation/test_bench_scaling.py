from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from controlplane.cli import main


def test_rows_have_what_they_are_compared_by(tmp_path: Path) -> None:
    trace = tmp_path / "small.csv"
    rows = [f"{i * 0.5},{200 + i % 300},{20 + i % 50}" for i in range(800)]
    trace.write_text("at_s,input_tokens,output_tokens\n" + "\n".join(rows), "utf-8")
    args = ["--trace", str(trace), "--cold-start-s", "30", "--json"]
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
