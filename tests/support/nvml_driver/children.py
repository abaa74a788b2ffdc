"""A child process that runs the real binding against the scripted driver, one expression at a time.

The library path is read when a process starts, so whatever uses NVML runs in a child. The child holds one
object (``agent``, ``reader``…), evaluates an expression on demand and sends the result back pickled.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.waiting import until

_LOOP = """
import pickle, sys, traceback
names = {}
exec(sys.argv[1], names)
results, sys.stdout = sys.stdout.buffer, sys.stderr
for line in sys.stdin:
    try:
        result = (True, eval(line, names))
    except Exception:
        result = (False, traceback.format_exc())
    pickle.dump(result, results)
    results.flush()
"""


class Child:
    """Runs ``setup``, then evaluates expressions with its names until it is closed."""

    def __init__(self, setup: str, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _LOOP, setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()

    def ask(self, expression: str) -> Any:
        """The value of an expression."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(expression.encode() + b"\n")
        self._process.stdin.flush()
        succeeded, result = pickle.load(self._process.stdout)
        assert succeeded, result
        return result

    def until(self, expression: str, holds: Callable[[Any], bool], timeout_s: float = 10.0) -> Any:
        """Evaluates the expression until its value ``holds``; a failure shows the last value."""
        values: list[Any] = []

        def held() -> bool:
            values.append(self.ask(expression))
            return holds(values[-1])

        until(held, timeout_s, expression, lambda: f"it is {values[-1]}")
        return values[-1]
