"""A child process that runs the real binding against the scripted driver and answers one step at a time.

The library path is read when a process starts, so whatever uses NVML runs in a child. The child holds one
object (``agent``, ``reader``…), evaluates an expression on demand and sends the result back pickled.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tests.support.waiting import until

T = TypeVar("T")

_LOOP = """
import pickle, sys, traceback
names = {}
exec(sys.argv[1], names)
answers, sys.stdout = sys.stdout.buffer, sys.stderr
for line in sys.stdin:
    try:
        answer = (True, eval(line, names))
    except Exception:
        answer = (False, traceback.format_exc())
    pickle.dump(answer, answers)
    answers.flush()
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
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(expression.encode() + b"\n")
        self._process.stdin.flush()
        good, answer = pickle.load(self._process.stdout)
        assert good, answer
        return answer

    def until(self, expression: str, holds: Callable[[Any], bool], timeout_s: float = 10.0) -> Any:
        """Asks until the answer ``holds``; the last answer is in the failure."""
        answers: list[Any] = []

        def held() -> bool:
            answers.append(self.ask(expression))
            return holds(answers[-1])

        until(held, timeout_s, expression, lambda: f"it is {answers[-1]}")
        return answers[-1]
