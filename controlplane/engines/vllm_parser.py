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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlplane.errors import SetupError
from controlplane.paths import install_command

TIMEOUT_S = 180.0

_PARSERS = (
    ("vllm.entrypoints.launchers.cli_args", "vllm.utils.argparse_utils"),
    ("vllm.entrypoints.openai.cli_args", "vllm.utils.argparse_utils"),
    ("vllm.entrypoints.openai.cli_args", "vllm.utils"),
)
"""The modules with vLLM's server parser and with its parser class, for several versions, newest first."""


_NOT_FLAGS = frozenset({"SpeculativeConfig", "DiffusionConfig", "WatermarkConfig", "ProfilerConfig"})
"""Configuration classes whose settings are keys of a JSON flag, not flags."""


@dataclass(frozen=True, slots=True)
class ParserReport:
    """The installed vLLM's flags, and the errors it found."""

    version: str
    """Its version as ``major.minor``."""
    flags: tuple[str, ...]
    """All flags of its server, without the leading dashes and without the ``no-`` forms."""
    values: Mapping[str, Mapping[str, Any]]
    """What each flag takes, as ``vllm_flags.json`` has it."""
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
            f"vLLM's argument parser can't run ({last}): install vLLM: {install_command('cpu')} (or gpu)"
        )
    report = json.loads(done.stdout.splitlines()[-1])
    return ParserReport(report["version"], tuple(report["flags"]), report["values"], tuple(report["errors"]))


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


def _values(parser: Any) -> dict[str, dict[str, Any]]:
    """For each flag what it takes: its kind, its choices, its bounds, whether several values are allowed."""
    bounds = _bounds()
    found: dict[str, dict[str, Any]] = {}
    for action in parser._actions:
        names = [option[2:] for option in action.option_strings if option.startswith("--")]
        names = [name for name in names if not name.startswith("no-")]
        if not names or names[0] == "help":
            continue
        kind, optional = _kind(action)
        value: dict[str, Any] = {"kind": kind}
        if action.choices:
            value["choices"] = sorted(str(choice) for choice in action.choices if choice is not None)
        elif names[0] == "quantization":
            value["choices"] = _quantizations()
        value |= {"many": True} if action.nargs in {"+", "*"} else {}
        value |= {"bare": True} if action.nargs == "?" else {}
        value |= {"optional": True} if optional else {}
        value |= bounds.get(names[0].replace("-", "_"), {})
        found[names[0]] = value
        found |= {alias: {"alias": names[0]} for alias in names[1:]}
    return dict(sorted(found.items()))


def _kind(action: Any) -> tuple[str, bool]:
    """``switch`` (true or false), ``on`` (true only), ``int``, ``size`` (4096 or 4k), ``float``, ``json``,
    ``text`` or ``any``; and whether an empty value or ``None`` means vLLM's default."""
    if action.nargs == 0:
        return ("switch" if type(action).__name__ == "BooleanOptionalAction" else "on"), False
    convert, optional = action.type, False
    while getattr(convert, "__name__", "") in {"_optional_type", "_parse_type"} and convert.__closure__:
        optional = optional or convert.__name__ == "_optional_type"
        convert = convert.__closure__[0].cell_contents
    name = getattr(convert, "__name__", "")
    kinds = {
        "int": "int",
        "float": "float",
        "str": "text",
        "loads": "json",
        "parse_dataclass": "json",
        "human_readable_int": "size",
        "human_readable_int_or_auto": "size",
    }
    return kinds.get(name, "any"), optional


def _bounds() -> dict[str, dict[str, float]]:
    """Bounds of vLLM's settings, by name, where its configuration classes state them."""
    found: dict[str, dict[str, float]] = {}
    package = importlib.import_module("vllm.config")
    classes = [each for each in vars(package).values() if isinstance(each, type)]
    for each in classes:
        if each.__name__ in _NOT_FLAGS:
            continue
        for name, info in getattr(each, "__pydantic_fields__", {}).items():
            stated = {
                bound: getattr(part, bound)
                for part in info.metadata
                for bound in ("gt", "ge", "lt", "le")
                if getattr(part, bound, None) is not None
            }
            found |= {name: stated} if stated else {}
    return found


def _quantizations() -> list[str]:
    module = importlib.import_module("vllm.model_executor.layers.quantization")
    return sorted({*module.QUANTIZATION_METHODS, *module.DEPRECATED_QUANTIZATION_METHODS})


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
    report = {"version": version, "flags": _flags(parser), "values": _values(parser), "errors": errors}
    print(json.dumps(report))


if __name__ == "__main__":
    _main()
