"""Read a configuration and report every error at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from controlplane.config.plane import IMPORT_PATH, GatewayConfig, PlaneConfig, TierConfig
from controlplane.config.problems import collect, path_text, shown_value
from controlplane.config.profiles import apply_plane_profile
from controlplane.config.serve_file import HttpOptions, ServeApplication, ServeSettings
from controlplane.config.strict import PathPart
from controlplane.config.yaml_file import read_yaml
from controlplane.errors import ConfigError, Problem

_Path = tuple[PathPart, ...]
_Found = list[tuple[_Path, Problem]]


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A Serve config file that contains tierplane's application."""

    path: Path
    application: str
    """The name of tierplane's application."""
    route_prefix: str | None
    plane: PlaneConfig
    http_host: str
    """Where Serve's ingress listens."""
    http_port: int
    raw: Mapping[str, Any] = field(repr=False)
    """The file's values as they were read, as ``serve run`` would see them."""


def parse_plane(values: Any) -> PlaneConfig:
    """Validate tierplane's settings given as plain values.

    Raises ConfigError with every problem; paths are relative to ``values``.
    """
    found = _plane_problems(values)
    if found:
        raise ConfigError(_located(found, lambda _: 0))
    return PlaneConfig.model_validate(values)


def load_plane(path: str | os.PathLike[str]) -> ServeFile:
    """Read a Serve config file. Raises ConfigError with every problem and its line, in the file's order."""
    file = read_yaml(Path(path))
    found = collect(ServeSettings, file.values, {"applications": [None]})
    index, application = _our_application(file.values, found)
    if index is not None:
        here: _Path = ("applications", index)
        found += _prefixed(
            here, collect(ServeApplication, application, {"import_path": IMPORT_PATH, "args": None})
        )
        if isinstance(application, Mapping) and "args" in application:
            found += _prefixed((*here, "args"), _plane_problems(application["args"]))
        found += _port_problems(index, file.values, application)
    if found or file.problems:
        problems = [*file.problems, *_located(found, file.line)]
        raise ConfigError(sorted(problems, key=lambda problem: problem.line), str(path))
    settings = ServeSettings.model_validate(file.values)
    ours = ServeApplication.model_validate(application)
    plane = PlaneConfig.model_validate(ours.args)
    return ServeFile(
        path=Path(path),
        application=ours.name,
        route_prefix=ours.route_prefix,
        plane=plane,
        http_host=settings.http_options.host,
        http_port=settings.http_options.port,
        raw=file.values,
    )


def _port_problems(index: int, values: Any, application: Any) -> _Found:
    """A problem if the gateway and Serve's ingress have the same port, given or by default."""

    def port(holder: Any, part: str, default: int) -> Any:
        here = holder.get(part) if isinstance(holder, Mapping) else None
        return here.get("port", default) if isinstance(here, Mapping) else default

    args = application.get("args") if isinstance(application, Mapping) else None
    ingress = port(values, "http_options", HttpOptions().port)
    if ingress != port(args, "gateway", GatewayConfig().port):
        return []
    message = f"http_options.port is {shown_value(ingress)} too"
    where: _Path = ("applications", index, "args", "gateway", "port")
    return [(where, Problem("", message, "choose another port for the gateway, or 0 to switch it off"))]


def _our_application(values: Any, found: _Found) -> tuple[int | None, Any]:
    """Index and values of tierplane's application; adds a problem to ``found`` if there isn't exactly one."""
    applications = values.get("applications") if isinstance(values, Mapping) else None
    if not isinstance(applications, list) or not applications:
        return None, None  # the check of ServeSettings has reported it
    import_paths = [each.get("import_path") if isinstance(each, Mapping) else None for each in applications]
    ours = [i for i, import_path in enumerate(import_paths) if import_path == IMPORT_PATH]
    if len(ours) > 1:
        message = f"is a second application of tierplane, after applications[{ours[0]}]"
        found.append((("applications", ours[1]), Problem("", message, "remove one of the two")))
    if ours:
        return ours[0], applications[ours[0]]
    if len(applications) > 1:
        message = "none of the applications is tierplane's"
        found.append(
            (("applications",), Problem("", message, f"set import_path: {IMPORT_PATH} in one of them"))
        )
        return None, None
    if import_paths[0] is not None:
        message, remedy = f"must be {IMPORT_PATH}, not '{import_paths[0]}'", "this names tierplane's builder"
        found.append((("applications", 0, "import_path"), Problem("", message, remedy)))
    return 0, applications[0]


def _plane_problems(values: Any) -> _Found:
    """All problems of tierplane's settings: in each tier, in the other settings, and between tiers."""
    values = apply_plane_profile(values)
    tiers = values.get("tiers") if isinstance(values, Mapping) else None
    if not isinstance(tiers, list) or not tiers:
        return collect(PlaneConfig, values, {"tiers": [_stand_in(0, None)]})
    found: _Found = []
    for i, tier in enumerate(tiers):
        found += _prefixed(("tiers", i), collect(TierConfig, tier, {"name": "tier"}))
    # Checks across tiers use stand-ins, so that they run even if one tier is invalid.
    stand_ins = [_stand_in(i, tier) for i, tier in enumerate(tiers)]
    rest = collect(PlaneConfig, {**values, "tiers": stand_ins}, {})
    if any(path[2:] in ((), ("name",)) for path, _ in found):  # the name of a tier is unknown
        rest = [each for each in rest if each[0] != ("gateway", "default_tier")]
    return found + rest


def _stand_in(index: int, tier: Any) -> dict[str, Any]:
    """A valid tier that has the valid ones of those values of ``tier`` that checks across tiers read."""
    values = tier if isinstance(tier, Mapping) else {}
    valid = {
        name: values[name]
        for name in ("name", "agent_types", "min_tier", "replicas", "concurrency_limit")
        if name in values and _is_valid(_annotation(name), values[name])
    }
    return {"name": f"tier-{index}", "engine": "simulated", **valid}


def _annotation(name: str) -> Any:
    field = TierConfig.model_fields[name]
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _is_valid(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _prefixed(prefix: _Path, found: _Found) -> _Found:
    return [((*prefix, *path), problem) for path, problem in found]


def _located(found: _Found, line: Callable[[_Path], int]) -> list[Problem]:
    """The problems with their full path and line."""
    return [replace(problem, path=path_text(path), line=line(path)) for path, problem in found]
