"""What the benchmark makes of its rows, without starting an engine."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from controlplane.cli import main

ROWS = [
    {
        "case": "a",
        "term": "weights",
        "predicted_bytes": 2**20,
        "measured_bytes": 2**21,
        "error_percent": -50.0,
    },
    {
        "case": "a",
        "term": "KV blocks",
        "predicted_bytes": 1,
        "measured_bytes": 1,
        "error_percent": 0.0,
        "predicted_count": 1820,
        "measured_count": 1820,
    },
]


def test_rows_become_a_table(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": ROWS}))
    result = CliRunner().invoke(main, ["bench", "memory", "--rows", str(file)])
    assert result.exit_code == 0, result.output
    assert "| a | weights | 1.0 MiB | 2.0 MiB | -50.00 % |" in result.output
    assert "| a | KV blocks | 1,820 | 1,820 | +0.00 % |" in result.output
    again = CliRunner().invoke(main, ["bench", "memory", "--rows", str(file), "--json"])
    assert json.loads(again.output)["rows"] == ROWS


def test_a_case_that_failed_fails_the_command(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [{"case": "b", "term": "failed", "error": "no start"}]}))
    result = CliRunner().invoke(main, ["bench", "memory", "--rows", str(file)])
    assert result.exit_code == 1
    assert "| b | failed: no start |" in result.output


def test_an_unknown_case_lists_the_known_ones() -> None:
    result = CliRunner().invoke(main, ["bench", "memory", "--only", "nothing like it"])
    assert result.exit_code == 2
    assert "tp=3 bfloat16" in result.output
