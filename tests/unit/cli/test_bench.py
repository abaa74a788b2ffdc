"""``tierplane bench``: benchmarks of the checkout as commands."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from controlplane.cli import bench, main


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with nothing in it."""
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    return tmp_path


def test_the_list_of_benchmarks_needs_no_import(checkout: Path) -> None:
    folder = checkout / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "bench_two_words.py").write_text(
        '"""Measure two words.\n\nMore."""\nraise SystemExit("imported")\n'
    )
    (folder / "helper.py").touch()
    result = CliRunner().invoke(main, ["bench", "--help"])
    assert result.exit_code == 0
    assert "two-words  Measure two words." in result.output
    assert "helper" not in result.output


def test_without_a_checkout(checkout: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "gateway"])
    assert result.exit_code == 1
    assert "run them from a checkout" in result.stderr


def test_every_benchmark_of_this_checkout_is_a_command() -> None:
    group = bench.command
    names = group.list_commands(click.Context(group))
    assert names
    for name in names:
        assert CliRunner().invoke(main, ["bench", name, "--help"]).exit_code == 0, name
