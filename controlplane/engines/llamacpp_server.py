"""llama.cpp's OpenAI server as a process: ``python -m controlplane.engines.llamacpp_server``.

A thin shell around ``xllamacpp.Server``, which serves HTTP in its own threads and checks the key on all
routes but ``/health``. An error before it listens is printed as one line ``tierplane: …`` with the remedy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from controlplane.engines.llamacpp import ALIASES, KEY_ENV, OWN_FIELDS


class UnusableSettings(Exception):
    """The server can't start with these settings; the message names the setting and the remedy."""


def apply(params: Any, engine_args: dict[str, Any]) -> None:
    """Set llama.cpp's parameters from a tier's ``engine_args``; UnusableSettings names an invalid one."""
    for name, value in engine_args.items():
        if value is None:
            continue
        path = ALIASES.get(name, name.replace("-", "_"))
        *parents, field = path.split(".")
        target = params
        for parent in parents:
            target = getattr(target, parent)
        if field in OWN_FIELDS:
            raise UnusableSettings(f"engine_args.{name} is set by tierplane: remove it")
        if field.startswith("_") or not hasattr(target, field):
            raise UnusableSettings(f"engine_args.{name} is unknown to llama.cpp: {_known(params)}")
        try:
            setattr(target, field, value)
        except (TypeError, ValueError, OverflowError) as error:
            kind = type(getattr(target, field)).__name__
            raise UnusableSettings(
                f"engine_args.{name} can't be {value!r}: llama.cpp needs a value of type {kind}"
            ) from error


def _known(params: Any) -> str:
    fields = sorted(
        name
        for name in dir(params)
        if not name.startswith("_")
        and name not in OWN_FIELDS
        and isinstance(getattr(params, name), bool | int | float | str)
    )
    return f"use one of {', '.join(ALIASES)}, or a field: {', '.join(fields)}"


def gguf_file(model: str) -> Path:
    """The GGUF file at ``model``: the file itself, or the only one in the folder. Raises UnusableSettings."""
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UnusableSettings(
            f"there is no model at '{model}': llamacpp needs a local GGUF file, or a folder with one"
        )
    # For a split model, llama.cpp needs only the first part, and finds the others.
    files = sorted(
        file for file in path.glob("*.gguf") if "-of-" not in file.name or "-00001-of-" in file.name
    )
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UnusableSettings(
            f"'{model}' must contain one GGUF model but contains {names}: name the file itself"
        )
    return files[0]


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="llama.cpp's OpenAI-compatible server")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--params", default="{}")
    options = parser.parse_args()
    secret = os.environ.pop(KEY_ENV, "")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        path = gguf_file(options.model)
        _check_port_is_free(options.host, options.port)
        server = _start(options, path, secret)
    except UnusableSettings as error:
        print(f"tierplane: {error}", file=sys.stderr, flush=True)
        return 2
    print(f"listening on {server.listening_address}", flush=True)
    stopping.wait()
    # Exit without waiting for the server's threads, which may still be generating.
    os._exit(0)


def _start(options: argparse.Namespace, path: Path, secret: str) -> Any:
    try:
        from xllamacpp import CommonParams, Server
    except ImportError as error:
        raise UnusableSettings(
            f"the package xllamacpp can't be imported ({error}): pip install 'tierplane[llamacpp]'"
        ) from error
    params = CommonParams()
    params.ui = False
    params.endpoint_metrics = True
    apply(params, json.loads(options.params))
    params.model.path = str(path)
    params.model_alias = {options.alias}
    params.hostnames = [options.host]
    params.port = options.port
    params.api_keys = [secret] if secret else []
    try:
        return Server(params)
    except Exception as error:
        raise RuntimeError(f"llama.cpp could not start: {error}") from error


def _check_port_is_free(host: str, port: int) -> None:
    """Raises OSError if the port is taken; llama.cpp itself would share it with the other process."""
    with socket.create_server((host, port)):
        pass


if __name__ == "__main__":
    sys.exit(main())
