"""Runs between a supervisor and its engine so that no engine process outlives its supervisor.

Run as ``python -S -E reaper.py [options] -- command…`` (or with ``-m
controlplane.engines.supervision.reaper``). It uses only the standard library, and starts in a few hundredths
of a second.

How each process is watched:

* The supervisor holds the write end of the reaper's standard input and never writes to it. When the
supervisor ends for any reason, SIGKILL included, the reaper reads end of file and stops the engine.
* The reaper is single-threaded and the engine's parent: if it is killed, the kernel sends SIGKILL to the
engine's first process. (PR_SET_PDEATHSIG takes effect when the forking *thread* ends, so that thread must
live as long as the process.)
* A watchdog, forked from the reaper, waits for the reaper's end. If the reaper was killed, the watchdog kills
the engine's whole process family: vLLM's core process, for example, does not notice that its parent is gone.
* The engine runs in its own session, and the reaper is a child subreaper: a process whose parent in the
engine has ended becomes the reaper's child. A process that has even left the session is found by a variable
in its environment (:data:`MARKER`).

Stopping: SIGTERM to the engine's process group and, after ``--grace-s``, SIGKILL to the whole family. SIGUSR1
skips the wait. If the engine's first process exits without a stop, the rest of its family gets SIGTERM and, a
second later, SIGKILL.

On ``--status-fd`` the reaper reports ``pid N`` once the engine has started, ``exit N`` when its first process
has ended (negative for a signal), and ``gone`` when no process of it is left. The reaper's own exit code is
the engine's, or 128 + n for signal n.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

MARKER = "TIERPLANE_ENGINE_ID"
"""Environment variable that all processes of an engine have."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINGER_S = 1.0
"""Time between SIGTERM and SIGKILL for processes that an engine left behind; they may have shared memory to
remove."""
_GIVE_UP_S = 10.0
"""A process that still exists this long after SIGKILL hangs in the kernel; nothing more can be done here."""


class ProcessFamily:
    """The living processes of one engine: those of its session, those with its marker, and their descendants;
    with ``adopts``, also every child of this process."""

    def __init__(
        self, session: int, session_start: int, marker: str, *, adopts: bool, without: int = 0
    ) -> None:
        self._adopts = adopts
        self._without = {os.getpid(), without}
        self._session = session
        self._session_start = session_start
        self._marker = f"{MARKER}={marker}".encode() if marker else b""

    def members(self) -> list[int]:
        """The ids of the engine's processes, without this process."""
        own = os.getpid()
        processes = {
            pid: stat for pid in _pids() if pid not in self._without and (stat := _stat(pid)) is not None
        }
        leader = processes.get(self._session)
        # If the id now belongs to another process, the engine's session is empty.
        reused = leader is not None and leader[3] != self._session_start
        found = {
            pid
            for pid, (state, parent, session, _) in processes.items()
            if state not in "ZX"
            and (
                (self._adopts and parent == own)
                or (session == self._session and not reused)
                or self._marked(pid)
            )
        }
        grew = True
        while grew:
            children = {
                pid for pid, stat in processes.items() if stat[1] in found and stat[0] not in "ZX"
            } - found
            found |= children
            grew = bool(children)
        return sorted(found)

    def signal(self, number: int) -> list[int]:
        """Send signal ``number`` to every member; returns their ids."""
        members = self.members()
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        return members

    def _marked(self, pid: int) -> bool:
        if not self._marker:
            return False
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self._marker in file.read().split(b"\0")
        except OSError:
            return False


def sweep(session: int, session_start: int, marker: str) -> list[int]:
    """Kill an engine's process family after its reaper was killed; returns the ids of the killed processes.

    The caller must not have the marker in its own environment.
    """
    family = ProcessFamily(session, session_start, marker, adopts=False)
    killed: set[int] = set()
    deadline_s = time.monotonic() + _GIVE_UP_S
    while True:
        members = family.signal(signal.SIGKILL)
        killed |= set(members)
        if not members or time.monotonic() > deadline_s:
            return sorted(killed)
        time.sleep(0.02)


