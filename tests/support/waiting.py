"""Waiting for what a test expects to come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


def until(
    condition: Callable[[], T | None],
    timeout_s: float = 10.0,
    what: str = "",
    story: Callable[[], str] = str,
    every_s: float = 0.02,
) -> T:
    """The first true value of ``condition``, asked for every ``every_s``; fails the test if there is none in
    time, and then asks ``story`` for more."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not in {timeout_s:g} s: {what or condition}\n{story()}".rstrip())
        time.sleep(every_s)
    return value


async def until_async(condition: Callable[[], T | None], timeout_s: float = 10.0, what: str = "") -> T:
    """:func:`until` for a test that shares its event loop with what it waits for."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not in {timeout_s:g} s: {what or condition}")
        await asyncio.sleep(0.002)
    return value


async def loop_turns() -> None:
    """What has arrived at this event loop's sockets is read, and what that makes ready runs."""
    for _ in range(3):
        await asyncio.sleep(0)


async def forever() -> NoReturn:
    """Ends only by being cancelled: for a fake that never answers."""
    await asyncio.Event().wait()
    raise AssertionError
