"""``tierplane command``: the vLLM command of a scenario template, for the vLLM that is installed."""

from __future__ import annotations

import json
import shlex
from typing import Any, get_args

import click
import yaml
from rich.console import Console

from controlplane.config import ArgScalar, TierConfig
from controlplane.config.loading import parse_plane
from controlplane.config.outdated_flags import OUTDATED, MappedFlags, map_outdated
from controlplane.config.profiles import Scenario
from controlplane.config.vllm_flags import drift, installed_vllm, known_vllm_flags
from controlplane.engines.base import Launch
from controlplane.engines.vllm import VllmEngine
from controlplane.engines.vllm_parser import check_command_lines
from controlplane.errors import ConfigError, Problem

_MODULE = ("python", "-m", "vllm.entrypoints.openai.api_server")
_SECRET = "VLLM_API_KEY"  # noqa: S105 - the name of a variable


@click.command()
@click.argument("model")
@click.option("--scenario", type=click.Choice(get_args(Scenario)), required=True, help="The template.")
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True)
@click.option("--draft-model", metavar="MODEL", help="Guesses ahead; without it n-gram lookup does.")
@click.option("--tp", type=click.IntRange(1), help="Tensor parallel size; default: the scenario's.")
@click.option("--pp", type=click.IntRange(1), help="Pipeline parallel size; default: the scenario's.")
@click.option(
    "--engine-arg", "engine_args", multiple=True, metavar="K=V", help="Any engine flag; repeatable; wins."
)
@click.option("--map-outdated", "mapped", is_flag=True, help="Replace flags of older versions by today's.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--check/--no-check",
    default=None,
    help="Let the installed vLLM's own parser check it (some 15 s); default: only if its flags are not "
    "those of the version that tierplane knows.",
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
    mapped: bool,
    host: str,
    port: int,
    check: bool | None,
    as_json: bool,
) -> None:
    """Print the vLLM command that serves MODEL as a scenario says, for the installed vLLM.

    A flag that this vLLM no longer has is refused with what to use instead, or with --map-outdated replaced
    where there is a replacement that means the same. Exit status 2 if a flag is refused.
    """
    today = _today(engine_args, mapped)
    settings: dict[str, Any] = {"name": "command", "model": model, "profile": scenario, "device": device}
    settings |= {"draft_model": draft_model} if draft_model else {}
    settings |= {"tensor_parallel_size": tp} if tp else {}
    settings |= {"pipeline_parallel_size": pp} if pp else {}
    tier = _tier({**settings, "engine_args": dict(today.args)})
    made = VllmEngine().command(tier, Launch(host=host, port=port, secret="", model=model))
    argv = [*_MODULE, *made.argv[len(_MODULE) :]]
    env = {name: value for name, value in made.env.items() if name != _SECRET}
    version, checked = _checked(argv[len(_MODULE) :], check)
    if as_json:
        told = {"argv": argv, "env": env, "vllm": version, "checked_by": checked, "notes": today.notes}
        click.echo(json.dumps(told, indent=2))
        return
    for note in today.notes:
        click.echo(f"# {note}", err=True)
    click.echo(f"# vLLM {version}, flags checked against {checked}", err=True)
    click.echo(_shell(argv, env))


def _today(engine_args: tuple[str, ...], mapped: bool) -> MappedFlags:
    given: dict[str, Any] = {}
    for text in engine_args:
        name, sign, value = text.partition("=")
        name = name.strip().removeprefix("--")
        given[name] = _scalar(value) if sign else True
    if not mapped:
        return MappedFlags(given, (), ())
    today = map_outdated(given)
    if today.refused:
        raise ConfigError(
            [
                Problem(f"--engine-arg {finding.path[0]}", finding.message, finding.remedy)
                for finding in today.refused
            ]
        )
    return today


def _scalar(text: str) -> ArgScalar:
    """``4096`` → a number, ``true`` → True, ``null`` → None; what is JSON for more stays text, as vLLM
    wants it."""
    value = yaml.safe_load(text)
    return value if isinstance(value, str | int | float | bool) or value is None else text


def _tier(settings: dict[str, Any]) -> TierConfig:
    """The tier; ConfigError names the option that is wrong and, for an outdated flag, its replacement."""
    try:
        return parse_plane({"tiers": [settings]}).tiers[0]
    except ConfigError as error:
        raise ConfigError([_told(problem) for problem in error.problems]) from error


def _told(problem: Problem) -> Problem:
    path = problem.path.removeprefix("tiers[0].")
    inner = path.removeprefix("engine_args.")
    old = OUTDATED.get(inner)
    remedy = problem.remedy
    if old is not None and old.kind != "removed":
        remedy = f"{remedy}; --map-outdated does it"
    where = f"--engine-arg {inner}" if inner != path else f"--{path.replace('_', '-')}"
    return Problem(where, problem.message, remedy)


def _checked(arguments: list[str], check: bool | None) -> tuple[str, str]:
    """The version and by what the command line was checked; ConfigError if vLLM refuses it."""
    known, _ = known_vllm_flags()
    installed = installed_vllm()
    if check is None:
        check = installed not in {None, known}
    if not check:
        return known, f"the list of vLLM {known}'s flags"
    with Console(stderr=True).status("asking the installed vLLM's parser"):
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
