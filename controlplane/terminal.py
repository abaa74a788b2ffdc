"""Text that may be shown on a terminal."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, moves of the cursor
    # Window title, clipboard and other strings for the terminal, up to their end or that of the line.
    r"|(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u202a-\u202e\u2066-\u2069]"  # these change the order in which characters are shown
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` as it may be shown on a terminal: without escape sequences and control characters except line
    breaks and tabs. Text of engines, models, clients and operators could otherwise set the window's title,
    write to the clipboard or hide lines."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", _UNPRINTABLE.sub("", text))
