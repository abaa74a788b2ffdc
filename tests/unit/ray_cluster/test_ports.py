"""Ports for servers that start later: which are chosen, and how a lost port is reported."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from controlplane.errors import SetupError
from controlplane.ray_cluster import ports
from controlplane.ray_cluster.ports import Ports, PortTaken

CHOOSER = """
import sys
from controlplane.ray_cluster.ports import Ports
chosen = Ports()
sys.stdin.readline()
print(*(chosen.choose("a test") for _ in range(200)), flush=True)
sys.stdin.readline()
"""
SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("up", flush=True)
sys.stdin.readline()
"""
Limit = Callable[..., None]


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Sets the kernel's settings of ports."""
    monkeypatch.setattr(ports, "_KERNEL", tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name).write_text(text)

    return write


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Makes only the given ports eligible."""

    def allow(*allowed: int) -> None:
        monkeypatch.setattr(ports, "eligible_ports", lambda: list(allowed))

    return allow


@contextmanager
def program(
    text: str, *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A Python process with a program that ends when its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        yield process
    finally:
        process.communicate(timeout=20)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_port_is_outside_the_ephemeral_range_and_that_of_replicas() -> None:
    with Ports() as chosen:
        found = {chosen.choose("a test") for _ in range(300)}
    assert len(found) == 300
    ephemeral = ports.ephemeral_range()
    assert len(ephemeral) > 1000
    assert found.isdisjoint(ephemeral)
    assert found.isdisjoint(ports.SERVE_REPLICA_PORTS)
    assert min(found) >= ports.FIRST_PORT
    assert max(found) < 65_536


def test_the_kernels_settings_are_respected(kernel: Limit) -> None:
    kernel(ip_local_port_range="20010\t65535\n", ip_local_reserved_ports="20001,20003-20005,8080\n")
    assert ports.eligible_ports() == [20_000, 20_002, *range(20_006, 20_010)]


@pytest.mark.parametrize("files", [{}, {"ip_local_port_range": "?", "ip_local_reserved_ports": "a-b"}])
def test_without_kernel_settings_the_defaults_of_linux_apply(kernel: Limit, files: dict[str, str]) -> None:
    kernel(**files)
    eligible = ports.eligible_ports()
    assert eligible[0] == ports.FIRST_PORT
    assert set(eligible).isdisjoint(range(32_768, 61_000))


def test_a_machine_whose_ports_are_all_ephemeral_still_has_some(kernel: Limit) -> None:
    kernel(ip_local_port_range="1024 65535", ip_local_reserved_ports="\n")
    assert len(ports.eligible_ports()) == 65_536 - ports.FIRST_PORT - len(ports.SERVE_REPLICA_PORTS)


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
@pytest.mark.parametrize("listens", [True, False])
def test_a_port_in_use_is_never_chosen(limit: Limit, host: str, *, listens: bool) -> None:
    used, free = ports.free_port(), ports.free_port()
    ports._of_this_process.release()
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, used))
        if listens:
            server.listen()
        limit(used, free)
        for _ in range(20):
            with Ports() as chosen:
                assert chosen.choose("a test", preferred=used) == free
        limit(used)
        with Ports() as chosen, pytest.raises(SetupError, match=r"no port from .* is free for a test"):
            chosen.choose("a test")


def test_a_port_is_chosen_once_until_it_is_released(limit: Limit) -> None:
    port = ports.free_port()
    ports._of_this_process.release()
    limit(port)
    with Ports() as first:
        assert first.choose("a test", preferred=port) == port
        with Ports() as second, pytest.raises(SetupError):
            second.choose("a test", preferred=port)
    with Ports() as third:
        assert third.choose("a test") == port


def test_a_preferred_port_is_chosen_if_it_is_free(limit: Limit) -> None:
    first, second = ports.free_port(), ports.free_port()
    ports._of_this_process.release()
    limit(first)
    with Ports() as chosen, Ports() as others:
        assert chosen.choose("a dashboard", preferred=second) == second
        assert others.choose("a dashboard", preferred=second) == first


def test_processes_that_choose_at_once_never_choose_the_same() -> None:
    with program(CHOOSER) as one, program(CHOOSER) as two, program(CHOOSER) as three:
        choosers = (one, two, three)
        for each in choosers:
            go(each)
        chosen = [port for each in choosers for port in line(each).split()]
    assert len(chosen) == 600
    assert len(set(chosen)) == 600


def test_a_process_that_dies_leaves_no_reservation(limit: Limit) -> None:
    text = "from controlplane.ray_cluster.ports import free_port\nprint(free_port(), flush=True)\ninput()"
    with program(text) as other:
        limit(port := int(line(other)))
        with Ports() as chosen, pytest.raises(SetupError):
            chosen.choose("a test")
        other.kill()
    with Ports() as chosen:
        assert chosen.choose("a test") == port


def test_a_taken_port_is_reported_with_its_holder_but_not_the_holders_arguments() -> None:
    with Ports() as chosen:
        lost, free = chosen.choose("a server"), chosen.choose("another server")
        assert chosen.taken(set) == ""
        with program(SERVER, str(lost), "--password=s3cret") as holder:
            assert line(holder) == "up\n"
            report = chosen.taken(set)
            assert re.fullmatch(
                rf"port {lost} \(a server\) is taken by python\S* \(process {holder.pid}\)", report
            )
            assert chosen.taken(lambda: {holder.pid}) == ""
            with program(SERVER, str(free)) as second:
                assert line(second) == "up\n"
                assert chosen.taken(set).count("is taken by") == 2
        assert chosen.taken(set) == ""


def test_a_port_that_could_not_be_bound_counts_as_taken_even_if_its_holder_has_ended() -> None:
    with Ports() as chosen:
        port = chosen.choose("HAProxy's statistics")
        output = f"[ALERT] (7) : cannot bind socket (Address already in use) for [0.0.0.0:{port}]"
        expected = f"port {port} (HAProxy's statistics) was taken by a process that has ended"
        assert chosen.taken(set, output) == expected
        assert chosen.taken(set, f"connected to 127.0.0.1:{port}") == ""


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("cannot bind socket (Address already in use) for [0.0.0.0:44101]", {44_101}),
        ("cannot bind socket (Address already in use) for [:::44101]\nit is 12:30", {44_101}),
        ("Failed to bind to 127.0.0.1:8265 because it's already occupied.", {8265}),
        ("error while attempting to bind on address ('127.0.0.1', 8404): address already in use", {8404}),
        ("Starting at 127.0.0.1:6379", set()),
        ("", set()),
    ],
)
def test_ports_that_could_not_be_bound_are_found(output: str, found: set[int]) -> None:
    assert ports.bind_failures(output) == found


def test_holders_are_described_even_if_nothing_is_known_about_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ports.port_holder(ports.free_port()) == "a process that can't be seen from here"
    assert ports.process_name(None) == "a process of another user"
    assert ports.process_name(2**22 + 1) == f"process {2**22 + 1}"
    assert ports.process_name(os.getpid()).endswith(f"(process {os.getpid()})")


def test_a_lost_port_is_a_setup_error() -> None:
    assert issubclass(PortTaken, SetupError)


def test_whether_a_port_is_free() -> None:
    port = ports.free_port()
    assert ports.port_is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not ports.port_is_free(port)
