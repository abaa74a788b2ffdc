"""An example value for a JSON schema: deterministic, of bounded size, with words and numbers of a text where
they fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from controlplane.engines.simulated.regex_example import matching

Schema: TypeAlias = Mapping[str, Any] | bool

MAX_DEPTH: Final = 32
"""Levels of a value. A schema that needs more, such as one that contains itself, has no example."""
MAX_VALUES: Final = 10_000
"""Values inside one example, and characters of one string in it."""
_ALL_PROPERTIES_DEPTH: Final = 4
"""Down to this level an object has all its properties, below only the required ones."""
_FORMATS: Final = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "duration": "PT1H",
    "email": "someone@example.com",
    "idn-email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uri-reference": "https://example.com/",
    "url": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "json-pointer": "/simulated",
    "regex": "simulated",
}
_TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")
_MERGED: Final = ("allOf", "anyOf", "oneOf", "$ref")
_QUOTED: Final = re.compile(r'"([^"]+)"|\'([^\']+)\'(?!\w)')
_NAME: Final = re.compile(r"(?<=[a-z,] )[A-Z][\w-]*(?: [A-Z][\w-]*)*")
_NUMBER: Final = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?(?![\w-])")


class NoExample(ValueError):
    """No value was found for the schema; the message says why."""


def example(schema: Schema, text: str = "") -> Any:
    """A value that is valid under ``schema``. Quoted words, names and numbers of ``text`` are used in their
    order where they are allowed. Raises :class:`NoExample` if the schema allows nothing, or nothing of
    bounded size."""
    return _Maker(schema, text).value(schema, 0, "value")


class _Maker:
    def __init__(self, root: Schema, text: str) -> None:
        self._root = root
        self._text = text
        self._left = MAX_VALUES
        quoted: list[str] = ["".join(found) for found in _QUOTED.findall(text)]
        self._words: list[str] = quoted + _NAME.findall(text)
        self._numbers = [float(found) for found in _NUMBER.findall(text)]

    def value(self, schema: Schema, depth: int, name: str) -> Any:
        """A value for a schema at some level; ``name`` is the property that it is for."""
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise NoExample(f"a value would have more than {MAX_DEPTH} levels or {MAX_VALUES} values")
        if schema is True:
            return name
        if not isinstance(schema, Mapping):
            raise NoExample("nothing is allowed" if schema is False else "a schema must be an object")
        failed: NoExample | None = None
        for plain in self._alternatives(schema, depth):
            try:
                return self._plain(plain, depth, name)
            except NoExample as error:
                failed = error
        raise failed or NoExample("nothing is allowed")

    def _alternatives(self, schema: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
        """The schemas without references and combinations of which one must hold."""
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise NoExample(f"a value would have more than {MAX_DEPTH} levels or {MAX_VALUES} values")
        own = {key: value for key, value in schema.items() if key not in _MERGED}
        if "$ref" in schema:
            target = self._referred(schema["$ref"])
            if not isinstance(target, Mapping):
                yield own
                return
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            yield from self._alternatives(_merged(target, rest), depth + 1)
            return
        if schema.get("allOf"):
            rest = {key: value for key, value in schema.items() if key != "allOf"}
            for part in _mappings(schema["allOf"]):
                rest = _merged(self._resolved(part), rest)
            yield from self._alternatives(rest, depth + 1)
            return
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                rest = {name: value for name, value in schema.items() if name != key}
                parts = _mappings(schema[key])
                # A value shows more than null, but a schema that contains itself has to end.
                deep = depth >= _ALL_PROPERTIES_DEPTH
                for part in sorted(parts, key=lambda each: (each.get("type") == "null") is not deep):
                    yield from self._alternatives(_merged(self._resolved(part), rest), depth + 1)
                return
        yield own

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        for _ in range(MAX_DEPTH):
            if "$ref" not in schema:
                return schema
            target = self._referred(schema["$ref"])
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            schema = _merged(target if isinstance(target, Mapping) else {}, rest)
        raise NoExample("references that refer to each other")

    def _referred(self, reference: Any) -> Schema:
        target: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise NoExample(f"the reference {reference!r} is not inside the schema")
        for part in reference.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(key)] if isinstance(target, list) else target[key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise NoExample(f"the reference {reference!r} refers to nothing") from None
        if not isinstance(target, Mapping | bool):
            raise NoExample(f"the reference {reference!r} refers to no schema")
        return target

    def _plain(self, schema: Mapping[str, Any], depth: int, name: str) -> Any:
        if "const" in schema:
            return schema["const"]
        if isinstance(choices := schema.get("enum"), list) and choices:
            said = (each for each in choices if isinstance(each, str) and each.lower() in self._text.lower())
            return next(said, choices[0])
        kind = _kind_of(schema)
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth, name)
        if kind == "string":
            return self._string(schema, name)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        return None if kind == "null" else True

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = [each for each in schema.get("required") or () if isinstance(each, str)]
        extra = schema.get("additionalProperties", True)
        made: dict[str, Any] = {}
        for key in dict.fromkeys([*properties, *required]):
            if key not in required and depth >= _ALL_PROPERTIES_DEPTH:
                continue
            try:
                made[key] = self.value(properties.get(key, extra), depth + 1, key)
            except NoExample:
                if key in required:
                    raise
        least = _count(schema.get("minProperties"), 0)
        while len(made) < least:
            if extra is False:
                raise NoExample("minProperties is above the number of properties")
            made[f"property_{len(made) + 1}"] = self.value(extra, depth + 1, "value")
        return made

    def _array(self, schema: Mapping[str, Any], depth: int, name: str) -> list[Any]:
        first = schema.get("prefixItems")
        first = first if isinstance(first, list) else []
        rest = schema.get("items", True)
        least, most = _count(schema.get("minItems"), 0), _count(schema.get("maxItems"), MAX_VALUES)
        if "contains" in schema and not first:
            rest = _merged(schema["contains"], rest) if isinstance(rest, Mapping) else schema["contains"]
            least = max(least, _count(schema.get("minContains"), 1))
        if rest is not False:
            least = max(least, min(1, most))
        made: list[Any] = []
        for index in range(min(max(least, len(first)), most)):
            item = self.value(first[index] if index < len(first) else rest, depth + 1, name)
            if schema.get("uniqueItems") is True:
                item = _other_than(made, item, first[index] if index < len(first) else rest)
            made.append(item)
        return made

    def _string(self, schema: Mapping[str, Any], name: str) -> str:
        least, most = _count(schema.get("minLength"), 0), _count(schema.get("maxLength"), MAX_VALUES)
        if least > most:
            raise NoExample("minLength is above maxLength")
        pattern = schema.get("pattern")
        formatted = _FORMATS.get(str(schema.get("format", "")))
        if formatted is None:
            for word in self._words:
                if least <= len(word) <= most and (not pattern or _found(pattern, word)):
                    self._words.remove(word)
                    return word
        elif not pattern:
            return formatted
        if isinstance(pattern, str):
            made = matching(pattern, least)
            if made is not None and least <= len(made) <= most:
                return made
            raise NoExample(f"no text was found for the pattern {pattern!r}")
        return (name or "value")[:most].ljust(least, "x")

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> float | int:
        low, high = _limits(schema)
        step = schema.get("multipleOf")
        step = step if isinstance(step, int | float) and step > 0 else None
        if whole and (step is None or not float(step).is_integer()):
            step = 1 if step is None else step
        for number in self._numbers:
            if low <= number <= high and (not step or math.isclose(number / step, round(number / step))):
                self._numbers.remove(number)
                return int(number) if number.is_integer() else number
        start = low if math.isfinite(low) else min(1.0, high)
        if step:
            made = math.ceil(start / step - 1e-9) * step
            while whole and not float(made).is_integer() and made <= high:
                made += step
        else:
            made = start if low in (start, high) else (start + min(high, start + 2)) / 2
        if made > high:
            raise NoExample("no number is allowed")
        return int(made) if float(made).is_integer() else made


def _merged(one: Mapping[str, Any], other: Any) -> dict[str, Any]:
    """Both schemas' demands in one, as far as members can be joined; else ``other``'s stands."""
    made = dict(one)
    for key, value in (other if isinstance(other, Mapping) else {}).items():
        mine = made.get(key)
        if key == "properties" and isinstance(mine, Mapping) and isinstance(value, Mapping):
            made[key] = {**mine, **value}
        elif key in ("required", "allOf") and isinstance(mine, list) and isinstance(value, list):
            made[key] = [*mine, *value]
        elif key in ("minimum", "minLength", "minItems", "minProperties") and isinstance(mine, int | float):
            made[key] = max(mine, value)
        elif key in ("maximum", "maxLength", "maxItems", "maxProperties") and isinstance(mine, int | float):
            made[key] = min(mine, value)
        elif key == "enum" and isinstance(mine, list) and isinstance(value, list):
            made[key] = [each for each in mine if each in value]
        else:
            made[key] = value
    return made


def _kind_of(schema: Mapping[str, Any]) -> str:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    for kind in sorted(kinds, key=lambda each: each == "null"):
        if kind not in _TYPES:
            raise NoExample(f"there is no type {kind!r}")
        return str(kind)
    if {"properties", "required", "additionalProperties", "minProperties"} & schema.keys():
        return "object"
    if {"items", "prefixItems", "minItems", "contains"} & schema.keys():
        return "array"
    if {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"} & schema.keys():
        return "number"
    return "string"


def _mappings(parts: Any) -> list[Mapping[str, Any]]:
    """Alternatives that are objects; true allows everything."""
    found = parts if isinstance(parts, list) else []
    return [{} if part is True else part for part in found if part is True or isinstance(part, Mapping)]


def _count(value: Any, default: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return default
    if value > MAX_VALUES:
        return MAX_VALUES + 1
    return int(value)


def _limits(schema: Mapping[str, Any]) -> tuple[float, float]:
    def limit(name: str, default: float) -> float:
        value = schema.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else default

    low, high = limit("minimum", -math.inf), limit("maximum", math.inf)
    over, under = limit("exclusiveMinimum", -math.inf), limit("exclusiveMaximum", math.inf)
    # The distance to an exclusive limit: whole numbers need 1, others less if the limits are close.
    gap = 1.0 if under - over > 2 else (under - over) / 4
    return max(low, over + gap if math.isfinite(over) else low), min(
        high, under - gap if math.isfinite(under) else high
    )


def _other_than(made: list[Any], item: Any, schema: Any) -> Any:
    """``item``, or a value like it that is not among ``made``."""
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(choices, list):
        return next((each for each in choices if each not in made), item)
    for number in range(1, len(made) + 2):
        if item not in made:
            break
        if isinstance(item, str):
            item = f"{item.rstrip('0123456789')}{number}"
        elif isinstance(item, bool):
            item = not item
        elif isinstance(item, int | float):
            high = _limits(schema if isinstance(schema, Mapping) else {})[1]
            item = item + 1 if item + 1 <= high else (item + high) / 2
    return item


def _found(pattern: Any, text: str) -> bool:
    try:
        return isinstance(pattern, str) and len(text) < 256 and re.search(pattern, text) is not None
    except (re.error, RecursionError):
        return False
