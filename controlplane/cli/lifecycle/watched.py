"""Calls of Ray that may never return, made in a thread of their own, so that the command stays in control."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from controlplane.errors import SetupError

T = TypeVar("T")
WATCH_S = 0.1

end_process = os._exit
_abandoned: list[str] = []


def watched(
    work: Callable[[], T], watch: Callable[[], None], *, limit_s: float = float("inf"), what: str = "Ray"
) -> T:
    """Run ``work`` and call ``watch`` again and again meanwhile.

    An exception from ``watch`` abandons the work. So does the end of ``limit_s``, with a SetupError that
    names ``what``.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name=f"watched-{what}")
    thread.start()
    deadline_s = time.monotonic() + limit_s
    try:
        while True:
            thread.join(WATCH_S)
            if found.done():
                break
            watch()
            if time.monotonic() > deadline_s:
                raise SetupError(f"{what} has not answered for {limit_s:g} s: it hangs")
    except BaseException:
        abandon(what)
        raise
    return found.result()


def abandon(what: str) -> None:
    """Note that this process can't end in the usual way, because a thread waits for ``what``."""
    _abandoned.append(what)


def leave(code: int) -> None:
    """If work was abandoned, end this process now: Ray's own clean-up would wait for it."""
    if _abandoned:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                continue
        end_process(code)
