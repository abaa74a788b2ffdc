"""Reading an engine's last lines of output: what several kinds of engine have in common."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from controlplane.engines.base import Diagnosis

TAIL = 20
"""Lines that a diagnosis carries along."""

PORT_TAKEN = "the port was taken by another process"
"""Begins the summary of a diagnosis that says so; a supervisor then tries another port."""

_PORT_TAKEN = re.compile(
    r"address already in use|errno 98|couldn't bind (?:HTTP )?server socket|failed to bind|"
    r"error while attempting to bind",
    re.IGNORECASE,
)
_ERROR_LINE = re.compile(
    r"\b(?:error|exception|fatal|failed|abort(?:ed)?)\b|Error:|Exception:", re.IGNORECASE
)
_EXCEPTION = re.compile(r"(?:^|\s)(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b:? ?")
_UNHELPFUL = re.compile(
    r"traceback \(most recent call last\)|see (?:root cause|stack trace) above|failed core proc|"
    r"engine core initialization failed|core proc\(s\)|leaked|nanobind|resource_tracker|"
    r"error in the (?:above|following)|^\s*File \"|^\s*\^+\s*$",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"^(?:\([A-Za-z_0-9. ]+ pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")


def tail(lines: Sequence[str]) -> tuple[str, ...]:
    """The last lines, as a diagnosis carries them."""
    return tuple(lines[-TAIL:])


def find(pattern: re.Pattern[str], lines: Sequence[str]) -> re.Match[str] | None:
    """The last match of ``pattern`` in any line."""
    for line in reversed(lines):
        match = pattern.search(line)
        if match:
            return match
    return None


def port_taken(lines: Sequence[str]) -> Diagnosis | None:
    """The diagnosis for a port that could not be bound, if the output says so."""
    if find(_PORT_TAKEN, lines) is None:
        return None
    return Diagnosis(f"{PORT_TAKEN}; another one is tried", permanent=False, last_lines=tail(lines))


def plain(line: str) -> str:
    """A line of output without the prefixes of vLLM's logger."""
    return _PREFIX.sub("", line, count=1).strip()


def ending(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None:
        return "did not get ready"
    if exit_code < 0:
        try:
            return f"was killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"was killed by signal {-exit_code}"
    return f"ended with exit code {exit_code}"


def last_error(what: str, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
    """How it ended and the last line that tells something: an exception first, then any error line."""
    telling = [plain(line) for line in lines if not _UNHELPFUL.search(line)]
    telling = [line for line in telling if line]
    said = (
        next((line for line in reversed(telling) if _EXCEPTION.search(line)), "")
        or next((line for line in reversed(telling) if _ERROR_LINE.search(line)), "")
        or (telling[-1] if telling and exit_code is not None and exit_code > 0 else "")
    )
    summary = f"{what} {ending(exit_code)}"
    return Diagnosis(f"{summary}: {said[:400]}" if said else summary, permanent=False, last_lines=tail(lines))
