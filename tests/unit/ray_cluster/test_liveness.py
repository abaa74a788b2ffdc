"""Whether Ray's processes answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from controlplane.errors import SetupError
from controlplane.ray_cluster import plane, session
from controlplane.ray_cluster.liveness import answers, hung
from tests.support.run_record import run_record

SERVER = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    client, _ = server.accept()
    if sys.argv[2] == "answers":
        client.recv(9)
        client.sendall(bytes(9))
"""
"""A process with a name of Ray's that accepts connections; a gRPC server sends settings at once."""


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for each in started:
        each.kill()
        each.communicate()


def start(process: list[subprocess.Popen[str]], name: str, how: str) -> tuple[psutil.Process, int]:
    env = {**os.environ, session.PLANE_ID_VARIABLE: "p-hung"}
    command = [sys.executable, "-c", SERVER, name, how]
    process.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
    assert process[-1].stdout is not None
    return psutil.Process(process[-1].pid), int(process[-1].stdout.readline())


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_stopped_process_hangs_although_the_kernel_accepts_connections(
    name: str, process: list[subprocess.Popen[str]]
) -> None:
    running, port = start(process, name, "answers")
    assert answers([("127.0.0.1", port)])
    assert hung([running]) == ""
    running.send_signal(signal.SIGSTOP)
    assert not answers([("127.0.0.1", port)], 0.2)
    assert hung([running]) == f"Ray's {name} (process {running.pid}) is stopped"


def test_a_process_that_accepts_and_says_nothing_hangs(process: list[subprocess.Popen[str]]) -> None:
    silent, _ = start(process, "raylet", "silent")
    other, _ = start(process, "python", "silent")
    assert hung([other, silent], 0.2) == f"Ray's raylet (process {silent.pid}) does not answer"
    assert hung([other], 0.2) == ""


def test_one_address_that_answers_is_enough(process: list[subprocess.Popen[str]]) -> None:
    _, silent = start(process, "raylet", "silent")
    _, port = start(process, "raylet", "answers")
    assert answers([("127.0.0.1", silent), ("127.0.0.1", port)])


def test_no_command_connects_to_a_ray_that_hangs(
    process: list[subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))
    _, port = start(process, "gcs_server", "answers")
    raylet, _ = start(process, "raylet", "answers")
    record = run_record("p-hung", ray_address=f"127.0.0.1:{port}")
    record.save()
    raylet.send_signal(signal.SIGSTOP)
    with pytest.raises(
        SetupError, match=rf"Ray's raylet \(process {raylet.pid}\) is stopped: `tierplane down`"
    ):
        plane.connect(record.ray_address)
