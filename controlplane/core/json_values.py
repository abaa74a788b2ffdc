"""Converts dataclasses to JSON values for the store, and back according to their annotations (msgspec).

A field that is missing in a stored value gets its default, and unknown keys are ignored. So a version that
adds or drops a field can still read what another version wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, replace
from typing import Any, ClassVar, Final, Protocol, TypeVar

import msgspec

Values = dict[str, Any]

MAX_NUMBER: Final = 2**53
"""A stored number beyond this, or one that is not finite, is damaged: nothing stored counts as far."""
MAX_DEPTH: Final = 50
"""A value that is nested deeper is damaged."""


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
    """The values that an earlier process stored, by key. Each is read by itself: one that can't be read makes
    no other unreadable."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.damaged: dict[str, str] = {}
        """Keys whose values could not be read, with the reason."""

    def value(self, key: str, kind: type[T]) -> T | None:
        """The value stored under ``key``, converted to ``kind``; None if there is none, or if it can't be
        converted."""
        return self._read(key, kind, _same) if key in self._values else None

    def entries(self, prefix: str, kind: type[T], change: Callable[[T], T] | None = None) -> dict[str, T]:
        """The entries whose keys begin with ``prefix``, converted to ``kind``, by their keys without the
        prefix. ``change`` is applied to each; its ValueError says what is wrong with the value. An entry that
        can't be converted is left out and added to :attr:`damaged`."""
        found = {}
        for key in self._values:
            if key.startswith(prefix):
                entry = self._read(key, kind, change or _same)
                if entry is not None:
                    found[key.removeprefix(prefix)] = entry
        return found

    def _read(self, key: str, kind: type[T], change: Callable[[T], T]) -> T | None:
        value = self._values[key]
        try:
            _check_numbers(value)
            return change(msgspec.convert(value, kind, strict=False))
        except (ValueError, TypeError, OverflowError) as error:  # ValidationError is a ValueError.
            self.damaged[key] = str(error)
            return None


def _same(item: T) -> T:
    return item


def _check_numbers(value: Any, depth: int = 0) -> None:
    """Raises ValueError for a number that is not finite or too large, at any level."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    if isinstance(value, (int, float)):
        if not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise ValueError("it has a number that is not finite or too large")
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_numbers(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_numbers(item, depth + 1)
