"""``tierplane command``: the vLLM command of a scenario template, checked against the installed vLLM."""

from __future__ import annotations

import json
import shlex
from typing import Any, get_args

import click
from rich.console import Console

from controlplane.config import ArgScalar, TierConfig
from controlplane.config.loading import parse_plane
from controlplane.config.outdated_flags import OUTDATED, MappedFlags, map_outdated
from controlplane.config.profiles import Scenario
from controlplane.config.vllm_flags import drift, installed_vllm, known_vllm_flags
from controlplane.config.yaml_file import plain_value
from controlplane.engines.base import Launch
from controlplane.engines.vllm import VllmEngine
from controlplane.engines.vllm_parser import check_command_lines
from controlplane.errors import ConfigError, Problem

_MODULE = ("python", "-m", "vllm.entrypoints.openai.api_server")
_SECRET = "VLLM_API_KEY"  # noqa: S105 - the name of a variable


@click.command()
@click.argument("model")
@click.option(
    "--scenario", type=click.Choice(get_args(Scenario)), required=True, help="The scenario template."
)
@click.option(
    "--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True,
    help="Where the engine runs.",
)  # fmt: skip
@click.option(
    "--draft-model", metavar="MODEL", help="Draft model for speculative decoding; default: n-gram lookup."
)
@click.option("--tp", type=click.IntRange(1), help="Tensor parallel size; default: the scenario's.")
@click.option("--pp", type=click.IntRange(1), help="Pipeline parallel size; default: the scenario's.")
@click.option(
    "--engine-arg",
    "engine_args",
    multiple=True,
    metavar="K=V",
    help="Any engine flag, which overrides the scenario; repeatable.",
)
@click.option(
    "--map-outdated", "map_flags", is_flag=True, help="Replace outdated flags by their current equivalents."
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="The address that the engine listens on."
)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=8000, show_default=True,
    help="The port that the engine listens on.",
)  # fmt: skip
@click.option(
    "--check/--no-check",
    default=None,
    help="Check the command with the installed vLLM's own parser (about 15 s); default: only if the "
    "installed version is not the one whose flags tierplane has a list of.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    scenario: Scenario,
    device: str,
    draft_model: str | None,
    tp: int | None,
    pp: int | None,
    engine_args: tuple[str, ...],
    map_flags: bool,
    host: str,
    port: int,
    check: bool | None,
    as_json: bool,
) -> None:
    """Print the vLLM command that serves MODEL with the flags of a scenario template.

    A flag that vLLM no longer has is an error that names the replacement; with --map-outdated it is replaced
    if the replacement means the same. Exit status 2 if a flag is refused.
    """
    own_args = _own_args(engine_args, map_flags)
    settings: dict[str, Any] = {"name": "command", "model": model, "profile": scenario, "device": device}
    settings |= {"draft_model": draft_model} if draft_model else {}
    settings |= {"tensor_parallel_size": tp} if tp else {}
    settings |= {"pipeline_parallel_size": pp} if pp else {}
    tier = _tier({**settings, "engine_args": dict(own_args.args)})
    made = VllmEngine().command(tier, Launch(host=host, port=port, secret="", model=model))
    argv = [*_MODULE, *made.argv[len(_MODULE) :]]
    env = {name: value for name, value in made.env.items() if name != _SECRET}
    version, checked = _checked(argv[len(_MODULE) :], check)
    if as_json:
        result = {"argv": argv, "env": env, "vllm": version, "checked_by": checked, "notes": own_args.notes}
        click.echo(json.dumps(result, indent=2))
        return
    for note in own_args.notes:
        click.echo(f"# {note}", err=True)
    click.echo(f"# vLLM {version}, flags checked against {checked}", err=True)
    click.echo(_shell(argv, env))


def _own_args(engine_args: tuple[str, ...], map_flags: bool) -> MappedFlags:
    args: dict[str, Any] = {}
    for text in engine_args:
        name, sign, value = text.partition("=")
        name = name.strip().removeprefix("--")
        if name.replace("_", "-") in {given.replace("_", "-") for given in args}:
            raise ConfigError([Problem(f"--engine-arg {name}", "is given twice", "give it once")])
        args[name] = _scalar(value) if sign else True
    if not map_flags:
        return MappedFlags(args, (), ())
    mapped = map_outdated(args)
    if mapped.refused:
        raise ConfigError(
            [
                Problem(f"--engine-arg {finding.path[0]}", finding.message, finding.remedy)
                for finding in mapped.refused
            ]
        )
    return mapped


def _scalar(text: str) -> ArgScalar:
    """``4096`` → a number, ``true`` → True, ``null`` → None. Whatever would be written differently as a value
    (``1e5`` in a revision, ``0.90``) stays the text that it is."""
    value = plain_value(text)
    return text if isinstance(value, int | float) and str(value) not in {text, text.title()} else value


def _tier(settings: dict[str, Any]) -> TierConfig:
    """The tier. Raises ConfigError that names the wrong option and, for an outdated flag, its replacement."""
    try:
        return parse_plane({"tiers": [settings]}).tiers[0]
    except ConfigError as error:
        raise ConfigError([_with_option(problem) for problem in error.problems]) from error


def _with_option(problem: Problem) -> Problem:
    """The problem with the command's option instead of the path of a setting."""
    path = problem.path.removeprefix("tiers[0].")
    inner = path.removeprefix("engine_args.")
    old = OUTDATED.get(inner)
    remedy = problem.remedy
    if old is not None and old.kind != "removed":
        remedy = f"{remedy}; --map-outdated does this"
    where = f"--engine-arg {inner}" if inner != path else f"--{path.replace('_', '-')}"
    return Problem(where, problem.message, remedy)


def _checked(arguments: list[str], check: bool | None) -> tuple[str, str]:
    """The vLLM version, and what the command line was checked with. Raises ConfigError if vLLM refuses it."""
    known, _ = known_vllm_flags()
    installed = installed_vllm()
    if check is None:
        check = installed not in {None, known}
    if not check:
        return known, f"the list of vLLM {known}'s flags"
    with Console(stderr=True).status("checking with the installed vLLM's parser"):
        parsed = check_command_lines([arguments])
    if parsed.errors[0]:
        changed = drift(parsed.version, parsed.flags)
        note = f"{changed}" if changed and parsed.version != known else ""
        raise ConfigError([Problem("", f"vLLM {parsed.version} refuses: {parsed.errors[0]}", note)])
    return parsed.version, "the installed vLLM's own parser"


def _shell(argv: list[str], env: dict[str, str]) -> str:
    lines = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    words = [shlex.quote(word) for word in argv]
    lines.append(" ".join(words[: len(_MODULE)]))
    for word in words[len(_MODULE) :]:
        if word.lstrip("'").startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n  ".join(lines)
