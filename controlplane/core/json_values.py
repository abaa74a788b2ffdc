"""Converts dataclasses to JSON values for the store, and back according to their annotations (msgspec).

A field that is missing in a stored value gets its default, and unknown keys are ignored. So a version that
adds or drops a field can still read what another version wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

Values = dict[str, Any]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T")
D = TypeVar("D", bound=_Dataclass)


def to_value(item: object) -> Any:
    """The item as JSON values."""
    return msgspec.to_builtins(item)


def shifted(item: D, shift_s: float, *names: str) -> D:
    """A copy with ``shift_s`` added to the named fields, which are times; a time that is None stays None."""
    times = {name: getattr(item, name) for name in names}
    return replace(item, **{name: at_s + shift_s for name, at_s in times.items() if at_s is not None})


class StoredState:
    """The values that an earlier process stored, by key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.damaged: list[str] = []
        """Entries that could not be read, each with the reason."""

    def get(self, key: str) -> Any:
        """The value stored under ``key``; None if there is none."""
        return self._values.get(key)

    def entries(self, prefix: str, kind: type[T]) -> dict[str, T]:
        """The entries whose keys begin with ``prefix``, converted to ``kind``, by their keys without the
        prefix. An entry that can't be converted is left out and added to :attr:`damaged`."""
        found = {}
        for key, value in self._values.items():
            if not key.startswith(prefix):
                continue
            try:
                found[key.removeprefix(prefix)] = msgspec.convert(value, kind, strict=False)
            except msgspec.ValidationError as error:
                self.damaged.append(f"{key}: {error}")
        return found
