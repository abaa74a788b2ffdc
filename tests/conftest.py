"""What all tests share: free ports, folders of their own, and a check that no process is left at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from controlplane.ray_cluster import ports

SESSION_VARIABLE = "TIERPLANE_TEST_SESSION"
GRACE_S = 10.0
"""How long processes may take to end after the last test."""

_session = uuid.uuid4().hex


def pytest_configure() -> None:
    """Properties are not about time, and a busy machine must not fail them. Mark this session's processes,
    and keep the tests away from a plane that runs on this machine."""
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    os.environ[SESSION_VARIABLE] = _session
    # Process titles are written over the environment otherwise, and the mark with it.
    os.environ["SPT_NOENV"] = "1"
    # In /tmp and short: Ray and HAProxy put sockets below it, whose paths may be 107 bytes long.
    os.environ["TIERPLANE_RUN_DIR"] = tempfile.mkdtemp(prefix="tp-test-", dir="/tmp")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if one of its processes is still there."""
    left = wait_for_none(GRACE_S)
    if left:
        lines = [describe(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\n{len(left)} processes were left by the tests (now killed):", *lines, sep="\n  ")
    shutil.rmtree(os.environ["TIERPLANE_RUN_DIR"], ignore_errors=True)


def session_processes() -> list[psutil.Process]:
    """Processes that this session's tests started, however they were detached, and that still run."""
    mark = f"{SESSION_VARIABLE}={_session}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
            if (
                mark in environ.split(b"\0")
                and process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                # It ends with this process and not before.
                and not any("multiprocessing.resource_tracker" in arg for arg in process.cmdline())
            ):
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def wait_for_none(timeout_s: float) -> list[psutil.Process]:
    """What is left of this session's processes after at most ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while (left := session_processes()) and time.monotonic() < deadline_s:
        psutil.wait_procs(left, timeout=0.2)
    return left


def describe(process: psutil.Process) -> str:
    """A process for people."""
    try:
        return f"{process.pid} (parent {process.ppid()}): {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid}: gone"


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a port that is free, another one each time."""
    return ports.free_port


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty run folder for one test."""
    path = Path(tempfile.mkdtemp(prefix="tp-run-", dir="/tmp"))
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(path))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TIERPLANE_CACHE_DIR", str(path))
    return path
