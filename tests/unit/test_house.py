"""The house's rules that no other tool checks."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.support.repository import ROOT, relative, tracked

MAX_LINES = 600
MAX_FILES = 25

IMPURE_CALLS = {"open", "print", "input", "exec", "eval"}
IMPURE_METHODS = {"now", "utcnow", "today", "read_text", "write_text"}
DEFINED_TWICE: dict[str, str] = {}
"""Class names that are defined twice in the product → why that is right."""


PYTHON = tracked("*.py")
PRODUCT = [path for path in PYTHON if relative(path).startswith(("controlplane/", "deployments/"))]
CORE = [path for path in PYTHON if relative(path).startswith("controlplane/core/")]


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) > 50
    assert len(CORE) > 5


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_calls_nothing_impure(path: Path) -> None:
    """Imports are a contract in pyproject.toml; this is about built-in functions and methods."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            wrong = {node.func.id} & IMPURE_CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            wrong = {node.attr} & IMPURE_METHODS if node.value.id in {"datetime", "date", "Path"} else set()
        else:
            continue
        assert not wrong, f"{relative(path)}, line {node.lineno}: {', '.join(wrong)}"


def test_no_class_name_means_two_things() -> None:
    defined: dict[str, list[str]] = {}
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                defined.setdefault(node.name, []).append(f"{relative(path)}:{node.lineno}")
    twice = {name: places for name, places in defined.items() if len(places) > 1}
    assert twice.keys() - DEFINED_TWICE.keys() == set(), twice
    assert DEFINED_TWICE.keys() - twice.keys() == set(), "an exception that is no longer needed"


def test_folders_are_small() -> None:
    folders = Counter(path.parent for path in PRODUCT)
    assert {relative(folder): n for folder, n in folders.items() if n > MAX_FILES} == {}


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_no_test_imports_from_another_test() -> None:
    """What several of them need is in tests/support."""
    imported = re.compile(r"^ *(?:from|import) (tests\.(?!support\b|benchmarks\b)[\w.]+)", re.MULTILINE)
    found = {
        relative(path): names
        for path in tracked("tests/*.py")
        if (names := imported.findall(path.read_text("utf-8")))
    }
    assert found == {}


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in tracked("*.py", "*.toml", "*.yaml", "*.md", "Makefile")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if later.search(line)
    ]
    assert found == []


def test_locks_are_exact_and_name_no_place() -> None:
    locks = sorted((ROOT / ".locks").glob("*.txt"))
    assert {"core", "cpu", "dev", "gpu", "llamacpp", "torch-cpu"} == {path.stem for path in locks}
    pin = re.compile(r"^[a-z0-9-]+==[\w.+!]+( ; python_(full_)?version [<>=]+ [\"'][\d.]+[\"'])?$")
    for path in locks:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [line for line in lines if not pin.match(line)] == []
        assert not {line.partition("==")[0] for line in lines} & {"torchvision", "torchaudio", "torchcodec"}


def test_locks_have_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"core": project["dependencies"], **project["optional-dependencies"]}
    for extra, requirements in wanted.items():
        pins = {
            line.partition("==")[0]
            for name in {"core", extra}
            for line in (ROOT / ".locks" / f"{name}.txt").read_text().splitlines()
        }
        names = {re.split(r"[\[<>=]", text)[0].lower() for text in requirements}
        assert names <= pins, extra


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
