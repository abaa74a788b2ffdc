"""The HTTP/1.1 server behind the gateway's own port and the simulated engine.

It is small because the relay's speed depends on it: a request is read completely (up to a size limit) before
its handler runs, each write of a handler becomes one write to the socket, and when a client disconnects, its
handler is cancelled. The parser is llhttp (through httptools). HTTP/2 is left to a load balancer in front
of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import socket
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Final

from controlplane.errors import RequestError
from controlplane.http.access import AccessRules
from controlplane.http.connection import ClientConnection
from controlplane.http.intake import Intake
from controlplane.http.limits import ReceivingBudget, ServerLimits
from controlplane.http.messages import Request
from controlplane.http.responder import HttpResponder
from controlplane.http.tls import ServerTls
from controlplane.http.tls_listener import TlsListener

__all__ = ["HttpResponder", "HttpServer"]

BACKLOG: Final = 2048
_CLOSED_AT_ONCE: Final = 32
"""At the limit, this part (1 in 32) of the connections is closed at once: finding the oldest compares all."""


class HttpServer:
    """Listens on one address in the running event loop and calls ``handler`` with each request.

    ``handler`` returns None if it has sent the response, otherwise an awaitable that sends the rest, which
    runs in a task. The other arguments are those of :class:`~controlplane.http.intake.Intake`. With
    ``share_port``, other processes of the same user may also listen on the port. With ``tls``, clients speak
    HTTPS.
    """

    def __init__(
        self,
        handler: Callable[[Request, HttpResponder], Awaitable[None] | None],
        *,
        max_body_bytes: int,
        body_limit_setting: str = "",
        share_port: bool = True,
        access: AccessRules | None = None,
        receiving: ReceivingBudget | None = None,
        on_refused: Callable[[RequestError], None] | None = None,
        limits: ServerLimits | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self.intake = Intake(
            handler,
            max_body_bytes=max_body_bytes,
            body_limit_setting=body_limit_setting,
            access=access,
            receiving=receiving,
            on_refused=on_refused,
        )
        self.limits = limits or ServerLimits()
        self._share_port = share_port
        self._most_connections = self.limits.most_connections()
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._tls = tls
        self._server: asyncio.Server | TlsListener | None = None
        self._listener: socket.socket | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Starts listening and returns the port. Raises OSError if the address is not available."""
        self._listener = listener = _listener(host, port, share_port=self._share_port)
        port = int(listener.getsockname()[1])
        if self._tls is None:
            self._server = await self.loop.create_server(
                lambda: ClientConnection(self), sock=listener, backlog=BACKLOG
            )
        else:
            self._server = TlsListener(listener, self._tls, self.limits, lambda: ClientConnection(self))
            self._server.start(BACKLOG)
        if self._sweeper is None:
            self._sweeper = self.loop.create_task(self._sweep())
        return port

    def stop_listening(self) -> None:
        """Refuses new connections from now on; :meth:`start` accepts them again."""
        if self._server is not None:
            self._server.close()

    def abort_connections(self, spare: HttpResponder | None = None) -> None:
        """Resets all connections, except the one on which ``spare`` goes out."""
        for connection in list(self.connections):
            if spare is None or not spare.owns(connection):
                connection.abort()

    async def drain(self, timeout_s: float) -> None:
        """Accepts no new connections, lets running requests finish (up to ``timeout_s``), then closes all
        connections."""
        self.draining = True
        if self._server is not None:
            await self._accept_backlog()
            self._server.close()
        now_s = monotonic()
        deadline_s = now_s + timeout_s
        while now_s < deadline_s:
            for connection in list(self.connections):
                if connection.idle(now_s):
                    connection.close()
            if all(connection.idle(now_s) and not connection.unsent_bytes for connection in self.connections):
                break
            await asyncio.sleep(0.05)
            now_s = monotonic()
        self.abort_connections()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        if self._tls is not None:
            await self._tls.close()

    async def _accept_backlog(self) -> None:
        """Accepts the connections that the kernel has already queued for this listener. Closing the listener
        would reset them, even while another replica listens on the same port."""
        listener = self._listener
        while listener is not None:
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, OSError):
                return
            accepted.setblocking(False)
            if isinstance(self._server, TlsListener):
                self._server.accepted(accepted)
                continue
            await self.loop.connect_accepted_socket(lambda: ClientConnection(self), accepted)

    def opened(self, connection: ClientConnection) -> None:
        """Takes a new connection in. If there are too many, those that have waited longest for their clients
        are closed; if none waits, the new one is refused."""
        self.connections.add(connection)
        if len(self.connections) > self._most_connections:
            self._make_room(connection)

    def closed(self, connection: ClientConnection) -> None:
        """Forgets a connection."""
        self.connections.discard(connection)

    def _make_room(self, newest: ClientConnection | None = None) -> None:
        limit = self._most_connections
        now_s = monotonic()
        waiting = {
            connection: connection.waiting_s(now_s)
            for connection in self.connections
            if connection is not newest
        }
        count = max(len(self.connections) - limit, limit // _CLOSED_AT_ONCE)
        closed = [
            connection
            for connection in heapq.nlargest(count, waiting, key=lambda connection: waiting[connection])
            if waiting[connection] >= 0
        ]
        for connection in closed:
            connection.make_room(limit)
        if not closed and newest is not None:
            newest.refuse_for_want_of_room(limit)

    async def _sweep(self) -> None:
        """Ends the connections that have exceeded a limit of time."""
        while True:
            await asyncio.sleep(self.limits.sweep_s)
            self._most_connections = self.limits.most_connections()
            if len(self.connections) > self._most_connections:
                self._make_room()
            now_s = monotonic()
            if self._tls is not None:
                self._tls.refresh(now_s)
            unsent_bytes = 0
            for connection in list(self.connections):
                connection.enforce(now_s)
                unsent_bytes += connection.unsent_bytes
            if unsent_bytes > self.limits.unsent_bytes:
                self._abort_largest(unsent_bytes)

    def _abort_largest(self, unsent_bytes: int) -> None:
        """Resets connections, those with most unsent bytes first, until they are within the limit."""
        by_size = sorted(self.connections, key=lambda connection: connection.unsent_bytes, reverse=True)
        for connection in by_size:
            if unsent_bytes <= self.limits.unsent_bytes:
                break
            unsent_bytes -= connection.unsent_bytes
            connection.abort()


def _listener(host: str, port: int, *, share_port: bool) -> socket.socket:
    """A bound socket. ``share_port`` lets other replicas on this node bind the same port (SO_REUSEPORT)."""
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
