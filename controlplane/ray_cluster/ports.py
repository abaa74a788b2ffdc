"""Ports that this process chooses and that another process binds later: HAProxy, Ray, a server of a test.

The kernel hands out ports of its ephemeral range at any time, to whoever connects or binds port 0, Ray's own
processes included. So ports are chosen outside that range, and each one is reserved against other processes
that choose with this module: by a Unix socket in Linux's abstract namespace. It needs no file, is valid where
the ports are (in the network namespace, for all users), and the kernel removes it when its process ends. A
bound TCP socket would also stop servers that don't set SO_REUSEADDR.

A server with a fixed port can still take one of them: :meth:`Ports.taken` says so, and the start is repeated
with other ports.
"""

from __future__ import annotations

import atexit
import random
import re
import socket
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType

import psutil

from controlplane.errors import SetupError

FIRST_PORT = 20_000
"""Below it are well-known servers, and the workers of a Ray with default settings (10002 to 19999)."""
SERVE_REPLICA_PORTS = range(30_000, 31_001)
"""Serve gives them to its replicas, and tries the next one if one is taken."""

_KERNEL = Path("/proc/sys/net/ipv4")
_LINUX_DEFAULT = range(32_768, 61_000)
_BIND_FAILURE = re.compile(r"bind[^\n]*?(?::|', )(\d{1,5})\b")
"""As in "cannot bind socket (Address already in use) for [0.0.0.0:80]" and "bind on address ('::', 80)"."""


class PortTaken(SetupError):
    """Another process took a chosen port before the program that it was for: other ports may do."""


class Ports:
    """Chosen ports, reserved until :meth:`release`; a context manager that releases them."""

    def __init__(self) -> None:
        self._purposes: dict[int, str] = {}
        self._reservations: list[socket.socket] = []

    def __enter__(self) -> Ports:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def choose(self, purpose: str, preferred: int = 0) -> int:
        """A port that nobody has bound and nobody else has chosen; ``preferred`` if that is so of it.

        ``purpose`` names the port in messages. Raises SetupError if there is none.
        """
        candidates = eligible_ports()
        start = random.randrange(len(candidates))
        for port in (*([preferred] if preferred else []), *candidates[start:], *candidates[:start]):
            # Reserved before it is probed: a probe could disturb whoever is about to bind it.
            reservation = _reserve(port)
            if reservation is None:
                continue
            if _is_unbound(port):
                self._purposes[port] = purpose
                self._reservations.append(reservation)
                return port
            reservation.close()
        raise SetupError(f"no port from {FIRST_PORT} to 65535 is free for {purpose}")

    def taken(self, own_pids: Callable[[], Collection[int]], output: str = "") -> str:
        """Which of the ports other processes have, and which processes; empty if none is taken.

        ``own_pids`` gives the processes that may have them now. ``output`` is what a failed program wrote: a
        port that it could not bind is taken even if its holder is gone.
        """
        unbindable = bind_failures(output)
        before = port_holders(self._purposes)
        own = own_pids()
        # One of ours that came after or left before `own` was made is not in both.
        after = port_holders(self._purposes)
        found = []
        for port, purpose in self._purposes.items():
            others = [pid for pid in after.get(port, ()) if pid in before.get(port, ()) and pid not in own]
            if others:
                found.append(f"port {port} ({purpose}) is taken by {process_name(others[0])}")
            elif port in unbindable:
                found.append(f"port {port} ({purpose}) was taken by a process that is gone")
        return ", ".join(found)

    def release(self) -> None:
        """Let others choose these ports again; whoever has bound them is not disturbed."""
        for reservation in self._reservations:
            reservation.close()
        self._reservations.clear()
        self._purposes.clear()


_of_this_process = Ports()
atexit.register(_of_this_process.release)


def free_port() -> int:
    """A port for any server, reserved until this process ends. Raises SetupError."""
    return _of_this_process.choose("a server")


def eligible_ports() -> list[int]:
    """The ports that may be chosen, free or not: outside the ephemeral range, and promised to nobody."""
    excluded = {*SERVE_REPLICA_PORTS, *_administrator_reserved()}
    ports = [port for port in range(FIRST_PORT, 65_536) if port not in excluded]
    ephemeral = ephemeral_range()
    # If the administrator made all of them ephemeral, reservations and repeated starts have to do.
    return [port for port in ports if port not in ephemeral] or ports


def ephemeral_range() -> range:
    """The ports that the kernel hands out by itself."""
    try:
        first, last = (_KERNEL / "ip_local_port_range").read_text().split()
        return range(int(first), int(last) + 1)
    except (OSError, ValueError):
        return _LINUX_DEFAULT


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def bind_failures(output: str) -> set[int]:
    """The ports that a program's output says it could not bind."""
    return {int(port) for port in _BIND_FAILURE.findall(output)}


def port_holders(ports: Iterable[int]) -> dict[int, list[int | None]]:
    """The processes that have each of ``ports``, those that listen first; None is one of another user."""
    wanted = set(ports)
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return {}
    found: dict[int, list[int | None]] = {}
    for listening in (True, False):
        for each in connections:
            if not each.laddr or each.laddr[1] not in wanted:
                continue
            # Without a process and not listening: what is left of a closed connection.
            if (each.status == psutil.CONN_LISTEN) is listening and (listening or each.pid is not None):
                found.setdefault(each.laddr[1], []).append(each.pid)
    return found


def port_holder(port: int) -> str:
    """Who has ``port``, for people."""
    holders = port_holders([port]).get(port)
    return process_name(holders[0]) if holders else "a process that can't be seen from here"


def process_name(pid: int | None) -> str:
    """A process for people: its name and its number, never its arguments, which may hold secrets."""
    if pid is None:
        return "a process of another user"
    try:
        return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:
        return f"process {pid}"


def _reserve(port: int) -> socket.socket | None:
    reservation = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        reservation.bind(f"\0tierplane-port-{port}")
    except OSError:
        reservation.close()
        return None
    return reservation


def _is_unbound(port: int) -> bool:
    """Whether no socket has the port on any address, not even a closed connection."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _administrator_reserved() -> set[int]:
    """Ports that the kernel does not hand out, because the administrator has a server for them."""
    try:
        parts = (_KERNEL / "ip_local_reserved_ports").read_text().strip().split(",")
        ranges = [part.partition("-") for part in parts if part]
        return {port for first, _, last in ranges for port in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()
