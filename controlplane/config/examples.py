"""The example configurations that are installed with tierplane: those of ``configs`` in a checkout."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from controlplane.errors import SetupError

_RUN_LINE = re.compile(r"^#   tierplane up configs/\S+.*$", re.MULTILINE)


def example_names() -> list[str]:
    """The names of all examples."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def example_path(name: str) -> Path:
    """The file of an example. Raises SetupError with the known names if there is none."""
    names = example_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there is {', '.join(names) or 'none'}"
        raise SetupError(f"there is no example '{name}': {hint}")
    return _folder() / f"{name}.yaml"


def example_text(name: str, file: Path) -> str:
    """The text of an example for the user's ``file``, which its comment names."""
    text = example_path(name).read_text(encoding="utf-8")
    return _RUN_LINE.sub(lambda _: f"#   tierplane up {file}", text).replace(
        f"configs/{name}.yaml", str(file)
    )


def _folder() -> Path:
    return Path(str(files("controlplane"))) / "examples"
