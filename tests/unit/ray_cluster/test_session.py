import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controlplane.errors import SetupError
from controlplane.ray_cluster import session
from controlplane.ray_cluster.ports import Ports, PortTaken, ephemeral_range
from controlplane.ray_cluster.session import PLANE_ID_VARIABLE, RunRecord
from tests.support.run_record import run_record

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(autouse=True)
def _run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path))


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts Python with a program and a plane's id; all are stopped after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str, plane_id: str | None) -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if key != PLANE_ID_VARIABLE}
        if plane_id:
            env[PLANE_ID_VARIABLE] = plane_id
        process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


WAIT = "print('up', flush=True); import time; time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAIT
PARENT = (
    "import subprocess, sys, os\n"
    "os.environ.pop('TIERPLANE_PLANE_ID')\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n" + WAIT
)


def test_a_record_is_loaded_as_it_was_saved() -> None:
    assert session.load_record() is None
    saved = run_record("p1")
    saved.save()
    assert session.load_record() == saved


@pytest.mark.parametrize("plane_id", ["", "a b", "../x", 3, "x" * 65])
def test_a_record_with_an_id_that_is_none_of_ours_stops_nothing(plane_id: object) -> None:
    run_record("p1").save()
    values = json.loads(session.record_path().read_text())
    session.record_path().write_text(json.dumps({**values, "plane_id": plane_id}))
    with pytest.raises(SetupError, match=r"up\.json can't be read"):
        session.load_record()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plane_id": "x"}', '{"applications": []}'])
def test_a_broken_record_is_an_error_that_names_the_file(text: str) -> None:
    session.record_path().write_text(text)
    with pytest.raises(SetupError, match=r"up\.json can't be read"):
        session.load_record()


def test_a_new_process_with_the_same_pid_is_not_taken_for_up() -> None:
    assert run_record("p1").up_is_running()
    assert not run_record("p1", up_created_unix_s=1.0).up_is_running()
    assert not run_record("p1", up_pid=2**22 + 1).up_is_running()


def test_processes_are_found_by_the_id_of_their_plane(spawn: Spawn) -> None:
    ours, other, none = spawn(WAIT, "p1"), spawn(WAIT, "p2"), spawn(WAIT, None)
    assert [process.pid for process in session.processes("p1")] == [ours.pid]
    assert {other.pid, none.pid}.isdisjoint(process.pid for process in session.processes("p1"))


def test_a_child_that_hides_its_environment_is_found_too(spawn: Spawn) -> None:
    parent = spawn(PARENT, "p1")
    found = {process.pid for process in session.processes("p1")}
    assert parent.pid in found
    assert len(found) == 2
    session.stop(run_record("p1"), grace_s=1.0)


def test_stop_ends_only_our_processes_even_if_they_ignore_sigterm(spawn: Spawn, tmp_path: Path) -> None:
    ours, stubborn, other = spawn(WAIT, "p1"), spawn(STUBBORN, "p1"), spawn(WAIT, "p2")
    temp_dir = tmp_path / "ray-temp"
    logs = temp_dir / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("bye\n")
    (temp_dir / "tierplane-plane-id").write_text("p1")
    assert session.stop(run_record("p1", temp_dir=str(temp_dir)), grace_s=0.5) == 2
    ours.wait(5)
    stubborn.wait(5)
    assert other.poll() is None
    assert not temp_dir.exists()
    assert (tmp_path / "ray-logs" / "raylet.out").read_text() == "bye\n"


