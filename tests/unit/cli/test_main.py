"""The command group: lazy, and errors as text."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from controlplane import __version__, cli
from controlplane.cli import COMMANDS, main
from controlplane.errors import ConfigError, EngineError, Problem, SetupError


class Failing(click.Command):
    """A command that raises ``error``."""

    error: Exception = SetupError("no")

    def invoke(self, ctx: click.Context) -> None:
        raise self.error


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """The command ``fail``."""
    command = Failing("fail")
    monkeypatch.setattr(cli, "FAILING", command, raising=False)
    monkeypatch.setitem(COMMANDS, "fail", ("controlplane.cli:FAILING", "Fail."))
    return command


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_table_of_commands_matches_the_commands(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.get_short_help_str(200) == COMMANDS[name][1]


def test_help_and_version() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)
    assert __version__ in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "configs/cpu.yaml"], ["bench", "--help"]])
def test_commands_that_need_no_ray_do_not_import_it(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom controlplane.cli import main\n"
        f"code = main({arguments!r}, standalone_mode=False)\n"
        "sys.exit('ray' in sys.modules or 'torch' in sys.modules or code or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SetupError("no disk: buy one"), 1, "Error: no disk: buy one\n"),
        (EngineError("gone"), 1, "Error: gone\n"),
        (ConfigError([Problem("a.b", "wrong", "mend it")], "f.yaml"), 2, "a.b: wrong (mend it)"),
    ],
)
def test_errors_are_printed_without_a_traceback(
    failing: Failing, error: Exception, code: int, text: str
) -> None:
    failing.error = error
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback(failing: Failing) -> None:
    result = CliRunner().invoke(main, ["--debug", "fail"])
    assert isinstance(result.exception, SetupError)


def test_a_bug_is_not_hidden(failing: Failing) -> None:
    failing.error = KeyError("x")
    assert isinstance(CliRunner().invoke(main, ["fail"]).exception, KeyError)


def test_unknown_command() -> None:
    result = CliRunner().invoke(main, ["nothing"])
    assert result.exit_code == 2
    assert "No such command" in result.output
