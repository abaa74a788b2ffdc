"""A plane for tests of commands, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


class FakePlane:
    """Stands for a :class:`~controlplane.cli.controller_access.PlaneAccess`.

    ``answers`` has the answer to each method by its name; ``answer`` makes those that are not there of the
    method's name and the arguments. ``calls`` is what was asked.
    """

    def __init__(self, answer: Callable[..., Any] | None = None, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []
        self._answer = answer

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """The answer to a call of the controller."""
        name = method.__name__
        self.calls.append((name, *args))
        if name in self.answers or self._answer is None:
            return self.answers[name]
        return self._answer(name, *args)

    def connect(self, monkeypatch: pytest.MonkeyPatch, *commands: ModuleType) -> None:
        """Have the commands' ``connected`` give this plane."""

        @contextmanager
        def connected(address: str | None, namespace: str | None) -> Iterator[FakePlane]:
            yield self

        for module in commands:
            monkeypatch.setattr(module, "connected", connected)
