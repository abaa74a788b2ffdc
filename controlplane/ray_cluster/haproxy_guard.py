"""Runs between Ray Serve and its HAProxy: a stricter configuration, and an ingress that outlives a crash.

Ray Serve starts HAProxy again for every change of its routes, and replaces a crashed one only after some
twenty seconds, first without routes. :func:`write_launcher` makes the executable that Ray Serve starts
instead. It uses only the standard library, and does three things:

* It changes the configuration that Ray generated (:func:`stricter`).
* It starts a watcher, and becomes HAProxy: Ray requires HAProxy to have the process id that it started.
* The watcher (:class:`Watcher`) kills an HAProxy that hangs. For one that has crashed it starts a stand-in at
  once, with the last known routes, which serves until Ray Serve has started the next. It ends HAProxy when
  the raylet has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HEAD_TIMEOUT_S = 10
"""How long a client may take to send the head of a request."""
_KEEP_ALIVE = "timeout http-keep-alive 75s"
"""Otherwise the time-out for heads would apply to idle connections; Ray's own value has precedence."""
TAKEOVER_S = 40.0
"""How long HAProxy may take to start; Ray gives it 30 s."""
PING_S = 1.0
PING_TIMEOUT_S = 2.0
PINGS_LOST = 3
"""An HAProxy that does not answer on its own socket this often in a row is killed."""
ORPHAN_S = 60.0
"""How long an ingress without its manager serves while the raylet still runs: Ray Serve starts both again."""
STAND_INS = 10
"""How often a stand-in that crashes too is started again."""

NO_ROUTES = json.dumps(
    {
        "error": {
            "message": "the ingress does not know its routes yet: try again in a second",
            "type": "server_error",
            "param": None,
            "code": "no_endpoint",
        }
    }
)
NO_SERVER = NO_ROUTES.replace("the ingress does not know its routes yet", "no gateway can be reached")
_LOCAL_ONLY = ("frontend prometheus", "listen stats")
_EVERY_ADDRESS = re.compile(r"bind\s+\S*:(\d+)")


def stricter(config: str, error_file: Path) -> str:
    """Ray's configuration of HAProxy, with these changes:

    * Metrics and statistics listen on loopback only; Ray's template has them on every address.
    * Only the owner may use the administrator's socket.
    * The head of a request must arrive in ``HEAD_TIMEOUT_S``.
    * Without routes, every path is answered with 503 and Retry-After instead of 404.
    * If no gateway can be reached, the response is that of ``error_file`` (503, as JSON) instead of 500.
    """
    section = ""
    lines: list[str] = []
    for line in config.splitlines():
        if line[:1].strip():
            section = " ".join(line.split())
        lines += _stricter_line(line, section, config, error_file)
    return "\n".join(lines) + "\n"


def _stricter_line(line: str, section: str, config: str, error_file: Path) -> list[str]:
    words = line.split()
    if section in _LOCAL_ONLY and words[:1] == ["bind"]:
        return [_EVERY_ADDRESS.sub(r"bind 127.0.0.1:\1", line)]
    if words[:2] == ["stats", "socket"]:
        return [re.sub(r"\bmode \d+", "mode 600", line)]
    if section == "defaults":
        if words[:2] == ["timeout", "http-request"]:
            return []
        if words[:1] == ["errorfile"]:
            return [f"    errorfile {words[1]} {error_file}"]
        if words == ["mode", "http"]:
            kept_alive = [] if "timeout http-keep-alive" in config else [f"    {_KEEP_ALIVE}"]
            return [line, f"    timeout http-request {HEAD_TIMEOUT_S}s", *kept_alive]
    if (
        section == "backend default_backend"
        and words[:2] == ["http-request", "return"]
        and not _routes(config)
    ):
        as_json = f"content-type application/json string {_quoted(NO_ROUTES)}"
        return [f"    http-request return status 503 {as_json} hdr Retry-After 1"]
    return [line]


