"""Diagnoses from an engine's last lines of output, for several kinds of engine."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from controlplane.engines.base import Diagnosis

TAIL = 20
"""How many lines of output a diagnosis contains."""

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
    """The last lines, for a diagnosis."""
    return tuple(lines[-TAIL:])


def find(pattern: re.Pattern[str], lines: Sequence[str]) -> re.Match[str] | None:
    """The last match of ``pattern`` in any line."""
    for line in reversed(lines):
        match = pattern.search(line)
        if match:
            return match
    return None


def port_taken(lines: Sequence[str]) -> Diagnosis | None:
    """The diagnosis for a port that could not be bound; None if the output does not show that."""
    if find(_PORT_TAKEN, lines) is None:
        return None
    summary = "the port was taken by another process; trying another port"
    return Diagnosis(summary, port_taken=True, last_lines=tail(lines))


def plain(line: str) -> str:
    """A line of output without the prefix of vLLM's logger."""
    return _PREFIX.sub("", line, count=1).strip()


def ending(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None:
        return "did not become ready"
    if exit_code < 0:
        try:
            return f"was killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"was killed by signal {-exit_code}"
    return f"exited with code {exit_code}"


def last_error(what: str, lines: Sequence[str], exit_code: int | None) -> Diagnosis:
    """The exit of the process named ``what``, and its last informative line: an exception if there is one,
    else an error line, else (after a failure) any line."""
    informative = [plain(line) for line in lines if not _UNHELPFUL.search(line)]
    informative = [line for line in informative if line]
    cause = (
        next((line for line in reversed(informative) if _EXCEPTION.search(line)), "")
        or next((line for line in reversed(informative) if _ERROR_LINE.search(line)), "")
        or (informative[-1] if informative and exit_code is not None and exit_code > 0 else "")
    )
    summary = f"{what} {ending(exit_code)}"
    return Diagnosis(f"{summary}: {cause[:400]}" if cause else summary, last_lines=tail(lines))
