"""A short text that matches a regular expression."""

from __future__ import annotations

import re
import warnings
from typing import Any, Final

_MAX_REPEATS: Final = 1000
_CATEGORIES: Final = {
    "digit": "0",
    "word": "a",
    "space": " ",
    "not_digit": "a",
    "not_word": " ",
    "not_space": "a",
}
_CANDIDATES: Final = "a0A -_.:/@"


def matching(pattern: str, at_least: int = 0) -> str | None:
    """A text of ``at_least`` characters that contains a match; None if none was found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
            for more in (0, at_least):
                made = _of(parsed, more, {})
                padded = made if len(made) >= at_least or "$" in pattern else made.ljust(at_least, "a")
                if len(padded) >= at_least and re.search(pattern, padded):
                    return padded
        except (re.error, RecursionError, OverflowError, KeyError, ValueError):
            return None
    return None


def _of(parsed: Any, more: int, groups: dict[int, str]) -> str:
    """The text of a parsed expression, with each repetition at its least or at ``more``."""
    return "".join(_piece(str(kind), value, more, groups) for kind, value in parsed)


def _piece(kind: str, value: Any, more: int, groups: dict[int, str]) -> str:
    if kind == "LITERAL":
        return chr(value)
    if kind == "NOT_LITERAL":
        return "a" if value != ord("a") else "b"
    if kind == "ANY":
        return "a"
    if kind == "IN":
        return _one_of(value)
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, inner = value
        times = min(max(int(least), more), int(most), _MAX_REPEATS)
        return "".join(_of(inner, 0, groups) for _ in range(times))
    if kind == "SUBPATTERN":
        made = _of(value[-1], more, groups)
        if value[0] is not None:
            groups[value[0]] = made
        return made
    if kind == "BRANCH":
        return _of(value[1][0], more, groups)
    if kind == "ATOMIC_GROUP":
        return _of(value, more, groups)
    if kind == "GROUPREF":
        return groups[value]
    return ""  # positions and assertions have no text; the caller checks the whole


def _one_of(items: Any) -> str:
    """A character of a set."""
    if str(items[0][0]) == "NEGATE":
        excluded = items[1:]
        return next(char for char in _CANDIDATES + "xyz" if not any(_has(item, char) for item in excluded))
    kind, value = str(items[0][0]), items[0][1]
    if kind == "LITERAL":
        return chr(value)
    if kind == "RANGE":
        return chr(value[0])
    return _CATEGORIES[str(value).removeprefix("CATEGORY_").lower()]


def _has(item: Any, char: str) -> bool:
    kind, value = str(item[0]), item[1]
    if kind == "LITERAL":
        return bool(ord(char) == value)
    if kind == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    category = str(value).removeprefix("CATEGORY_").lower()
    found: dict[str, bool] = {
        "digit": char.isdigit(),
        "word": char.isalnum() or char == "_",
        "space": char.isspace(),
    }
    return found[category.removeprefix("not_")] is not category.startswith("not_")