def start_of(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if there is none. Together with the id it
    identifies a process uniquely, although ids are reused."""
    stat = _stat(pid)
    return stat[3] if stat else 0


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> tuple[str, int, int, int] | None:
    """State, parent, session and start time; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may contain anything, so fields are counted after the last parenthesis.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20:
        return None
    return fields[0].decode(), int(fields[1]), int(fields[3]), int(fields[19])


class Reaper:
    """Runs one engine from its start until the last of its processes has ended."""

    def __init__(self, command: list[str], grace_s: float, status_fd: int | None, parent: int) -> None:
        self._command = command
        self._grace_s = grace_s
        self._status_fd = status_fd
        self._parent = parent
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl
        self._exit_code: int | None = None
        self._now = False

    def run(self) -> int:
        """Start the engine, watch it and the supervisor, clean up; returns the exit code."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._set(_PR_SET_CHILD_SUBREAPER, 1)
        self._set(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if self._parent and os.getppid() != self._parent:
            return 0  # The supervisor died before it could be watched; nothing has been started.
        engine = self._start()
        started = start_of(engine)
        marker = os.environ.get(MARKER, "")
        watchdog, leash = self._start_watchdog(engine, started, marker)
        family = ProcessFamily(engine, started, marker, adopts=True, without=watchdog)
        self._report(f"pid {engine}")
        self._watch(engine, family, wake_read)
        self._end(family, wake_read)
        os.write(leash, b".")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(watchdog, 0)
        self._report("gone")
        code = self._exit_code or 0
        return code if code >= 0 else 128 - code

    def _set(self, option: int, value: int) -> None:
        if self._prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")

    def _start(self) -> int:
        own = os.getpid()
        # Otherwise both processes would write the buffered output.
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            self._set(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != own:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            for number in (*range(1, 32), signal.SIGRTMIN):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.closerange(3, 1024)
            os.execvp(self._command[0], self._command)  # noqa: S606 - a list, no shell
        except OSError as error:
            os.write(2, f"reaper: can't start {self._command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def _start_watchdog(self, engine: int, started: int, marker: str) -> tuple[int, int]:
        """Fork the watchdog; returns its id and the pipe on which a byte makes it end without killing."""
        leash_read, leash_write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(leash_read)
            return pid, leash_write
        try:
            # So as not to receive the signals of the reaper, its process group or its terminal.
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            # So as not to hold open the pipes whose closing shows the supervisor that the reaper is gone.
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nothing, fd)
            os.dup2(leash_read, 3)
            os.closerange(4, 1024)
            if not os.read(3, 1):
                sweep(engine, started, marker)
        finally:
            os._exit(0)

    def _watch(self, engine: int, family: ProcessFamily, wake_read: int) -> None:
        """Wait until the engine's first process has ended; stop it when requested."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        deadline_s: float | None = None
        killed = False
        while not self._reap(engine):
            timeout_ms: float | None = None
            if deadline_s is not None:
                timeout_ms = max(0.0, deadline_s - time.monotonic()) * 1000 + 1
            stop_requested = False
            for fd, _ in poll.poll(timeout_ms):
                if fd == 0:
                    # End of file. Data would also mean a fault, because the supervisor never writes.
                    stop_requested = True
                    poll.unregister(0)
                else:
                    stop_requested |= self._read_signals(wake_read)
            if stop_requested and deadline_s is None:
                deadline_s = time.monotonic() + self._grace_s
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(engine, signal.SIGTERM)
            late = deadline_s is not None and time.monotonic() >= deadline_s
            if (late or self._now) and not killed:
                killed = True
                deadline_s = None
                self._grace_s = _GIVE_UP_S
                family.signal(signal.SIGKILL)

    def _read_signals(self, wake_read: int) -> bool:
        """Process the signals that have arrived; returns whether one of them requests a stop."""
        try:
            numbers = os.read(wake_read, 4096)
        except BlockingIOError:
            return False
        self._now |= signal.SIGUSR1 in numbers
        return any(number in numbers for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))

    def _reap(self, engine: int) -> bool:
        """Collect ended children; returns whether the engine's first process has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return self._exit_code is not None
            if pid == 0:
                return self._exit_code is not None
            if pid == engine:
                self._exit_code = os.waitstatus_to_exitcode(status)
                self._report(f"exit {self._exit_code}")

    def _end(self, family: ProcessFamily, wake_read: int) -> None:
        """Stops the processes that the engine left behind, and waits until they have exited."""
        started_s = time.monotonic()
        family.signal(signal.SIGTERM)
        wait_s = 0.005
        while True:
            self._reap(0)
            self._read_signals(wake_read)
            elapsed_s = time.monotonic() - started_s
            if not family.members() or elapsed_s > _GIVE_UP_S:
                return
            if elapsed_s > _LINGER_S or self._now:
                family.signal(signal.SIGKILL)
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, 0.1)

    def _report(self, line: str) -> None:
        if self._status_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._status_fd, f"{line}\n".encode())


def main(argv: list[str]) -> int:
    """The command line. Parsed by hand because importing argparse takes as long as everything else."""
    options = {"--grace-s": "8", "--status-fd": "", "--parent": "0"}
    words = argv[1:]
    while words and words[0] != "--":
        if words[0] not in options or len(words) < 2:
            sys.stderr.write("usage: reaper.py [--grace-s S] [--status-fd N] [--parent PID] -- command…\n")
            return 2
        options[words[0]] = words[1]
        words = words[2:]
    command = words[1:]
    if not command:
        sys.stderr.write("reaper: no command after --\n")
        return 2
    status_fd = int(options["--status-fd"]) if options["--status-fd"] else None
    if status_fd is not None:
        os.set_inheritable(status_fd, False)
    return Reaper(command, float(options["--grace-s"]), status_fd, int(options["--parent"])).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
