"""Ports that this process chooses and that another process binds later: HAProxy, Ray, a server in a test.

The kernel may assign any port of its ephemeral range at any time to a process that connects or binds port 0,
including Ray's own processes. So ports are chosen outside that range, and each is reserved against other
processes that use this module, with a Unix socket in Linux's abstract namespace. Such a socket needs no file,
has the same scope as the ports (the network namespace, all users), and the kernel removes it when its process
ends. A bound TCP socket as reservation would block servers that don't set SO_REUSEADDR.

A server with a fixed port can still take a chosen port: :meth:`Ports.taken` reports that, and the start is
repeated with other ports.
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
"""Lower ports are used by well-known servers and by the workers of a Ray with default settings (10002 to
19999)."""
SERVE_REPLICA_PORTS = range(30_000, 31_001)
"""Serve assigns these to its replicas; if one is taken it tries the next."""

_KERNEL = Path("/proc/sys/net/ipv4")
_LINUX_DEFAULT = range(32_768, 61_000)
_BIND_FAILURE = re.compile(r"bind[^\n]*?(?::|', )(\d{1,5})\b")
"""Matches "cannot bind socket (Address already in use) for [0.0.0.0:80]" and "bind on address ('::', 80)"."""


class PortTaken(SetupError):
    """Another process took a chosen port before the intended program; starting with other ports may help."""


class Ports:
    """Chosen ports, reserved until :meth:`release`; as a context manager it releases them at its end."""

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
        """Choose a port that is neither bound nor reserved: ``preferred`` if possible, else a random one.

        ``purpose`` names the port in messages. Raises SetupError if no port is available.
        """
        candidates = eligible_ports()
        start = random.randrange(len(candidates))
        for port in (*([preferred] if preferred else []), *candidates[start:], *candidates[:start]):
            # Reserved before it is probed: the probe could disturb a process that is about to bind it.
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
        """The ports that other processes have taken, with these processes, as text; empty if none is taken.

        ``own_pids`` returns the processes that may have the ports. ``output`` is the output of a program that
        failed: a port that it could not bind counts as taken even if its holder has ended.
        """
        unbindable = bind_failures(output)
        before = port_holders(self._purposes)
        own = own_pids()
        # Twice, because a process of ours that starts or ends in between is missing from one of the two.
        after = port_holders(self._purposes)
        found = []
        for port, purpose in self._purposes.items():
            others = [pid for pid in after.get(port, ()) if pid in before.get(port, ()) and pid not in own]
            if others:
                found.append(f"port {port} ({purpose}) is taken by {process_name(others[0])}")
            elif port in unbindable:
                found.append(f"port {port} ({purpose}) was taken by a process that has ended")
        return ", ".join(found)

    def release(self) -> None:
        """Release the reservations; processes that have bound the ports are not affected."""
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
    """The ports that may be chosen, free or not: outside the ephemeral range and not reserved for a
    server."""
    excluded = {*SERVE_REPLICA_PORTS, *_administrator_reserved()}
    ports = [port for port in range(FIRST_PORT, 65_536) if port not in excluded]
    ephemeral = ephemeral_range()
    # If the administrator made all of them ephemeral, only reservations and repeated starts are left.
    return [port for port in ports if port not in ephemeral] or ports


def ephemeral_range() -> range:
    """The ports that the kernel assigns by itself."""
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
    """The processes that have each of ``ports``, listening ones first; None means another user's."""
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
            # A socket that has no process and does not listen is left over from a closed connection.
            if (each.status == psutil.CONN_LISTEN) is listening and (listening or each.pid is not None):
                found.setdefault(each.laddr[1], []).append(each.pid)
    return found


def port_holder(port: int) -> str:
    """The process that has ``port``, as text."""
    holders = port_holders([port]).get(port)
    return process_name(holders[0]) if holders else "a process that can't be seen from here"


def process_name(pid: int | None) -> str:
    """A process as text: its name and its id, never its arguments, which may contain secrets."""
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
    """Whether no socket has the port on any address, not even that of a closed connection."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _administrator_reserved() -> set[int]:
    """Ports that the administrator has excluded from the kernel's own assignment, usually for a server."""
    try:
        parts = (_KERNEL / "ip_local_reserved_ports").read_text().strip().split(",")
        ranges = [part.partition("-") for part in parts if part]
        return {port for first, _, last in ranges for port in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()
