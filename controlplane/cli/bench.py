"""``tierplane bench NAME``: run a benchmark of the checkout that tierplane was installed from.

A benchmark is a file ``tests/benchmarks/bench_NAME.py`` with a click command named ``command``. It is
imported when it is run; ``--help`` lists the first line of its docstring, which it reads from the source.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import click

from controlplane.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
_PREFIX = "bench_"


class BenchGroup(click.Group):
    """The benchmarks in ``tests/benchmarks`` as commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the benchmarks, with ``-`` for ``_``."""
        names = (path.stem.removeprefix(_PREFIX) for path in _folder().glob(f"{_PREFIX}*.py"))
        return sorted(name.replace("_", "-") for name in names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the benchmark; None if there is none of that name."""
        path = _path(cmd_name)
        if not path.is_file():
            if not _folder().is_dir():
                raise SetupError(
                    "the benchmarks are not installed: run them from a checkout, "
                    "with tierplane installed from it (pip install -e .)"
                )
            return None
        # Benchmarks import shared code as tests.benchmarks.*.
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        command = importlib.import_module(f"tests.benchmarks.{path.stem}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"{path}: 'command' is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The benchmarks in ``--help``, without importing them."""
        rows = [(name, _first_line(_path(name))) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Benchmarks"):
                formatter.write_dl(rows)


def _folder() -> Path:
    return ROOT / "tests" / "benchmarks"


def _path(name: str) -> Path:
    return _folder() / f"{_PREFIX}{name.replace('-', '_')}.py"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]


@click.group(cls=BenchGroup)
def command() -> None:
    """Run a benchmark; each prints a table, or JSON with --json."""
