"""Translates pydantic's errors to problems that a user can act on: path, message and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from controlplane.config.strict import ConfigFinding, FindingsError, PathPart, Strict
from controlplane.config.valid_rest import (
    Path,
    ValidRest,
    is_removed,
    next_removal,
    overlaps,
    without,
)
from controlplane.errors import Problem

_NAME_TEXT = "up to 40 lower-case letters, digits, '-' and '_', starting with a letter"
_MAY_BE_SECRET = re.compile(
    r"(^|_|-)(env|url|endpoint|vars|host|password|passwd|secret|token|key|keys|headers)$"
)
"""Settings whose values are not repeated in messages: they are secret, or may be by mistake."""
_NUMBER = re.compile(r"^[+-]?\d+(\.\d*)?([eE][+-]?\d+)?$")
_SWITCH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n"})
_NO_VALUE = object()


def path_text(path: Iterable[PathPart]) -> str:
    """``("tiers", 1, "engine_args", "foo")`` → ``tiers[1].engine_args.foo``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def collect(model: type[Strict], values: Any, placeholders: Mapping[str, Any]) -> list[tuple[Path, Problem]]:
    """Every problem of ``values`` as a ``model``, with paths relative to ``values``; empty if it is valid.

    pydantic checks fields against each other only when each of them is valid. So that one invalid value
    doesn't hide other problems, invalid values are removed (``placeholders`` replace required fields) and the
    rest is validated again. Findings that depend on a removed value are not reported.
    """
    problems: list[tuple[Path, Problem]] = []
    removed: set[Path] = set()
    while True:
        rest = without(values, removed)
        if isinstance(rest.values, dict):
            stand_ins = {name: value for name, value in placeholders.items() if (name,) in removed}
            rest = replace(rest, values=rest.values | stand_ins)
        found, invalid = _validate(model, rest, removed)
        problems += found
        more = {next_path for path in invalid if (next_path := next_removal(path, removed))}
        if not more or not isinstance(values, Mapping):
            return problems
        removed |= more


def _validate(
    model: type[Strict], rest: ValidRest, removed: Collection[Path]
) -> tuple[list[tuple[Path, Problem]], list[Path]]:
    """New problems, and the paths of the values that are invalid by themselves."""
    try:
        model.model_validate(rest.values)
    except ValidationError as error:
        return _problems_of(error, model, rest, removed)
    return [], []


def _problems_of(
    error: ValidationError, model: type[Strict], rest: ValidRest, removed: Collection[Path]
) -> tuple[list[tuple[Path, Problem]], list[Path]]:
    problems: list[tuple[Path, Problem]] = []
    invalid: list[Path] = []
    by_path: dict[Path, list[ErrorDetails]] = {}
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, FindingsError):
            where = item["loc"][:-1] if item["loc"][-1:] == ("[key]",) else item["loc"]
            problems += _from_findings(cause.findings, where, rest, removed)
            if where:
                invalid += [rest.original(where + finding.path) for finding in cause.findings]
        else:
            path = rest.original(_real_path(item, rest.values))
            invalid += [path] if path else []
            # Values that are missing, or too short, because of a removal were reported before it.
            if path not in removed and not (item["type"] == "too_short" and rest.is_shortened(path)):
                by_path.setdefault(path, []).append(item)
    for path, items in by_path.items():
        message, remedy = _message(items, model, path)
        problems.append((path, Problem(path_text(path), message, remedy)))
    return problems, invalid


def _from_findings(
    findings: Sequence[ConfigFinding], prefix: Path, rest: ValidRest, removed: Collection[Path]
) -> list[tuple[Path, Problem]]:
    certain = [
        (rest.original(prefix + finding.path), finding)
        for finding in findings
        if not any(overlaps(rest.original((*prefix, name)), removed) for name in finding.uses)
    ]
    return [
        (path, Problem(path_text(path), finding.message, finding.remedy))
        for path, finding in certain
        if not is_removed(path, removed)
    ]


