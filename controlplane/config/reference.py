"""The reference of all settings, ``docs/reference/settings.md``, from the configuration's models.

``python -m controlplane.config.reference`` writes it; `make docs` runs this, and a test compares the file
with the models.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from controlplane.config.plane import PlaneConfig

PAGE: Final = Path("docs/reference/settings.md")
"""Where the page is, from the repository's root."""

_HEAD: Final = """\
<!-- Written by `make docs` from the models in controlplane/config: change those, not this page. -->

# Settings

A configuration is a [Ray Serve config file](https://docs.ray.io/en/latest/serve/production-guide/config.html).
tierplane's own settings are the `args` of its application; the files in [configs](../../configs) are
examples. `tierplane validate FILE` reports every mistake at once, with its line, its path in the file and
what to do.

Serve itself reads what surrounds `args`: `http_options.host` and `http_options.port` (Serve's ingress),
`proxy_location`, and the application's `name`, `route_prefix` and `import_path`.

An empty default means that the setting is not set, or that its description says what applies then.
"""
_ENVIRONMENT: Final = """\
## Environment variables

| variable | what |
|---|---|
| `TIERPLANE_CACHE_DIR` | The folder of the bundled model; by default `~/.cache/tierplane`. |
| `TIERPLANE_RUN_DIR` | The folder of what runs now: records and logs; by default `~/.cache/tierplane/run`. |
| `RAY_ADDRESS` | A running Ray that `tierplane up` deploys to, and that the other commands ask. |
| `HF_HUB_OFFLINE=1` | Models of a hub are taken from this machine's cache only. |
"""


def settings_page() -> str:
    """The whole page: one table for each model, from the outermost inwards."""
    tables = [_table(path, model) for path, model in _models(PlaneConfig, "args")]
    return "\n".join([_HEAD, *tables, _ENVIRONMENT])


def _models(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        inner, is_list = _inner_model(field.annotation)
        if inner is not None:
            below = f"{name}[]" if is_list else name
            yield from _models(inner, below if path == "args" else f"{path}.{below}")


def _inner_model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for arg in get_args(annotation):
        found, _ = _inner_model(arg)
        if found is not None:
            return found, get_origin(annotation) is list
    return None, False


def _table(path: str, model: type[BaseModel]) -> str:
    about = " ".join((model.__doc__ or "").split()).replace("``", "`")
    lines = [f"## `{path}`", "", about, "", "| setting | value | default | what |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        what = " ".join((field.description or "").split()).replace("``", "`").replace("|", "\\|")
        kind = _kind(_annotated(field)).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {what} |")
    return "\n".join([*lines, ""])


def _annotated(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _kind(annotation: Any) -> str:
    """What a value must be, for people."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0]) + _bounds(args[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_kind(arg) for arg in args if arg is not type(None)))
    if origin is list:
        return f"list of {_kind(args[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[annotation]


def _bounds(metadata: tuple[Any, ...]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    flat = [
        inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]
    found = [
        f"{sign} {getattr(item, key):g}"
        for key, sign in signs.items()
        for item in flat
        if getattr(item, key, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return ""
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == "" or isinstance(field.default, BaseModel):
        return ""
    value = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
    return f"`{value.removesuffix('.0')}`"


if __name__ == "__main__":
    PAGE.write_text(settings_page(), "utf-8")
