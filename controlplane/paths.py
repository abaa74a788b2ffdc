"""The folders where tierplane stores files: records of the running plane, and a cache."""

from __future__ import annotations

import os
from pathlib import Path

from controlplane.errors import SetupError

RUN_DIR_VARIABLE = "TIERPLANE_RUN_DIR"
CACHE_DIR_VARIABLE = "TIERPLANE_CACHE_DIR"


def run_dir() -> Path:
    """The folder for the running plane's files (records, logs, store, locks). Only its owner has access, also
    if the folder existed before.

    ``TIERPLANE_RUN_DIR``, or ``tierplane/run`` in ``$XDG_CACHE_HOME``. Raises SetupError if that fails, or if
    another user owns the folder.
    """
    path = _folder(RUN_DIR_VARIABLE, "tierplane/run")
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise SetupError(
            f"the folder {path} belongs to another user, who could read the plane's logs and replace its "
            f"files; set {RUN_DIR_VARIABLE} to a folder of your own"
        )
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


def cache_dir() -> Path:
    """The folder for files that can be fetched again (the bundled model); created for its owner only.

    ``TIERPLANE_CACHE_DIR``, or ``tierplane`` in ``$XDG_CACHE_HOME``. Raises SetupError if that fails.
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
            f"can't create the folder {path}: {error.strerror}; set {variable} to another folder"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise SetupError(f"the folder {path} is not writable; set {variable} to a writable one")
    return path


def _xdg_cache_home() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification requires relative paths to be ignored.
    return Path(named) if named and named.startswith("/") else Path.home() / ".cache"


def in_checkout() -> bool:
    """Whether tierplane runs from a checkout, where `make` installs what is missing."""
    return (Path(__file__).parents[1] / "Makefile").is_file()


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra: ``llamacpp``, ``cpu`` or ``gpu``."""
    if in_checkout():
        return f"make env EXTRA={extra}"
    index = " --extra-index-url https://download.pytorch.org/whl/cpu" if extra == "cpu" else ""
    return f"pip install 'tierplane[{extra}]'{index}"
