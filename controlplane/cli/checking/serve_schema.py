"""Checks the part of a Serve config file around tierplane's settings as Serve does when it starts.

Importing Serve takes a second, so that it is imported only for files with settings that need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from controlplane.config import IMPORT_PATH, ServeFile
from controlplane.config.strict import PathPart
from controlplane.errors import Problem

_CHECKED_ELSEWHERE: Final = {
    (): {"applications", "http_options", "proxy_location"},
    ("http_options",): {"host", "port"},
    ("applications",): {"name", "route_prefix", "import_path", "args"},
}
"""Part of the file → settings that tierplane's own models check completely."""

Located = tuple[tuple[PathPart, ...], Problem]


def serve_problems(file: ServeFile) -> list[Located]:
    """Path and problem of each setting that Serve would refuse. No message repeats a value."""
    found = _deployment_problems(file)
    if not _needs_serve(file.raw):
        return found
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(file.raw)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            message = item["msg"] if item["type"] != "value_error" else _reason(item["msg"])
            found.append(
                (item["loc"], Problem("", f"Serve refuses it: {message}", "see Ray Serve's reference"))
            )
    return found


def _needs_serve(values: Mapping[str, Any]) -> bool:
    applications = values["applications"]
    return (
        len(applications) > 1
        or bool(values.keys() - _CHECKED_ELSEWHERE[()])
        or bool((values.get("http_options") or {}).keys() - _CHECKED_ELSEWHERE[("http_options",)])
        or any(each.keys() - _CHECKED_ELSEWHERE[("applications",)] for each in applications)
    )


def _reason(message: str) -> str:
    """Serve's own reason without what it quotes, which may be secret."""
    text = message.removeprefix("Value error, ").partition(" Got ")[0]
    return "its value is not allowed" if text.startswith("Got ") else text


def _deployment_problems(file: ServeFile) -> list[Located]:
    """A problem for each deployment with changed options that the application doesn't have."""
    index, application = next(
        (i, each)
        for i, each in enumerate(file.raw["applications"])
        if isinstance(each, Mapping) and each.get("import_path") == IMPORT_PATH
    )
    known = ["gateway", *(tier.name for tier in file.plane.tiers)]
    found: list[Located] = []
    deployments = application.get("deployments")
    for i, each in enumerate(deployments if isinstance(deployments, list) else []):
        name = each.get("name") if isinstance(each, Mapping) else None
        if isinstance(name, str) and name not in known:
            problem = Problem("", f"there is no deployment '{name}'", f"known: {', '.join(known)}")
            found.append((("applications", index, "deployments", i, "name"), problem))
    return found
