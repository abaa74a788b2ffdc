"""Checks command lines with the installed vLLM's own argument parser, instead of a list that could be
outdated.

Importing vLLM takes many seconds and much memory, so a separate process does it: this module run as a
program, with command lines as JSON on standard input and the results as JSON on standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controlplane.errors import SetupError

TIMEOUT_S = 180.0

_PARSERS = (
    ("vllm.entrypoints.launchers.cli_args", "vllm.utils.argparse_utils"),
    ("vllm.entrypoints.openai.cli_args", "vllm.utils.argparse_utils"),
    ("vllm.entrypoints.openai.cli_args", "vllm.utils"),
)
"""The modules with vLLM's server parser and with its parser class, for several versions, newest first."""


@dataclass(frozen=True, slots=True)
class ParserReport:
    """The installed vLLM's flags, and the errors it found."""

    version: str
    """Its version as ``major.minor``."""
    flags: tuple[str, ...]
    """All flags of its server, without the leading dashes and without the ``no-`` forms."""
    errors: tuple[str, ...]
    """For each command line, why it was rejected; "" if it was accepted."""


def check_command_lines(command_lines: Sequence[Sequence[str]]) -> ParserReport:
    """Has the installed vLLM parse each command line (the arguments after the module's name).

    Blocks while vLLM is imported, 10 to 30 s. SetupError if vLLM is not installed or its parser is not found.
    """
    env = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "controlplane.engines.vllm_parser"],
            input=json.dumps([list(line) for line in command_lines]),
            capture_output=True,
            text=True,
            env=env,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"vLLM did not import within {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(
            f"vLLM's argument parser can't run ({last}): install vLLM with `make env EXTRA=cpu` or EXTRA=gpu"
        )
    report = json.loads(done.stdout.splitlines()[-1])
    return ParserReport(report["version"], tuple(report["flags"]), tuple(report["errors"]))


def _new_parser() -> tuple[Any, Any]:
    """The parser of the server's flags, and vLLM's own check of the parsed arguments."""
    for module, classes in _PARSERS:
        try:
            cli_args = importlib.import_module(module)
            parser_class = importlib.import_module(classes).FlexibleArgumentParser
        except (ModuleNotFoundError, AttributeError) as error:
            if (getattr(error, "name", "") or "").partition(".")[0] not in {"vllm", ""}:
                raise
            continue
        return cli_args.make_arg_parser(parser_class()), cli_args.validate_parsed_serve_args
    raise ModuleNotFoundError("no vLLM with a parser in a known module")


def _flags(parser: Any) -> list[str]:
    options = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    return sorted(o for o in options if not o.startswith(("-", "no-")) and o != "help")


def _error(parser: Any, check: Any, argv: list[str]) -> str:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            check(parser.parse_args(argv))
    except SystemExit:
        lines = printed.getvalue().strip().splitlines() or ["rejected"]
        return lines[-1].partition("error: ")[2] or lines[-1]
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _main() -> None:
    command_lines: list[list[str]] = json.load(sys.stdin)
    parser, check = _new_parser()
    version = ".".join(importlib.import_module("vllm").__version__.split(".")[:2])
    errors = [_error(parser, check, line) for line in command_lines]
    print(json.dumps({"version": version, "flags": _flags(parser), "errors": errors}))


if __name__ == "__main__":
    _main()
