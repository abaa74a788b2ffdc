"""``tierplane logs``: the logs of engines, replicas, gateways and the controller."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from controlplane.cli.console import say
from controlplane.config import load_plane
from controlplane.errors import SetupError, TierplaneError
from controlplane.logs import open_files
from controlplane.paths import run_dir
from controlplane.ray_cluster import session
from controlplane.terminal import printable

POLL_S = 0.3
TAIL_BYTES = 1024 * 1024
"""The last lines of a file are searched within this many bytes of its end."""

_NOT_SHOWN = frozenset({"timestamp", "level", "event", "logger", "component"})


@click.command()
@click.argument("names", nargs=-1, metavar="[TIER|gateway|controller]...")
@click.option("--follow", "-f", is_flag=True, help="Also print new lines as they are written.")
@click.option(
    "--lines", "-n", default=50, show_default=True, help="How many last lines of each file to print."
)
@click.option("--previous", "-p", is_flag=True, help="Show the logs of replicas that have ended instead.")
@click.option("--raw", is_flag=True, help="Print lines as they are in the file (JSON), without its name.")
def command(names: tuple[str, ...], follow: bool, lines: int, previous: bool, raw: bool) -> None:
    """Show the logs of the engines, the replicas, the gateway and the controller.

    By default those of processes that run now; if none runs, those of the last ones.
    """
    folder = run_dir() / "logs"
    found = _chosen(folder, names, previous=previous)
    if not found and not follow:
        raise SetupError(_nothing_found(folder, names, previous=previous))
    read: dict[Path, _Tail] = {}
    for path in found:
        read[path] = _Tail(path)
        for line in read[path].last(lines):
            say(_line_text(path, line, raw))
    old = set(log_files(folder, names)) - set(found)
    try:
        while follow:
            for path in log_files(folder, names):
                if path not in old:
                    for line in read.setdefault(path, _Tail(path)).new():
                        say(_line_text(path, line, raw))
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return


def _chosen(folder: Path, names: Sequence[str], *, previous: bool) -> list[Path]:
    """The files of living processes, or with ``previous`` those of ended ones. If no process runs at all,
    all files."""
    files = log_files(folder, names)
    living = open_files(folder) if files else set()
    if not living:
        return files
    return [path for path in files if (path in living) != previous]


def _nothing_found(folder: Path, names: Sequence[str], *, previous: bool) -> str:
    wanted = f" of {', '.join(names)}" if names else ""
    if not previous and log_files(folder, names):
        return f"no process{wanted} runs: `tierplane logs --previous` shows the logs of those that have ended"
    known = _known_names(folder)
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
    if close:
        return f"no logs{wanted} in {folder}: did you mean {' or '.join(close)}?"
    hint = f"the names are {', '.join(known)}" if names and known else "start a plane with `tierplane up`"
    return f"no logs{wanted} in {folder}: {hint}"


def _known_names(folder: Path) -> list[str]:
    """What may be named: the tiers of the running plane, if there is one, the gateway and the controller."""
    try:
        record = session.load_record()
        tiers = [tier.name for tier in load_plane(record.config).plane.tiers] if record else []
    except (TierplaneError, OSError):
        tiers = []
    if not tiers:
        stems = {path.stem.removesuffix("-replica").removesuffix("-engine") for path in log_files(folder, ())}
        tiers = sorted({stem.rpartition("-")[0] for stem in stems} - {"", "gateway"})
    return [*tiers, "gateway", "controller"]


def log_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The log files of these tiers (or ``gateway``, ``controller``), all by default, the oldest first."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix == ".log"]
    except FileNotFoundError:
        return []
    wanted = [
        path
        for path in paths
        if not names or any(path.stem == name or path.stem.startswith(f"{name}-") for name in names)
    ]
    return sorted(wanted, key=lambda path: (path.stat().st_mtime, path.name))


def readable(line: str) -> str:
    """One of tierplane's JSON lines as readable text; any other line unchanged."""
    try:
        event = json.loads(line) if line.startswith("{") else None
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        return line
    clock = str(event.get("timestamp", ""))[11:19]
    level = str(event.get("level", ""))
    pairs = " ".join(f"{key}={_value(value)}" for key, value in event.items() if key not in _NOT_SHOWN)
    return f"{clock} {level:<7} {event['event']}  {pairs}".rstrip()


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value if value and " " not in value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _line_text(path: Path, line: str, raw: bool) -> str:
    return printable(line if raw else f"{path.stem} | {readable(line)}")


class _Tail:
    """Reads whole lines of a growing file, from the beginning again if the file is replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._inode = 0
        self._partial = b""

    def last(self, count: int) -> list[str]:
        """The last ``count`` whole lines; :meth:`new` continues after them."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return []
        self._position = max(0, size - TAIL_BYTES)
        starts_in_a_line = self._position > 0
        lines = self.new()
        return lines[1:][-count:] if starts_in_a_line else lines[-count:] if count else []

    def new(self) -> list[str]:
        """Whole lines written since the last call."""
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if (self._inode and stat.st_ino != self._inode) or stat.st_size < self._position:
                    self._position, self._partial = 0, b""
                self._inode = stat.st_ino
                file.seek(self._position)
                data = self._partial + file.read()
                self._position = file.tell()
        except FileNotFoundError:
            return []
        *whole, self._partial = data.split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in whole]
