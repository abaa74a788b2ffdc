"""Values without what was found to be wrong in them, so that the rest can be looked at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from controlplane.config.strict import PathPart

Path = tuple[PathPart, ...]


@dataclass(frozen=True, slots=True)
class ValidRest:
    """What is left after cuts."""

    values: Any
    _kept: dict[Path, list[int]] = field(default_factory=dict)
    """A list that lost items → the numbers that the others had."""

    def original(self, path: Path) -> Path:
        """The path that something in :attr:`values` had before the cuts."""
        found: Path = ()
        for part in path:
            kept = self._kept.get(found, [])
            found = (*found, kept[part] if isinstance(part, int) and part < len(kept) else part)
        return found

    def is_shortened(self, path: Path) -> bool:
        """Whether the list that was at that path lost items."""
        return path in self._kept


def remaining(values: Any, cuts: Collection[Path]) -> ValidRest:
    """``values`` without what is at those paths; they stay as they are."""
    kept: dict[Path, list[int]] = {}
    ways = {cut[:length] for cut in cuts for length in range(len(cut))}
    """Only what lies on a way to a cut is made anew: values may contain themselves."""

    def rest(here: Any, path: Path) -> Any:
        if path not in ways:
            return here
        if isinstance(here, Mapping):
            return {key: rest(each, (*path, key)) for key, each in here.items() if (*path, key) not in cuts}
        if isinstance(here, list):
            numbers = [i for i in range(len(here)) if (*path, i) not in cuts]
            if len(numbers) < len(here):
                kept[path] = numbers
            return [rest(here[i], (*path, i)) for i in numbers]
        return here

    return ValidRest(rest(values, ()), kept)


def next_cut(path: Path, cuts: Collection[Path]) -> Path:
    """What to leave out for what is wrong at ``path``: just that or, if it was left out before and is wrong
    all the same (it is required), the nearest around it that was not. Empty: nothing less than everything."""
    while path in cuts:
        path = path[:-1]
    return path


def meets(path: Path, cuts: Collection[Path]) -> bool:
    """Whether what is at ``path``, something around it or something in it was left out."""
    return any(path[: len(cut)] == cut[: len(path)] for cut in cuts)


def lies_in(path: Path, cuts: Collection[Path]) -> bool:
    """Whether what is at ``path``, or something around it, was left out."""
    return any(path[:length] in cuts for length in range(1, len(path) + 1))
