from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from controlplane.engines.supervision import reaper
from tests.support.engines import alive
from tests.support.waiting import until

OBEDIENT = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + OBEDIENT
# A daemon as they are made: forked twice, a session of its own; its parents are gone.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if 'bare' in sys.argv:
            os.execve(sys.executable, [sys.executable, '-c', sys.argv[1]], {})
        os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])
    os._exit(0)
os.wait()
time.sleep(60 if 'stay' in sys.argv else 0.2)
"""
# A child that does not notice its parent's death, and whose environment is not to be read.
FORKER = """
import os, sys, time
if os.fork() == 0:
    os.execve(sys.executable, [sys.executable, '-c', sys.argv[1]], {})
time.sleep(60)
"""
NAPPING = """
import os, time
with open(os.environ.get('PIDS') or '{pids}', 'a') as file:
    print(os.getpid(), file=file)
time.sleep(60)
"""


class Run:
    """A reaper under test, with its pipes."""

    def __init__(self, *argv: str, grace_s: float = 5.0, env: dict[str, str] | None = None) -> None:
        read, write = os.pipe()
        self.status = os.fdopen(read, "r")
        self.popen = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-E",
                reaper.__file__,
                "--grace-s",
                str(grace_s),
                "--status-fd",
                str(write),
                "--parent",
                str(os.getpid()),
                "--",
                *argv,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            env={**os.environ, reaper.MARKER: f"test/{os.getpid()}/{id(self)}", **(env or {})},
            start_new_session=True,
        )
        os.close(write)
        self.reports: list[str] = []

    def pid(self) -> int:
        return int(self.next("pid"))

    def next(self, word: str) -> str:
        line = self.status.readline().strip()
        assert line.startswith(word), (line, self.reports)
        self.reports.append(line)
        return line.removeprefix(word).strip()

    def up(self) -> None:
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline() == b"up\n"

    def read(self) -> bytes:
        assert self.popen.stdout is not None
        return self.popen.stdout.read()

    def close_stdin(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def code(self) -> int:
        return self.popen.wait(20)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGUSR1)
            self.popen.wait(20)
        for pipe in (self.popen.stdin, self.popen.stdout, self.status):
            assert pipe is not None
            pipe.close()


class Reaped(Protocol):
    """Starts reapers that are closed after the test."""

    def __call__(self, *argv: str, grace_s: float = ..., env: dict[str, str] | None = ...) -> Run: ...


@pytest.fixture
def reaped() -> Iterator[Reaped]:
    runs: list[Run] = []

    def make(*argv: str, **options: Any) -> Run:
        runs.append(Run(*argv, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def pids_in(path: Path, count: int = 1) -> list[int]:
    return until(
        lambda: (
            [int(line) for line in path.read_text().split()]
            if path.exists() and len(path.read_text().split()) >= count
            else None
        )
    )


@pytest.mark.parametrize(
    ("script", "report", "code"),
    [("exit 0", "0", 0), ("exit 7", "7", 7), ("kill -9 $$", "-9", 137), ("kill -TERM $$", "-15", 143)],
)
def test_the_engines_exit_code_is_reported_and_returned(
    reaped: Reaped, script: str, report: str, code: int
) -> None:
    run = reaped("sh", "-c", script)
    run.next("pid")
    assert run.next("exit") == report
    run.next("gone")
    assert run.code() == code


def test_a_command_that_is_not_there(reaped: Reaped) -> None:
    run = reaped("/no/such/engine")
    run.next("pid")
    assert run.next("exit") == "127"
    assert b"can't start /no/such/engine: No such file" in run.read()


def test_end_of_file_stops_the_engine(reaped: Reaped) -> None:
    run = reaped(sys.executable, "-c", OBEDIENT)
    pid = run.pid()
    run.up()
    run.close_stdin()
    assert run.next("exit") == "-15"
    run.next("gone")
    assert run.code() == 143
    assert not alive(pid)


def test_sigterm_stops_the_engine_and_a_stubborn_one_is_killed_after_the_grace(reaped: Reaped) -> None:
    run = reaped(sys.executable, "-c", STUBBORN, grace_s=0.5)
    run.pid()
    run.up()
    began_s = time.monotonic()
    run.popen.terminate()
    assert run.next("exit") == "-9"
    assert 0.4 < time.monotonic() - began_s < 5


def test_sigusr1_kills_at_once(reaped: Reaped) -> None:
    run = reaped(sys.executable, "-c", STUBBORN, grace_s=60)
    run.pid()
    run.up()
    began_s = time.monotonic()
    run.popen.send_signal(signal.SIGUSR1)
    assert run.next("exit") == "-9"
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("bare", [[], ["bare"]], ids=["marked", "without an environment"])
def test_a_daemon_dies_with_the_engine_that_made_it(reaped: Reaped, tmp_path: Path, bare: list[str]) -> None:
    pids = tmp_path / "pids"
    nap = NAPPING.replace("{pids}", str(pids))
    run = reaped(sys.executable, "-c", DAEMON, nap, *bare, env={"PIDS": str(pids)})
    run.next("pid")
    (daemon,) = pids_in(pids)
    assert alive(daemon)
    assert run.next("exit") == "0"
    run.next("gone")
    assert not alive(daemon)


def test_a_daemon_that_ignores_sigterm_dies_too(reaped: Reaped, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    nap = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + NAPPING
    run = reaped(sys.executable, "-c", DAEMON, nap, "stay", env={"PIDS": str(pids)}, grace_s=1.0)
    run.next("pid")
    (daemon,) = pids_in(pids)
    run.close_stdin()
    run.next("exit")
    run.next("gone")
    assert not alive(daemon)


SUPERVISOR = """
import os, subprocess, sys, time
reaper, command = sys.argv[1], sys.argv[2:]
argv = [sys.executable, '-S', '-E', reaper, '--grace-s', '2', '--parent', str(os.getpid()), '--', *command]
popen = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
print(popen.pid, flush=True)
time.sleep(60)
"""


def supervisor_of(*command: str, env: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """A process that supervises ``command`` through a reaper, and the reaper's id."""
    popen = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, reaper.__file__, *command],
        stdout=subprocess.PIPE,
        env={**os.environ, reaper.MARKER: f"test/{os.getpid()}/killed", **env},
    )
    assert popen.stdout is not None
    return popen, int(popen.stdout.readline())


