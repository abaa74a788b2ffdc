"""The console that commands print to, and durations as text.

Much of what commands print comes from engines, models, clients and operators. Everything that is printed as
text goes through :func:`say` or :func:`stdout`, which remove control sequences; JSON escapes them.
"""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich.console import Console
from rich.segment import Segment

from controlplane.terminal import printable

PIPE_WIDTH: Final = 240
"""The width of output to a pipe or a file, in columns: wide enough that tables are not truncated."""


_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class PrintableConsole(Console):
    """A console that shows no control sequences but its own."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """The segments of a renderable, also of each cell of a table."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def say(text: str, *, err: bool = False) -> None:
    """Print a line of text to standard output, or to standard error."""
    click.echo(printable(text), err=err)


def stdout() -> Console:
    """A console on standard output: as wide as the terminal, or ``PIPE_WIDTH`` columns without one."""
    console = PrintableConsole(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def age(s: float) -> str:
    """A duration in seconds as text: ``8 s``, ``3 m 20 s``, ``5 h 02 m``."""
    whole = max(0, int(s))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} m"


def parse_duration(text: str) -> float:
    """``90s``, ``15m``, ``1.5h`` or ``1d`` in seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a duration such as 90s, 30m, 2h or 1d")
    return float(match[1]) * _UNITS_S[match[2]]


def parse_time(text: str, *, ahead: bool = False) -> float:
    """A moment as Unix seconds: ``24h`` ago (with ``ahead``, from now), or a date in UTC such as
    ``2027-01-31``. Raises ValueError."""
    try:
        away_s = parse_duration(text)
    except ValueError:
        pass
    else:
        return time.time() + (away_s if ahead else -away_s)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        message = f"'{text}' is neither a duration such as 24h or 30d nor a date such as 2027-01-31"
        raise ValueError(message) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def user_name() -> str:
    """Who runs this command; empty if the system has no name for the user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
