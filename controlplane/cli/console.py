"""Where commands print for people."""

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