def test_sigkill_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + NAPPING
    supervisor, its_reaper = supervisor_of(
        sys.executable, "-c", DAEMON, stubborn, "stay", env={"PIDS": str(pids)}
    )
    (daemon,) = pids_in(pids)
    engine = int(until(lambda: children_of(its_reaper)[:1])[0])
    supervisor.kill()
    supervisor.communicate()
    until(lambda: not any(map(alive, (daemon, engine, its_reaper))), what="the family ends")


@pytest.mark.parametrize("bare", [[], ["bare"]], ids=["marked", "without an environment"])
def test_sigkill_of_supervisor_and_reaper_at_once_leaves_nothing(tmp_path: Path, bare: list[str]) -> None:
    pids = tmp_path / "pids"
    nap = NAPPING.replace("{pids}", str(pids))
    program = FORKER if bare else DAEMON
    supervisor, its_reaper = supervisor_of(
        sys.executable, "-c", program, nap, "stay", *bare, env={"PIDS": str(pids)}
    )
    (child,) = pids_in(pids)
    engine = until(lambda: [p for p in children_of(its_reaper) if os.getsid(p) == p])
    os.kill(its_reaper, signal.SIGSTOP)
    supervisor.kill()
    os.kill(its_reaper, signal.SIGKILL)
    supervisor.communicate()
    until(lambda: not any(map(alive, (child, *engine))), what="the family ends")


def test_the_watchdog_leaves_with_the_reaper(reaped: Reaped) -> None:
    run = reaped("sh", "-c", "sleep 0.3")
    engine = run.pid()
    watchdog = until(lambda: [pid for pid in children_of(run.popen.pid) if pid != engine])
    run.next("exit")
    run.next("gone")
    assert run.code() == 0
    assert not any(map(alive, watchdog))


def test_after_sigkill_of_reaper_and_watchdog_a_sweep_finds_the_rest_and_nothing_else(
    reaped: Reaped, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    run = reaped(sys.executable, "-c", DAEMON, NAPPING, "stay", env={"PIDS": str(pids)})
    pid = run.pid()
    started = reaper.start_of(pid)
    (daemon,) = pids_in(pids)
    marker = next(
        item.split(b"=", 1)[1].decode()
        for item in Path(f"/proc/{daemon}/environ").read_bytes().split(b"\0")
        if item.startswith(reaper.MARKER.encode())
    )
    bystander = subprocess.Popen([sys.executable, "-c", OBEDIENT], stdout=subprocess.PIPE)
    try:
        for watchdog in set(children_of(run.popen.pid)) - {pid, daemon}:
            os.kill(watchdog, signal.SIGKILL)
        run.popen.kill()
        run.popen.wait(10)
        until(lambda: not alive(pid), what="the kernel ends the first process")
        assert alive(daemon)
        assert daemon in reaper.sweep(pid, started, marker)
        assert not alive(daemon)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.communicate()


def test_a_reused_session_id_is_not_the_engines(reaped: Reaped) -> None:
    run = reaped(sys.executable, "-c", OBEDIENT)
    pid = run.pid()
    run.up()
    assert reaper.ProcessFamily(pid, reaper.start_of(pid), "", adopts=False).members() == [pid]
    assert reaper.ProcessFamily(pid, reaper.start_of(pid) - 1, "", adopts=False).members() == []


def test_a_reaper_whose_supervisor_is_gone_starts_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    done = subprocess.run(
        [sys.executable, reaper.__file__, "--parent", "1", "--", sys.executable, "-c", NAPPING],
        env={**os.environ, "PIDS": str(pids)},
        stdin=subprocess.DEVNULL,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0
    assert not pids.exists()


@pytest.mark.parametrize("argv", [["--bogus", "1", "--", "true"], ["--grace-s", "1"], []])
def test_bad_command_lines(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, reaper.__file__, *argv], capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 2


def children_of(pid: int) -> list[int]:
    return [child for child in reaper._pids() if (stat := reaper._stat(child)) and stat[1] == pid]
