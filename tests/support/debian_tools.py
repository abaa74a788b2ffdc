"""Programs of Debian packages that ``make test`` unpacks beside the environment, or that the system has."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

UNPACKED = Path(sys.prefix) / "debian" / "usr" / "bin"


def tool(name: str) -> str:
    """The program's path."""
    path = UNPACKED / name
    found = str(path) if path.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not there: run the tests by `make test`, which unpacks it")
    return found
