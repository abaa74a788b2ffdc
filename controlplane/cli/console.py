"""The console that commands print to, and durations as text."""

from __future__ import annotations

import re
from typing import Final

from rich.console import Console

PIPE_WIDTH: Final = 240
"""The width of output to a pipe or a file, in columns: wide enough that tables are not truncated."""


_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


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


def parse_duration(text: str) -> float:
    """``90s``, ``15m``, ``1.5h`` or ``1d`` in seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a duration such as 90s, 30m, 2h or 1d")
    return float(match[1]) * _UNITS_S[match[2]]
