"""A configuration file as the commands want it: read, and each tier's settings shown to its engine."""

from __future__ import annotations

from dataclasses import replace

from controlplane.config import IMPORT_PATH, ServeFile, TierConfig, load_plane
from controlplane.config.problems import path_text
from controlplane.config.strict import PathPart
from controlplane.config.yaml_file import read_yaml
from controlplane.engines import engine_for
from controlplane.engines.base import Launch
from controlplane.errors import ConfigError, Problem


def load_checked(path: str) -> ServeFile:
    """Read ``path`` and let every tier's engine build its command line; nothing is started.

    ConfigError holds every problem.
    """
    file = load_plane(path)
    yaml = read_yaml(file.path)
    index = next(i for i, app in enumerate(file.raw["applications"]) if app.get("import_path") == IMPORT_PATH)
    problems = []
    for i, tier in enumerate(file.plane.tiers):
        where = ("applications", index, "args", "tiers", i, "engine_args")
        for problem in _engine_problems(tier):
            inner = problem.path.partition("engine_args.")[2]
            path_here: tuple[PathPart, ...] = (*where, inner.replace("_", "-")) if inner else where
            problems.append(replace(problem, path=path_text(path_here), line=yaml.line(path_here)))
    if problems:
        raise ConfigError(problems, path)
    return file


def _engine_problems(tier: TierConfig) -> list[Problem]:
    launch = Launch(host="127.0.0.1", port=1, secret="", model=tier.model)
    engine = engine_for(tier)
    if not engine.has_process:
        return []
    try:
        engine.command(tier, launch)
    except ConfigError as error:
        return list(error.problems)
    return []
