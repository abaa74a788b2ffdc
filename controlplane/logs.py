"""Logging: one structlog set-up for every process of the plane.

A line is an event with key-value pairs: ``log.info("endpoint ready", tier=…, endpoint_id=…)``. On a terminal
it is printed as readable text, elsewhere as one JSON object per line. Replicas, gateways and the controller
each also write JSON to their own file in the run folder, which ``tierplane logs`` reads.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Literal

import structlog

LOG_FILE_BYTES = 10 * 1024 * 1024
ROTATED_LOG_FILES = 2
KEPT_LOG_FILES = 100
"""How many log files of processes that have ended stay in a folder, with their older parts."""

_PACKAGES = ("controlplane", "deployments")
_HIDDEN_KEYS = frozenset({"secret", "api_key", "authorization", "token"})

LogFormat = Literal["auto", "json", "console"]


def setup(
    log_format: LogFormat = "auto",
    level: str = "info",
    *,
    file: Path | None = None,
    **context: str,
) -> None:
    """Send the log lines of the plane's packages to standard error, and as JSON to ``file``.

    ``context`` (component, tier, …) is added to every line of this process. A further call replaces the
    set-up.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _adder(context),
            structlog.stdlib.add_logger_name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            _hide,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handlers: list[logging.Handler] = []
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(_formatter(resolve_format(log_format)))
    handlers.append(stream)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_old_files(file.parent)
        rotating = logging.handlers.RotatingFileHandler(
            file, maxBytes=LOG_FILE_BYTES, backupCount=ROTATED_LOG_FILES, encoding="utf-8"
        )
        rotating.setFormatter(_formatter("json"))
        handlers.append(rotating)
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
            old.close()
        logger.handlers = handlers[:]
        logger.setLevel(level.upper())
        logger.propagate = False


def resolve_format(log_format: LogFormat) -> Literal["json", "console"]:
    """``auto`` means readable text on a terminal and JSON elsewhere."""
    if log_format != "auto":
        return log_format
    return "console" if sys.stderr.isatty() else "json"


def remove_old_files(folder: Path, keep: int = KEPT_LOG_FILES) -> None:
    """Remove the oldest log files that no process has open, so that at most ``keep`` of those are left."""
    with contextlib.suppress(OSError):
        files = list(folder.glob("*.log"))
        if len(files) <= keep:
            return
        in_use = open_files(folder)
        ended = sorted((path for path in files if path not in in_use), key=lambda path: path.stat().st_mtime)
        for path in ended[: max(0, len(ended) - keep)]:
            for each in (path, *folder.glob(f"{path.name}.*")):
                each.unlink(missing_ok=True)


def open_files(folder: Path) -> set[Path]:
    """The files in ``folder`` that a process of this user on this machine has open."""
    real, found = folder.resolve(), set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        # Processes of other users, and files and processes that are gone by now, are skipped.
        with contextlib.suppress(OSError):
            for number in os.listdir(process / "fd"):
                with contextlib.suppress(OSError):
                    target = Path(os.readlink(process / "fd" / number))
                    if target.parent == real:
                        found.add(folder / target.name)
    return found


def _formatter(log_format: Literal["json", "console"]) -> structlog.stdlib.ProcessorFormatter:
    rendering: list[Any]
    # Tracebacks never show local variables, which may contain secrets.
    if log_format == "json":
        tracebacks = structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        )
        rendering = [tracebacks, structlog.processors.JSONRenderer()]
    else:
        colors = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        plain = structlog.dev.plain_traceback
        rendering = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_logger_name,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ExtraAdder(),
            _hide,
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )


def _adder(context: dict[str, str]) -> structlog.typing.Processor:
    def add(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for key, value in context.items():
            event.setdefault(key, value)
        return event

    return add


def _hide(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A last safeguard: values of keys that are named like a secret are not written."""
    for key in event.keys() & _HIDDEN_KEYS:
        event[key] = "(hidden)"
    return event