def _real_path(item: ErrorDetails, values: Any) -> Path:
    """The error's path without the names of union members, which pydantic adds."""
    path: list[PathPart] = []
    here = values
    for part in item["loc"]:
        inner = _step(here, part)
        if inner is _NO_VALUE:
            return (*path, part) if item["type"] == "missing" else tuple(path)
        path.append(part)
        here = inner
    return tuple(path)


def _step(value: Any, part: PathPart) -> Any:
    if isinstance(value, Mapping) and part in value:
        return value[part]
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return _NO_VALUE


def _message(items: Sequence[ErrorDetails], model: type[Strict], path: Path) -> tuple[str, str]:
    """The message and the remedy for the value at ``path``."""
    item, value = items[0], items[0]["input"]
    kinds = {each["type"] for each in items}
    if "extra_forbidden" in kinds:
        return f"unknown key '{path[-1]}'", _unknown_key_remedy(str(path[-1]), _model_at(model, path[:-1]))
    if "missing" in kinds:
        return "missing", _description(_model_at(model, path[:-1]), str(path[-1]))
    shown = "" if is_secret(path) else f", not {shown_value(value)}"
    if "string_pattern_mismatch" in kinds:
        return f"must be {_NAME_TEXT}{shown}", ""
    if kinds <= {"literal_error", "enum"}:
        allowed = [
            text.strip("'") for text in re.findall(r"'[^']*'|\d+", item.get("ctx", {}).get("expected", ""))
        ]
        return f"must be {_any_of(allowed)}{shown}", did_you_mean(str(value), allowed)
    wanted = _any_of(list(dict.fromkeys(_wanted(each) for each in items)))
    return f"must be {wanted}{shown}", _type_remedy(kinds, value)


def is_secret(path: Iterable[PathPart]) -> bool:
    """Whether the value at ``path`` is not to be repeated, because it is or contains a secret."""
    return any(isinstance(part, str) and _MAY_BE_SECRET.search(part.lower()) for part in path)


def _wanted(item: ErrorDetails) -> str:
    texts: dict[str, str] = {
        "string_type": "text",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "literal_error": item.get("ctx", {}).get("expected", ""),
    }
    if item["type"] in texts:
        return texts[item["type"]]
    # "Input should be greater than 0", "List should have at least 1 item after validation, not 0"
    text = re.sub(r"^\w+ should (be|have) ", lambda m: "" if m[1] == "be" else "with ", item["msg"])
    return re.sub(r" after validation, not \d+$", "", text)


def _type_remedy(kinds: set[str], value: Any) -> str:
    number_wanted = kinds & {"int_type", "float_type"}
    if isinstance(value, str) and number_wanted and _NUMBER.match(value):
        return "remove the quotes"
    if isinstance(value, str) and "bool_type" in kinds and value.lower() in _SWITCH_WORDS:
        return "write true or false, without quotes"
    if isinstance(value, bool | int | float) and "string_type" in kinds and len(kinds) == 1:
        return "put it in quotes"
    return ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy that names the known word closest to ``word``, or all known words if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _unknown_key_remedy(key: str, model: type[BaseModel] | None) -> str:
    if model is None:
        return "remove it"
    close = difflib.get_close_matches(key.replace("-", "_"), model.model_fields, n=1, cutoff=0.75)
    if not close and "engine_args" in model.model_fields:
        return "remove it; an engine's own flags belong under 'engine_args'"
    return f"did you mean '{close[0]}'?" if close else did_you_mean(key, model.model_fields)


def _description(model: type[BaseModel] | None, name: str) -> str:
    field = model.model_fields.get(name) if model else None
    return (field.description or "").split("\n")[0] if field else ""


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model of the value at ``path`` inside ``model``; None if it is not a model."""
    here: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if here else None
        here = _find_model(field.annotation) if field else None
    return here


def _find_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _find_model(arg))), None)


def _any_of(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def shown_value(value: Any) -> str:
    """A value in a message, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if len(value) != 1 else f"a list of {shown_value(value[0])}"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    quoted = f"'{text}'" if isinstance(value, str) else text
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}…'"
