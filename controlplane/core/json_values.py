"""Frozen dataclasses as JSON values and back, for what survives a process.

Back goes by the dataclass's own annotations: enums from their values, tuples from lists, dataclasses from
mappings. A field that is not in the value has its default, and what the dataclass does not know is left out,
so that a version that adds or drops a field still reads what another one wrote.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Values = dict[str, Any]

T = TypeVar("T")


def to_value(item: Any) -> Values:
    """A dataclass as it is written."""
    return asdict(item)


def from_value(kind: type[T], value: Mapping[str, Any]) -> T:
    """A dataclass as it was written. ValueError: a field without a default is not there, or a value is none
    of its enum's."""
    found = {}
    known: Any = kind
    for each, annotation in _annotated(known):
        if each.name in value:
            found[each.name] = _read(annotation, value[each.name])
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"'{each.name}' of {kind.__name__} is not there")
    return kind(**found)


def under(values: Mapping[str, Any], prefix: str) -> Values:
    """What the keys that begin with ``prefix`` hold, by the rest of the key."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def shifted(value: Mapping[str, Any], shift_s: float, *names: str) -> Values:
    """The same, with the times of these names moved; None stays None."""
    return {
        name: each + shift_s if name in names and each is not None else each for name, each in value.items()
    }


@cache
def _annotated(kind: Any) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(kind)
    return tuple((each, hints[each.name]) for each in fields(kind))


def _read(annotation: Any, value: Any) -> Any:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        known = [each for each in inner if each is not type(None)]
        return None if value is None else _read(known[0], value) if len(known) == 1 else value
    if origin is tuple:
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_read(kind, item) for kind, item in zip(each, value, strict=True))
    if isinstance(annotation, type):
        if is_dataclass(annotation):
            return from_value(annotation, value)
        if issubclass(annotation, Enum):
            return annotation(value)
    return value
