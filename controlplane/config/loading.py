"""Read a configuration and report every error at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from controlplane.config.plane import IMPORT_PATH, PlaneConfig, TierConfig
from controlplane.config.problems import collect, path_text
from controlplane.config.profiles import spread
from controlplane.config.serve_file import ServeApplication, ServeSettings
from controlplane.config.strict import PathPart
from controlplane.config.yaml_file import read_yaml
from controlplane.errors import ConfigError, Problem

_Path = tuple[PathPart, ...]
_Found = list[tuple[_Path, Problem]]


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A Serve config file with tierplane in it."""

    path: Path
    application: str
    """The name of tierplane's application."""
    route_prefix: str | None
    plane: PlaneConfig
    http_host: str
    """Where Serve's ingress listens."""
    http_port: int
    raw: Mapping[str, Any] = field(repr=False)
    """The file as it was read: what ``serve run`` would see."""


def parse_plane(values: Any) -> PlaneConfig:
    """tierplane's settings from plain values; ConfigError holds every problem, with paths from here."""
    found = _plane_problems(values)
    if found:
        raise ConfigError(_placed(found, lambda _: 0))
    return PlaneConfig.model_validate(values)


def load_plane(path: str | os.PathLike[str]) -> ServeFile:
    """Read a Serve config file; ConfigError holds every problem, in the file's order, with its line."""
    file = read_yaml(Path(path))
    found = collect(ServeSettings, file.values, {"applications": [None]})
    index, application = _our_application(file.values, found)
    if index is not None:
        here: _Path = ("applications", index)
        found += _below(
            here, collect(ServeApplication, application, {"import_path": IMPORT_PATH, "args": None})
        )
        if isinstance(application, Mapping) and "args" in application:
            found += _below((*here, "args"), _plane_problems(application["args"]))
    if found or file.problems:
        problems = [*file.problems, *_placed(found, file.line)]
        raise ConfigError(sorted(problems, key=lambda problem: problem.line), str(path))
    settings = ServeSettings.model_validate(file.values)
    ours = ServeApplication.model_validate(application)
    plane = PlaneConfig.model_validate(ours.args)
    if plane.gateway.port == settings.http_options.port:
        where: _Path = ("applications", index or 0, "args", "gateway", "port")
        message = f"{plane.gateway.port} is the port of http_options too"
        port_problem = Problem("", message, "give the gateway's own port another number, or 0 for none")
        raise ConfigError(_placed([(where, port_problem)], file.line), str(path))
    return ServeFile(
        path=Path(path),
        application=ours.name,
        route_prefix=ours.route_prefix,
        plane=plane,
        http_host=settings.http_options.host,
        http_port=settings.http_options.port,
        raw=file.values,
    )


def _our_application(values: Any, found: _Found) -> tuple[int | None, Any]:
    """Index and values of tierplane's application; adds a problem to ``found`` if there isn't just one."""
    applications = values.get("applications") if isinstance(values, Mapping) else None
    if not isinstance(applications, list) or not applications:
        return None, None  # the file's own check has said so
    import_paths = [each.get("import_path") if isinstance(each, Mapping) else None for each in applications]
    ours = [i for i, import_path in enumerate(import_paths) if import_path == IMPORT_PATH]
    if len(ours) > 1:
        message = f"is tierplane's application, and applications[{ours[0]}] is too"
        found.append((("applications", ours[1]), Problem("", message, "keep one of them in this file")))
    if ours:
        return ours[0], applications[ours[0]]
    if len(applications) > 1:
        message = "none of the applications is tierplane's"
        found.append(
            (("applications",), Problem("", message, f"give one of them import_path: {IMPORT_PATH}"))
        )
        return None, None
    if import_paths[0] is not None:
        message, remedy = f"must be {IMPORT_PATH}, not '{import_paths[0]}'", "that is tierplane's builder"
        found.append((("applications", 0, "import_path"), Problem("", message, remedy)))
    return 0, applications[0]


def _plane_problems(values: Any) -> _Found:
    """Everything wrong with tierplane's settings: of each tier, of the rest, and between them."""
    values = spread(values)
    tiers = values.get("tiers") if isinstance(values, Mapping) else None
    if not isinstance(tiers, list) or not tiers:
        return collect(PlaneConfig, values, {"tiers": [_stand_in(0, None)]})
    found: _Found = []
    for i, tier in enumerate(tiers):
        found += _below(("tiers", i), collect(TierConfig, tier, {"name": "tier"}))
    # What concerns several tiers is checked on stand-ins, so that one wrong tier doesn't hide it.
    stand_ins = [_stand_in(i, tier) for i, tier in enumerate(tiers)]
    rest = collect(PlaneConfig, {**values, "tiers": stand_ins}, {})
    if any(path[2:] in ((), ("name",)) for path, _ in found):  # a tier whose name is not known
        rest = [each for each in rest if each[0] != ("gateway", "default_tier")]
    return found + rest


def _stand_in(index: int, tier: Any) -> dict[str, Any]:
    """A valid tier with what concerns other tiers too of ``tier``, as far as it is right."""
    values = tier if isinstance(tier, Mapping) else {}
    kept = {
        name: values[name]
        for name in ("name", "agent_types", "min_tier", "replicas", "concurrency_limit")
        if name in values and _is_valid(_annotation(name), values[name])
    }
    return {"name": f"tier-{index}", "engine": "simulated", **kept}


def _annotation(name: str) -> Any:
    field = TierConfig.model_fields[name]
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _is_valid(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _below(prefix: _Path, found: _Found) -> _Found:
    return [((*prefix, *path), problem) for path, problem in found]


def _placed(found: _Found, line: Callable[[_Path], int]) -> list[Problem]:
    """The problems with their whole path and line."""
    return [replace(problem, path=path_text(path), line=line(path)) for path, problem in found]
