"""The console that commands print to, and how durations are shown."""

from __future__ import annotations

from typing import Final

from rich.console import Console

PIPE_WIDTH: Final = 240
"""Columns where nobody sees the output: what a pipe or a file gets is not cut to the width of a terminal."""


def stdout() -> Console:
    """A console on standard output: as wide as the terminal, elsewhere wide enough."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def age(s: float) -> str:
    """A duration for people: ``8 s``, ``3 m 20 s``, ``5 h 02 m``."""
    whole = max(0, int(s))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} m"
