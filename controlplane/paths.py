"""Where tierplane keeps files on a machine: what runs now, and what is worth keeping."""

from __future__ import annotations

import os
from pathlib import Path

from controlplane.errors import SetupError

RUN_DIR_VARIABLE = "TIERPLANE_RUN_DIR"
CACHE_DIR_VARIABLE = "TIERPLANE_CACHE_DIR"


def run_dir() -> Path:
    """The folder for what runs now (process records, logs, locks); created for its owner only.

    ``TIERPLANE_RUN_DIR``, or ``tierplane/run`` in ``$XDG_CACHE_HOME``. Raises SetupError if it can't be made.
    """
    return _folder(RUN_DIR_VARIABLE, "tierplane/run")


def cache_dir() -> Path:
    """The folder for what can be fetched again (the bundled model); created for its owner only.

    ``TIERPLANE_CACHE_DIR``, or ``tierplane`` in ``$XDG_CACHE_HOME``. Raises SetupError if it can't be made.
    """
    return _folder(CACHE_DIR_VARIABLE, "tierplane")


def _folder(variable: str, below_cache: str) -> Path:
    named = os.environ.get(variable)
    path = Path(named).expanduser().absolute() if named else _xdg_cache_home() / below_cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"can't create the folder {path}: {error.strerror}; set {variable} to one that can"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SetupError(f"the folder {path} is not writable; set {variable} to one that is")
    return path


def _xdg_cache_home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    # The specification says to ignore a relative path.
    return Path(named) if named and named.startswith("/") else Path.home() / ".cache"
