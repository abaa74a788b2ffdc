"""A YAML file as plain values, with the line of each value and all duplicate keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from controlplane.config.problems import path_text
from controlplane.config.strict import PathPart
from controlplane.errors import ConfigError, Problem


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
    """Read one YAML document. Raises ConfigError if the file can't be read or isn't YAML."""
    source = str(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        remedy = "name an existing file; there are examples in configs/"
        raise ConfigError([Problem("", f"can't be read: {error.strerror}", remedy)], source) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("", "is not UTF-8 text", "save it as UTF-8")], source) from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlFile(None)
        lines: dict[tuple[PathPart, ...], int] = {}
        problems = list(_walk(node, (), lines, ()))
        return YamlFile(loader.construct_document(node), lines, tuple(problems))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(text for text in (error.context, error.problem) if text)
        place = f" (column {mark.column + 1})" if mark else ""
        problem = Problem("", f"is not valid YAML: {what}{place}", line=mark.line + 1 if mark else 0)
        raise ConfigError([problem], source) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError([Problem("", f"is not valid YAML: {error}")], source) from error
    finally:
        loader.dispose()


def _walk(
    node: yaml.Node,
    path: tuple[PathPart, ...],
    lines: dict[tuple[PathPart, ...], int],
    above: tuple[int, ...],
) -> Iterator[Problem]:
    """Record the line of every value below ``node``; yield a problem for each duplicate key."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in above:  # an alias that contains itself
        return
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _walk(item, (*path, i), lines, above)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:merge":
                if key in first:
                    message = f"the key is already in line {first[key]}"
                    yield Problem(path_text((*path, key)), message, "remove one of the two", line)
                first.setdefault(key, line)
            lines.setdefault((*path, key), line)
            yield from _walk(value_node, (*path, key), lines, above)