def _routes(config: str) -> bool:
    """Whether a configuration has routes to gateways."""
    return "\n    use_backend " in config


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def prepare(config: Path, *, first: bool) -> None:
    """Make the configuration that Ray has written stricter. If this HAProxy is the ``first`` of its manager
    and knows no routes, it gets those that its predecessor knew."""
    known = config.with_name("last-routes.cfg")
    error_file = config.with_name("no-server.http")
    _write(
        error_file,
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(NO_SERVER)}\r\n\r\n{NO_SERVER}",
    )
    text = stricter(config.read_text(), error_file)
    if _routes(text):
        _write(known, text)
    elif first and known.exists():
        text = without_saved_state(known.read_text())
    _write(config, text)


def without_saved_state(config: str) -> str:
    """The configuration without the states of servers that HAProxy saved: they are of its last change."""
    return re.sub(r"(?m)^\s*(?:server-state-\w+|load-server-state-from-file) .*\n", "", config)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("w", newline="") as file:
        file.write(text)
    partial.replace(path)


class Watched:
    """A process that is not a child of this one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = -1
        with contextlib.suppress(OSError):
            self.fd = os.pidfd_open(pid)

    @property
    def ended(self) -> bool:
        """Whether it has ended, or never was."""
        return self.fd < 0 or bool(select.select([self.fd], [], [], 0)[0])

    def signal(self, number: int) -> None:
        """Send it a signal; without effect if it has ended."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.fd, number)


def parent_of(pid: int) -> int:
    """The parent's process id; 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


class Watcher:
    """Watches one HAProxy process, the manager that started it (an actor of Ray Serve), and the raylet."""

    def __init__(self, binary: str, config: Path, proxy: int) -> None:
        self._binary = binary
        self._config = config
        self._current = config.with_name("current")
        self._proxy = Watched(proxy)
        manager = parent_of(proxy)
        self._manager = Watched(manager)
        self._raylet = Watched(parent_of(manager))

    def run(self) -> None:
        """Watch until HAProxy has ended, or has been replaced."""
        if not self._has_taken_over():
            return
        _write(self._current, str(self._proxy.pid))
        if self._serve():
            self._stand_in()

    def _has_taken_over(self) -> bool:
        """Whether HAProxy has started. If it hasn't, Ray reports why and goes on with its predecessor."""
        deadline_s = time.monotonic() + TAKEOVER_S
        while time.monotonic() < deadline_s and not self._proxy.ended:
            if ping(socket_of(self._config)) == self._proxy.pid:
                return True
            time.sleep(0.1)
        return False

    def _serve(self) -> bool:
        """Watch the running HAProxy; returns whether it has crashed and has no successor."""
        lost = 0
        for _ in self._until_ended(self._proxy, PING_S):
            if self._is_replaced():
                continue
            lost = 0 if ping(socket_of(self._config)) == self._proxy.pid or self._is_replaced() else lost + 1
            if lost >= PINGS_LOST:
                _log(f"HAProxy (process {self._proxy.pid}) hangs and is killed")
                self._proxy.signal(signal.SIGKILL)
        # A successor answers on the socket before it signals its predecessor to end.
        return not self._raylet.ended and not self._is_replaced() and not ping(socket_of(self._config))

    def _stand_in(self) -> None:
        """Serve with the last known routes until Ray Serve has started the next HAProxy."""
        config = self._config.with_name("stand-in.cfg")
        known = self._config.with_name("last-routes.cfg")
        text = without_saved_state((known if known.exists() else self._config).read_text())
        # On Ray's own socket, a stand-in would be taken for the HAProxy that is to be replaced.
        own = str(self._config.with_name("stand-in.sock"))
        _write(config, re.sub(r"stats socket \S+", lambda _: f"stats socket {own}", text))
        for number in range(STAND_INS):
            process = subprocess.Popen([self._binary, "-db", "-f", str(config)], stdin=subprocess.DEVNULL)
            _log(f"HAProxy (process {self._proxy.pid}) has ended: process {process.pid} stands in for it")
            with contextlib.suppress(ChildProcessError):
                for _ in self._until_ended(Watched(process.pid), 0.25):
                    pass
            process.wait()
            if self._raylet.ended or self._is_replaced() or self._manager.ended:
                return
            time.sleep(0.1 * number)

    def _until_ended(self, serving: Watched, period_s: float) -> Iterator[None]:
        """Yield every ``period_s`` until ``serving`` has ended. It is ended with the raylet, and asked to
        finish its requests once it has a successor, or its manager has been gone for ``ORPHAN_S``."""
        orphan_since_s = 0.0
        finishing = False
        while not serving.ended:
            watched = (
                [serving, self._raylet] if self._manager.ended else [serving, self._raylet, self._manager]
            )
            select.select([each.fd for each in watched if each.fd >= 0], [], [], period_s)
            if self._raylet.ended:
                serving.signal(signal.SIGKILL)
                select.select([serving.fd], [], [], 5.0)
                return
            if self._manager.ended and not orphan_since_s:
                orphan_since_s = time.monotonic()
            late = orphan_since_s and time.monotonic() - orphan_since_s > ORPHAN_S
            stands_in = serving is not self._proxy
            if not finishing and (late or (self._is_replaced() and (stands_in or orphan_since_s))):
                finishing = True
                serving.signal(signal.SIGUSR1)
            yield

    def _is_replaced(self) -> bool:
        """Whether another HAProxy has taken over since."""
        try:
            return int(self._current.read_text()) != self._proxy.pid
        except (OSError, ValueError):
            return False


