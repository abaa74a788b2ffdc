"""Reads a configuration file and has each tier's engine check its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from controlplane.cli.checking.serve_schema import serve_problems
from controlplane.config import IMPORT_PATH, PlaneConfig, ServeFile, TierConfig, load_plane
from controlplane.config.problems import path_text
from controlplane.config.strict import PathPart
from controlplane.config.yaml_file import read_yaml
from controlplane.core.routing.tier_table import RESERVED, ambiguity
from controlplane.engines import engine_for
from controlplane.engines.base import Launch
from controlplane.engines.llamacpp_flags import llamacpp_findings
from controlplane.errors import ConfigError, Problem, SetupError
from controlplane.models.bundled import check_loadable


def load_checked(path: str, *, here: bool = False) -> ServeFile:
    """Read ``path`` and have every tier's engine check its settings; nothing is started.

    ``here``: the engines are to run on this machine, so their models' files must be here. Raises ConfigError
    with every problem.
    """
    file = load_plane(path)
    yaml = read_yaml(file.path)
    args = _args(file)
    problems = [
        replace(problem, path=path_text(where), line=yaml.line(where))
        for where, problem in serve_problems(file)
    ]
    for i, tier in enumerate(file.plane.tiers):
        where = (*args, "tiers", i, "engine_args")
        for problem in _engine_problems(tier):
            inner = problem.path.partition("engine_args.")[2]
            path_here: tuple[PathPart, ...] = (*where, inner.replace("_", "-")) if inner else where
            problems.append(replace(problem, path=path_text(path_here), line=yaml.line(path_here)))
        model_problem = _model_problem(tier) if here else ""
        if model_problem:
            path_here = (*args, "tiers", i, "model")
            problems.append(Problem(path_text(path_here), model_problem, line=yaml.line(path_here)))
    if problems:
        raise ConfigError(problems, path)
    return file


def unset_variables(file: ServeFile, environ: Mapping[str, str]) -> list[Problem]:
    """A problem for each setting that names an environment variable that is unset or empty in ``environ``.

    The file is valid nevertheless: the variable may be set on another machine.
    """
    found: list[tuple[tuple[PathPart, ...], str, str]] = []
    for i, tier in enumerate(file.plane.tiers):
        if tier.api_key_env:
            consequence = f"tier '{tier.name}' would not start"
            found.append((("tiers", i, "api_key_env"), tier.api_key_env, consequence))
    for i, webhook in enumerate(file.plane.controller.alerts.webhooks):
        if webhook.secret_env:
            where = ("controller", "alerts", "webhooks", i, "secret_env")
            found.append((where, webhook.secret_env, "nothing would be sent to this webhook"))
    yaml = read_yaml(file.path)
    args = _args(file)
    return [
        Problem(
            path_text((*args, *where)),
            f"the environment variable {name} is not set: {consequence}",
            f"set {name} where Ray is started, on every node, or remove the setting",
            yaml.line((*args, *where)),
        )
        for where, name, consequence in found
        if not environ.get(name)
    ]


def name_warnings(plane: PlaneConfig) -> list[Problem]:
    """A problem for each model that can't be requested by its id: different models have the id, or a tier is
    named so. Paths are relative to the plane's settings."""
    table = plane.route_table()
    remedy = "set served_model_name in one of the tiers, or let clients name the tier"
    found = [
        Problem(
            f"tiers[{ranks[0]}]",
            f"requests for '{name}' are refused, because different models have this name: "
            f"{ambiguity(name, table)}",
            remedy,
        )
        for name, ranks in table.ambiguous.items()
    ]
    for i, tier in enumerate(plane.tiers):
        rank = table.rank_of.get(tier.model_id, i)
        if tier.model_id in RESERVED or rank not in table.same_model[i]:
            other = "tierplane chooses" if tier.model_id in RESERVED else "they go to the tier of that name"
            message = f"requests for '{tier.model_id}' never mean the model of tier '{tier.name}': {other}"
            found.append(Problem(f"tiers[{i}]", message, remedy))
    return found


def _args(file: ServeFile) -> tuple[PathPart, ...]:
    """The path of tierplane's settings in the file."""
    index = next(
        i
        for i, each in enumerate(file.raw["applications"])
        if isinstance(each, Mapping) and each.get("import_path") == IMPORT_PATH
    )
    return "applications", index, "args"


def _engine_problems(tier: TierConfig) -> list[Problem]:
    launch = Launch(host="127.0.0.1", port=1, secret="", model=tier.model)
    engine = engine_for(tier)
    if not engine.has_process:
        return []
    try:
        engine.command(tier, launch)
    except ConfigError as error:
        return list(error.problems)
    if tier.engine != "llamacpp":
        return []
    return [
        Problem(path_text(finding.path), finding.message, finding.remedy)
        for finding in llamacpp_findings(tier)
    ]


def _model_problem(tier: TierConfig) -> str:
    try:
        check_loadable(tier.model, tier.engine)
    except SetupError as error:
        return str(error)
    return ""
