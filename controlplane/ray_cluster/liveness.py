"""Whether Ray's processes answer, found out without Ray, whose own calls to a hung process take minutes."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

import psutil

ANSWER_TIMEOUT_S = 5.0
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""With empty settings. A gRPC server sends its own settings at once, before it looks at any token."""
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def answers(addresses: Sequence[tuple[str, int]], timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
    """Whether a gRPC server answers at one of these addresses. The kernel accepts connections for a process
    that hangs, so only bytes from it count."""
    deadline_s = time.monotonic() + timeout_s
    waiting: list[socket.socket] = []
    try:
        for address in addresses:
            try:
                waiting.append(socket.create_connection(address, max(0.1, deadline_s - time.monotonic())))
                waiting[-1].sendall(_HTTP2_PREFACE)
            except OSError:
                continue
        if "RAY_USE_TLS" in os.environ:
            return bool(waiting)
        left = list(waiting)
        while left and (rest_s := deadline_s - time.monotonic()) > 0:
            for each in select.select(left, [], [], rest_s)[0]:
                if _read(each):
                    return True
                left.remove(each)
        return False
    finally:
        for each in waiting:
            each.close()


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(9)
    except OSError:
        return b""


def hung(processes: Sequence[psutil.Process], timeout_s: float = ANSWER_TIMEOUT_S) -> str:
    """Which of a Ray's main processes hangs, as text; empty if none does. An ended one does not hang."""
    for process in processes:
        try:
            name = process.name()
            if name not in {"gcs_server", "raylet"}:
                continue
            if process.status() in _STOPPED:
                return f"Ray's {name} (process {process.pid}) is stopped"
            listening = [
                (each.laddr.ip, each.laddr.port)
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN
            ]
        except psutil.Error:
            continue
        reachable = [("127.0.0.1" if ip in {"0.0.0.0", "::"} else ip, port) for ip, port in listening]  # noqa: S104
        if reachable and not answers(reachable, timeout_s):
            return f"Ray's {name} (process {process.pid}) does not answer"
    return ""
