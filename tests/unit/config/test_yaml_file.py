"""Values of words without quotes, and the bounds of a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.config.yaml_file import MAX_BYTES, MAX_DEPTH, plain_value, read_yaml
from controlplane.errors import ConfigError


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path).values


@pytest.mark.parametrize(
    "text",
    [
        "no", "off", "on", "yes", "Y", "0755123", "1:30", "1_000", "0x1F", "0o17", "2026-11-30", "12e", "e5",
        "2026-11-30 10:00:00", "=", "1.2.3", "-", "+", ".", "1e", "tRue", "0b1", "-07", "00", "1,5",
    ],
)  # fmt: skip
def test_words_that_stay_what_they_are(tmp_path: Path, text: str) -> None:
    assert plain_value(text) == text
    if text != "-":
        assert read(tmp_path, f"a: {text}\n") == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-5", -5), ("+5", 5), ("4096", 4096), ("0.9", 0.9), ("1e6", 1e6), ("1.5e-3", 0.0015),
        (".5", 0.5), ("5.", 5.0), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        (".inf", math.inf),
    ],
)  # fmt: skip
def test_values(tmp_path: Path, text: str, value: Any) -> None:
    found = plain_value(text)
    assert found == value
    assert type(found) is type(value)
    assert read(tmp_path, f"a: {text}\n") == {"a": value}


def test_quotes_and_blocks_are_text(tmp_path: Path) -> None:
    assert read(tmp_path, "a: '1'\nb: \"true\"\nc: |-\n  5\n") == {"a": "1", "b": "true", "c": "5"}


def test_what_was_read_is_read_the_same_from_the_copy_for_serve(tmp_path: Path) -> None:
    values = read(tmp_path, "{a: no, b: 0755, c: 1:30, d: 2026-11-30, e: 1e6, f: 1e-7, g: ~, h: on, i: 0x10}")
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_anchors_and_merges_still_work(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: no}\nb: {<<: *a, x: 2}\nc: *a\n"
    assert read(tmp_path, text)["b"] == {"x": 2, "y": "no"}


def laughs(kind: str) -> str:
    lines = ["a: &a {x: 1}" if kind == "merge" else "a: &a [1, 2]"]
    for number in range(1, 30):
        old, new = chr(96 + number), chr(97 + number)
        ten = ", ".join([f"*{old}"] * 10)
        lines.append(f"{new}: &{new} {{<<: [{ten}]}}" if kind == "merge" else f"{new}: &{new} [{ten}]")
        if number == 20:
            break
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (laughs("list"), "more than 100,000 values"),
        (laughs("merge"), "more than 100,000 values"),
        ("a: &a [*a]", "stands for what contains it"),
        ("a: &a {b: *a}", "stands for what contains it"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "deep"),
        ("[" * 100_000, "deep"),
        ("{a: " * 20_000, "deep"),
        ("- " * 5_000 + "1", "deep"),
        ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, "deep"),
        ("#" * (MAX_BYTES + 1), "larger than"),
        ("a: !!python/object/apply:os.system [x]", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_files_that_are_too_large_too_deep_or_no_plain_values(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text)


def test_a_file_without_an_end() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        read_yaml(Path("/dev/zero"))
