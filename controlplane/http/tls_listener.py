"""Accepts connections for a server with TLS.

asyncio's own listener keeps the certificate that it began with, and tells nobody of connections whose
handshake has not ended. Here, each connection gets the present certificate, and counts from its first
byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

import structlog

from controlplane.http.connection import ClientConnection
from controlplane.http.limits import ServerLimits
from controlplane.http.tls import ServerTls

_PAUSE_S: Final = 1.0
"""How long nothing is accepted after the process ran out of file descriptors."""
_ACCEPTED_AT_ONCE: Final = 64

log = structlog.stdlib.get_logger(__name__)


class TlsListener:
    """Accepts on ``listener`` and hands over a connection for each client as soon as it has connected.

    ``connect`` creates the connection. Its handshake runs in a task of its own, so that a slow client holds
    nobody else.
    """

    def __init__(
        self,
        listener: socket.socket,
        tls: ServerTls,
        limits: ServerLimits,
        connect: Callable[[], ClientConnection],
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._limits = limits
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def start(self, backlog: int) -> None:
        """Begin to accept."""
        self._listener.listen(backlog)
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Refuse new connections from now on; those that there are go on."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def accepted(self, client: socket.socket) -> None:
        """Take over a connection that has been accepted."""
        connection = self._connect()
        connection.begin_handshake(self._loop.create_task(self._handshake(client, connection)))

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("no connection can be accepted for a moment", reason=str(error))
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted(client)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    async def _handshake(self, client: socket.socket, connection: ClientConnection) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._limits.handshake_s,
                ssl_shutdown_timeout=self._limits.linger_s,
            )
        except OSError as error:
            log.debug("a client's TLS handshake failed", reason=str(error))
            client.close()
        except BaseException:
            client.close()
            raise
        finally:
            connection.end_handshake()
