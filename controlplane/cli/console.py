"""The console that commands print to, and durations as text."""

from __future__ import annotations

from typing import Final

from rich.console import Console

PIPE_WIDTH: Final = 240
"""The width of output to a pipe or a file, in columns: wide enough that tables are not truncated."""


def stdout() -> Console:
    """A console on standard output: as wide as the terminal, or ``PIPE_WIDTH`` columns without one."""
    console = Console(highlight=False)
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
