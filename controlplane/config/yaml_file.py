"""A YAML file as plain values, with the line of each value and all duplicate keys.

Plain words are read as in JSON and YAML 1.2: ``true`` and ``false``, ``null``, decimal numbers, else text. So
``no``, ``on``, ``0755``, ``1:30`` and ``2026-11-30`` are texts, which PyYAML (YAML 1.1) takes for a boolean,
an octal number, a number of base 60 and a date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from controlplane.config.problems import path_text
from controlplane.config.strict import PathPart
from controlplane.errors import ConfigError, Problem

MAX_BYTES: Final = 1024 * 1024
"""The largest file that is read."""
MAX_VALUES: Final = 100_000
"""Values in a file after its aliases are replaced by what they stand for."""
MAX_DEPTH: Final = 60
"""How deep mappings and lists may be inside each other."""

_TAG: Final = "tag:yaml.org,2002:"
_MERGE: Final = f"{_TAG}merge"
_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_MAX_DIGITS: Final = 40
_WORDS: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}


def plain_value(text: str) -> str | int | float | bool | None:
    """The value of a word without quotes: ``4096`` → a number, ``true`` → True, ``null`` → None, else the
    text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _MAX_DIGITS and _INT.fullmatch(text):
        return int(text)
    if len(text) <= _MAX_DIGITS and _FLOAT.fullmatch(text):
        return float(text)
    return text


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader with :func:`plain_value` for words without quotes."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        """The tag of a node that has none in the file."""
        if kind is not yaml.ScalarNode:
            return f"{_TAG}seq" if kind is yaml.SequenceNode else f"{_TAG}map"
        if not implicit[0]:
            return f"{_TAG}str"
        return _MERGE if value == "<<" else f"{_TAG}plain"


PlainLoader.add_constructor(f"{_TAG}plain", lambda _, node: plain_value(node.value))


@dataclass(frozen=True, slots=True)
class YamlFile:
    """The contents of a YAML file."""

    values: Any
    lines: dict[tuple[PathPart, ...], int] = field(default_factory=dict)
    """Path of a value → the line, from 1, of its key (or of itself in a list)."""
    problems: tuple[Problem, ...] = ()
    """Duplicate keys, of which YAML would silently use the last."""

    def line(self, path: tuple[PathPart, ...]) -> int:
        """The line of the value at ``path``, or of the innermost container around it; 0 for an empty file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)


def read_yaml(path: Path) -> YamlFile:
    """Read one YAML document. Raises ConfigError if the file can't be read, isn't YAML, or is larger than
    :data:`MAX_BYTES`, :data:`MAX_VALUES` or :data:`MAX_DEPTH`."""
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            remedy = "name a configuration file"
            raise ConfigError([Problem("", f"is larger than {MAX_BYTES // 1024} KiB", remedy)], source)
        text = data.decode("utf-8-sig")
    except OSError as error:
        remedy = "name an existing file; `tierplane init FILE` writes an example"
        raise ConfigError([Problem("", f"can't be read: {error.strerror}", remedy)], source) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", "is not UTF-8 text", "save it as UTF-8")], source) from error
    return _parsed(text, source)


def _parsed(text: str, source: str) -> YamlFile:
    loader = None
    try:
        loader = PlainLoader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlFile(None)
        _check_size(node)
        lines: dict[tuple[PathPart, ...], int] = {}
        problems = list(_walk(node, (), lines))
        return YamlFile(loader.construct_document(node), lines, tuple(problems))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(text for text in (error.context, error.problem) if text)
        place = f" (column {mark.column + 1})" if mark else ""
        problem = Problem("", f"is not valid YAML: {what}{place}", line=mark.line + 1 if mark else 0)
        raise ConfigError([problem], source) from error
    except RecursionError as error:
        message = f"lists and mappings are more than {MAX_DEPTH} deep inside each other"
        raise ConfigError([Problem("", message, "write it flatter")], source) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ConfigError([Problem("", f"is not valid YAML: {error}")], source) from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Raise MarkedYAMLError if the document with its aliases replaced is too large, too deep, or endless.

    Every node is visited once, however many aliases there are.
    """
    sizes: dict[int, int] = {}
    depths: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node, level: int) -> tuple[int, int]:
        key = id(node)
        if key in open_nodes:
            raise yaml.MarkedYAMLError(None, None, "an alias stands for what contains it", node.start_mark)
        if key not in sizes:
            open_nodes.add(key)
            size, depth = 1, 0
            if level > MAX_DEPTH:
                raise RecursionError
            for child in _children(node):
                child_size, child_depth = visit(child, level + 1)
                size, depth = size + child_size, max(depth, child_depth + 1)
            open_nodes.discard(key)
            sizes[key], depths[key] = size, depth
        if sizes[key] > MAX_VALUES:
            message = f"with its aliases it has more than {MAX_VALUES:,} values"
            raise yaml.MarkedYAMLError(None, None, message, node.start_mark)
        if level + depths[key] > MAX_DEPTH:
            raise RecursionError
        return sizes[key], depths[key]

    visit(root, 0)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _walk(
    node: yaml.Node, path: tuple[PathPart, ...], lines: dict[tuple[PathPart, ...], int]
) -> Iterator[Problem]:
    """Record the line of every value below ``node``; yield a problem for each duplicate key."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _walk(item, (*path, i), lines)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key_node.tag != _MERGE:
                if key in first:
                    message = f"the key is already in line {first[key]}"
                    yield Problem(path_text((*path, key)), message, "remove one of the two", line)
                first.setdefault(key, line)
            lines.setdefault((*path, key), line)
            yield from _walk(value_node, (*path, key), lines)
