from __future__ import annotations

import pytest
from rich.table import Table

from controlplane.cli.console import PIPE_WIDTH, stdout


def test_output_to_a_pipe_is_not_truncated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    table = Table("trace", "slo_attainment")
    table.add_row("t" * 100, "0.99612345")
    stdout().print(table)
    text = capsys.readouterr().out
    assert "t" * 100 in text
    assert "0.99612345" in text
    assert max(map(len, text.splitlines())) < PIPE_WIDTH, "no wider than it has to be"
