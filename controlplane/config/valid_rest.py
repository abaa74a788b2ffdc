"""Configuration values without those that were found to be invalid, so that the rest can be validated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from controlplane.config.strict import PathPart

Path = tuple[PathPart, ...]


@dataclass(frozen=True, slots=True)
class ValidRest:
    """Values after some of them were removed."""

    values: Any
    _original_indices: dict[Path, list[int]] = field(default_factory=dict)
    """For each list that lost items: the original indices of the remaining items."""

    def original(self, path: Path) -> Path:
        """The path that the value at ``path`` in :attr:`values` had before the removals."""
        found: Path = ()
        for part in path:
            indices = self._original_indices.get(found, [])
            found = (*found, indices[part] if isinstance(part, int) and part < len(indices) else part)
        return found

    def is_shortened(self, path: Path) -> bool:
        """Whether the list at that original path lost items."""
        return path in self._original_indices


def without(values: Any, removed: Collection[Path]) -> ValidRest:
    """``values`` without the values at the paths ``removed``; ``values`` itself is not changed."""
    original_indices: dict[Path, list[int]] = {}
    # Only these containers are copied: values may contain themselves.
    containers = {path[:length] for path in removed for length in range(len(path))}

    def rest(here: Any, path: Path) -> Any:
        if path not in containers:
            return here
        if isinstance(here, Mapping):
            keys = [key for key in here if (*path, key) not in removed]
            return {key: rest(here[key], (*path, key)) for key in keys}
        if isinstance(here, list):
            indices = [i for i in range(len(here)) if (*path, i) not in removed]
            if len(indices) < len(here):
                original_indices[path] = indices
            return [rest(here[i], (*path, i)) for i in indices]
        return here

    return ValidRest(rest(values, ()), original_indices)


def next_removal(path: Path, removed: Collection[Path]) -> Path:
    """The path to remove because the value at ``path`` is invalid.

    This is ``path`` itself or, if that was removed before and is still reported (a required value), the
    innermost container around it that was not removed. Empty if nothing but all of the values is left.
    """
    while path in removed:
        path = path[:-1]
    return path


def overlaps(path: Path, removed: Collection[Path]) -> bool:
    """Whether the value at ``path``, a container around it or a part of it was removed."""
    return any(path[: len(each)] == each[: len(path)] for each in removed)


def is_removed(path: Path, removed: Collection[Path]) -> bool:
    """Whether the value at ``path``, or a container around it, was removed."""
    return any(path[:length] in removed for length in range(1, len(path) + 1))
