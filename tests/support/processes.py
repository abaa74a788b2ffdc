"""Programs that tests and benchmarks start."""

from __future__ import annotations

import queue
import subprocess
import threading
import time

from controlplane.errors import SetupError


def await_line(process: subprocess.Popen[str], mark: str, timeout_s: float, what: str) -> str:
    """The first line of its output that has ``mark``. Raises SetupError, with its last lines, if there is
    none in time or the output ends before."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said: list[str] = []
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left_s)
        except queue.Empty:
            break
        if line is None:
            break
        said.append(line)
        if mark in line:
            return line
    raise SetupError(f"{what} did not come up:\n" + "".join(said[-10:]))
