"""One engine process behind its reaper: starts it, reads its output, notices when it exits, stops it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from controlplane.engines.base import Command
from controlplane.engines.supervision import reaper
from controlplane.engines.supervision.environment import engine_environment
from controlplane.terminal import printable

GRACE_S = 8.0
"""Time between SIGTERM and SIGKILL."""
_REAPER_EXIT_S = 5.0
"""A reaper is killed if it still runs this long after the pipe it reports on was closed."""

_TAIL_LINES = 400
_LINE_CHARS = 4000
_BREAKS = re.compile(rb"\r\n|\n|\r")


class LogFile:
    """A log file for an engine's output. At ``max_bytes`` it is renamed, replacing the previous old part."""

    def __init__(self, path: Path, max_bytes: int = 8 * 1024 * 1024) -> None:
        self.path = path
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, line: str) -> None:
        """Append a line. If the disk is full, the line is lost and the engine continues."""
        with contextlib.suppress(OSError):
            self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()
            if self._file.tell() > self._max_bytes:
                self._file.close()
                os.replace(self.path, self.path.with_suffix(self.path.suffix + ".1"))
                self._file = self.path.open("ab")

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


class EngineOutput:
    """An engine's output as lines, without its secret, colours and control sequences; the last ones stay in
    memory."""

    def __init__(self, secret: str, log_file: LogFile | None, on_line: Callable[[str], None]) -> None:
        self._secret = secret
        self._log_file = log_file
        self._on_line = on_line
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def lines(self) -> tuple[str, ...]:
        """The last lines."""
        return tuple(self._lines)

    def feed(self, data: bytes) -> None:
        """Process output. Each state of a progress bar that overwrites itself counts as a line."""
        *whole, self._rest = _BREAKS.split(self._rest + data)
        for raw in whole:
            self._line(raw)
        if len(self._rest) > _LINE_CHARS:
            self._line(self._rest)
            self._rest = b""

    def end(self) -> None:
        """Process the rest of the output, which has no line break."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""

    def _line(self, raw: bytes) -> None:
        text = printable(raw.decode("utf-8", "replace")).rstrip()[:_LINE_CHARS]
        if not text:
            return
        if self._secret:
            text = text.replace(self._secret, "***")
        self._lines.append(text)
        if self._log_file is not None:
            self._log_file.write(text)
        self._on_line(text)


@dataclass(slots=True)
class EngineProcess:
    """A started engine. It belongs to the thread that started it, and to that thread's event loop: when the
    thread ends, the kernel ends the engine."""

    popen: subprocess.Popen[bytes]
    output: EngineOutput
    marker: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the engine's first process has exited, or its reaper was lost."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once all processes of the engine have exited."""
    pid: int | None = None
    exit_code: int | None = None
    """Negative for a signal; None while it runs, or if the exit code is unknown."""
    _pid_start: int = 0
    _follower: asyncio.Task[None] | None = None
    _pipes: tuple[asyncio.ReadTransport, ...] = ()

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Send SIGTERM and, after ``grace_s``, SIGKILL; returns when all processes have ended."""
        if not self.gone.is_set():
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.gone.wait(), grace_s)
            except TimeoutError:
                self.kill()
                await self.gone.wait()

    def kill(self) -> None:
        """Kills all processes without waiting; :attr:`gone` is set once they have exited."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)

    async def _follow(self, status: asyncio.StreamReader, output: asyncio.StreamReader) -> None:
        """Read the reaper's reports and the engine's output until both have ended."""
        reading = asyncio.create_task(self._read(output))
        while line := await status.readline():
            word, _, number = line.decode().strip().partition(" ")
            if word == "pid":
                self.pid = int(number)
                self._pid_start = reaper.start_of(self.pid)
            elif word == "exit":
                self.exit_code = int(number)
                # The last output may still be in the pipe, and the diagnosis needs it.
                await asyncio.wait({reading}, timeout=0.2)
                self.ended.set()
        loop = asyncio.get_running_loop()
        code = await loop.run_in_executor(None, self._await_reaper)
        if self.pid is not None and (code < 0 or self.exit_code is None):
            # The reaper was killed; the engine's processes may still run.
            await loop.run_in_executor(None, reaper.sweep, self.pid, self._pid_start, self.marker)
        elif self.pid is None and self.exit_code is None:
            self.exit_code = code
        await asyncio.wait({reading}, timeout=1.0)
        reading.cancel()
        for pipe in self._pipes:
            pipe.close()
        self.output.end()
        self.ended.set()
        self.gone.set()

    async def _read(self, output: asyncio.StreamReader) -> None:
        while data := await output.read(65_536):
            self.output.feed(data)

    def _await_reaper(self) -> int:
        try:
            return self.popen.wait(_REAPER_EXIT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait()
        finally:
            if self.popen.stdin is not None:
                with contextlib.suppress(OSError):
                    self.popen.stdin.close()


async def start(command: Command, output: EngineOutput, marker: str) -> EngineProcess:
    """Start ``command`` behind a reaper; raises OSError if the reaper can't be started."""
    loop = asyncio.get_running_loop()
    status_read, status_write = os.pipe()
    try:
        popen = subprocess.Popen(  # noqa: ASYNC220 - a fork takes milliseconds and must be this thread's
            [
                sys.executable,
                "-S",
                "-E",
                reaper.__file__,
                "--grace-s",
                str(GRACE_S),
                "--status-fd",
                str(status_write),
                "--parent",
                str(os.getpid()),
                "--",
                *command.argv,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **engine_environment(os.environ, command.pass_env),
                "PYTHONUNBUFFERED": "1",
                **command.env,
                reaper.MARKER: marker,
            },
            pass_fds=(status_write,),
            start_new_session=True,
        )
    except OSError:
        os.close(status_read)
        raise
    finally:
        os.close(status_write)
    assert popen.stdout is not None
    status = asyncio.StreamReader()
    from_reaper, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(status), os.fdopen(status_read, "rb", buffering=0)
    )
    engine_output = asyncio.StreamReader()
    from_engine, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(engine_output), popen.stdout
    )
    process = EngineProcess(popen=popen, output=output, marker=marker)
    process._pipes = (from_reaper, from_engine)
    process._follower = loop.create_task(process._follow(status, engine_output))
    return process


def reserve_port(host: str) -> socket.socket:
    """Reserve a free port with a bound socket that does not listen.

    While the socket is open, no other process is given the port by chance, but an engine that binds it with
    SO_REUSEADDR, as servers do, can have it. Close the socket once the engine listens.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reserved = socket.socket(family, socket.SOCK_STREAM)
    try:
        reserved.bind((host, 0))
        # Only after the bind, which must fail on a port that is in use.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError:
        reserved.close()
        raise
    return reserved