def ping(path: str) -> int:
    """The process id of the HAProxy that answers on this socket; 0 if none does."""
    data = b""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PING_TIMEOUT_S)
            client.connect(path)
            client.sendall(b"show info\n")
            while chunk := client.recv(65536):
                data += chunk
    except OSError:
        return 0
    match = re.search(rb"(?m)^Pid: (\d+)", data)
    return int(match[1]) if match else 0


def predecessor(config: Path) -> list[str]:
    """The argument by which HAProxy gets the listening sockets of one that still serves: a stand-in, or one
    whose manager was lost. Two can't bind the same port."""
    serving = [path for path in (socket_of(config), str(config.with_name("stand-in.sock"))) if ping(path)]
    return ["-x", serving[0]] if serving else []


def socket_of(config: Path) -> str:
    """The path of the administrator's socket; empty if there is none."""
    match = re.search(r"stats socket (\S+)", config.read_text())
    return match[1] if match else ""


def write_launcher(path: Path, binary: str) -> None:
    """Write the executable that Ray Serve starts as its HAProxy, in front of the real ``binary``."""
    words = (sys.executable, "-S", "-E", __file__, binary)
    path.write_text(f'#!/bin/sh\nexec {" ".join(shlex.quote(word) for word in words)} "$@"\n')
    path.chmod(0o700)


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"tierplane: {text}\n")
        sys.stderr.flush()


def main(argv: list[str]) -> None:
    """``haproxy_guard.py BINARY ARGUMENT…`` becomes HAProxy; with ``--watch`` it is the watcher."""
    if argv[1] == "--watch":
        # Separated by = so that this process is not taken for HAProxy, whose arguments Ray looks for.
        binary, config, proxy = (word.partition("=")[2] for word in argv[2:5])
        Watcher(binary, Path(config), int(proxy)).run()
        return
    binary, *arguments = argv[1:]
    if "-f" in arguments and "-c" not in arguments:
        config = arguments[arguments.index("-f") + 1]
        first = "-sf" not in arguments
        prepare(Path(config), first=first)
        if first:
            arguments += predecessor(Path(config))
        watch = ["--watch", f"--binary={binary}", f"--config={config}", f"--proxy={os.getpid()}"]
        subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, *watch],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    os.execv(binary, [binary, *arguments])  # noqa: S606 - no shell


if __name__ == "__main__":
    main(sys.argv)