@pytest.mark.parametrize("mark", [None, "p2", ""])
def test_stop_removes_no_folder_but_its_own(mark: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "somebody's"
    (folder / "ray" / "session_latest" / "logs").mkdir(parents=True)
    if mark is not None:
        (folder / "tierplane-plane-id").write_text(mark)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for path in (folder, link):
        session.stop(run_record("p1", temp_dir=str(path)))
        session.clear(run_record("p1", temp_dir=str(path)))
    (folder / "tierplane-plane-id").write_text("p1")
    session.stop(run_record("p1", temp_dir=str(link)))
    assert (folder / "ray" / "session_latest" / "logs").is_dir()
    assert not (tmp_path / "ray-logs").exists()


def test_a_full_disk_does_not_keep_a_plane_from_being_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp_dir = Path(session.prepare(run_record("p1")).temp_dir)
    (temp_dir / "ray" / "session_latest" / "logs").mkdir(parents=True)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    session.stop(run_record("p1", temp_dir=str(temp_dir)))
    assert not temp_dir.exists()


def test_stopping_twice_is_harmless() -> None:
    assert session.stop(run_record("p1")) == 0


def test_the_memory_of_processes_is_summed(spawn: Spawn) -> None:
    spawn(WAIT, "p1")
    assert session.memory_bytes(session.processes("p1")) > 2**20


RAY = """
import os, sys
from pathlib import Path
arguments = dict(zip(sys.argv[5::2], sys.argv[6::2]))
folder = Path(os.environ["RAY_TMPDIR"]) / "ray"
folder.mkdir()
(folder / "ray_current_cluster").write_text("127.0.0.1:" + arguments["--port"])
"""
"""Stands in for ``ray start --head``: writes the address and ends."""
FAILING = """
import sys
print("Failed to bind to 127.0.0.1:" + sys.argv[6] + " because it's already occupied.")
sys.exit(1)
"""


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[list[str]]]:
    """Replaces ``ray start`` by a program and returns a list of its command lines."""
    real = subprocess.run

    def replace_by(program: str) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            done: subprocess.CompletedProcess[str] = real([command[0], "-c", program, *command[1:]], **kwargs)
            return done

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return replace_by


@pytest.fixture
def prepared() -> Iterator[RunRecord]:
    made = session.prepare(run_record("no-such-plane"))
    yield made
    shutil.rmtree(made.temp_dir)


def test_ray_gets_ports_that_are_reserved_until_it_has_them(
    fake_ray: Callable[[str], list[list[str]]], prepared: RunRecord
) -> None:
    calls = fake_ray(RAY)
    with Ports() as ports:
        started = session.start(prepared, ports, dashboard=False)
        port = int(calls[0][calls[0].index("--port") + 1])
        assert started.ray_address == f"127.0.0.1:{port}"
        assert port not in ephemeral_range()
        with Ports() as others:
            assert others.choose("another plane's", preferred=port) != port


def test_a_ray_that_starts_without_one_of_its_ports_counts_as_failed(
    fake_ray: Callable[[str], list[list[str]]], prepared: RunRecord, spawn: Spawn
) -> None:
    fake_ray(RAY)
    with Ports() as ports:
        port = ports.choose("Ray client")
        server = f"import socket; s = socket.create_server(('', {port})); " + WAIT
        holder = spawn(server, None)
        with pytest.raises(PortTaken, match=rf"port {port} \(Ray client\) .* \(process {holder.pid}\)"):
            session.start(prepared, ports, dashboard=False)
        ours = spawn(server.replace(str(port), str(ports.choose("HAProxy's statistics"))), "no-such-plane")
        holder.kill()
        holder.wait()
        session.check_ports(prepared, ports)
        assert ours.poll() is None


def test_a_port_that_ray_can_not_bind_is_named(
    fake_ray: Callable[[str], list[list[str]]], prepared: RunRecord
) -> None:
    fake_ray(FAILING)
    with Ports() as ports, pytest.raises(PortTaken, match=r"port \d+ \(Ray's GCS\) was taken"):
        session.start(prepared, ports, dashboard=False)


def test_a_ray_that_fails_is_no_traceback(
    fake_ray: Callable[[str], list[list[str]]], prepared: RunRecord
) -> None:
    fake_ray("raise OSError(28, 'No space left on device')")
    with Ports() as ports, pytest.raises(SetupError) as error:
        session.start(prepared, ports, dashboard=False)
    assert "OSError: [Errno 28] No space left on device\nFree space in /tmp" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_ray_starts_again_in_a_cleared_folder_with_the_same_token(
    fake_ray: Callable[[str], list[list[str]]], prepared: RunRecord, spawn: Spawn
) -> None:
    fake_ray(RAY)
    temp_dir = Path(prepared.temp_dir)
    token = (temp_dir / "auth_token").read_text()
    with Ports() as ports:
        started = session.start(prepared, ports, dashboard=True)
    ours = spawn(WAIT, "no-such-plane")
    cleared = session.clear(started)
    ours.wait(5)
    assert sorted(path.name for path in temp_dir.iterdir()) == ["auth_token", "tierplane-plane-id"]
    assert (cleared.ray_address, cleared.dashboard_url) == ("", "")
    assert session.load_record() == cleared
    with Ports() as ports:
        again = session.start(cleared, ports, dashboard=True)
    assert again.ray_address not in {"", started.ray_address}
    assert (temp_dir / "auth_token").read_text() == token
