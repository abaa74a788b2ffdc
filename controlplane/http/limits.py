"""The bounds of a server, in bytes, count and time: for one client, and for all clients together.

``docs/reference/bounds.md`` lists them with what a client sees beyond each.
"""

from __future__ import annotations

import heapq
import resource
from dataclasses import dataclass
from typing import Final, Protocol

from controlplane.errors import GatewayExhausted, RequestError

MAX_HEAD_BYTES: Final = 64 * 1024
RETRY_AFTER_S: Final = 1.0
LARGE_BODY_BYTES: Final = 64 * 1024
"""Smaller bodies are bounded by the number of connections."""
UNSENT_HIGH_BYTES: Final = 64 * 1024
"""A handler waits while more than this waits to be sent. asyncio's own limit, except with TLS."""
_HANDLED_RATIO: Final = 4
"""The limit for bodies of requests that are being handled, as a multiple of that for those being received."""
_KEEP_RATIO: Final = 7 / 8
"""When the bytes of unfinished requests are over their limit, the largest are dropped down to this share, so
that the next byte doesn't search for the largest again."""
_CONNECTION_SHARE: Final = 3 / 4
"""Share of the process's file descriptors for clients; the others are for engines and the process itself."""
_RESERVED_FILES: Final = 64
_FEWEST_CONNECTIONS: Final = 64
_MOST_CONNECTIONS: Final = 65_536


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one client may use of a server."""

    head_bytes: int = MAX_HEAD_BYTES
    """Bytes of a request's line and headers, and of what follows a chunked body (trailers)."""
    headers: int = 200
    """Headers of a request."""
    pipelined: int = 16
    """Requests that wait on a connection for the one before them; then nothing more is read from it."""
    handshake_s: float = 10.0
    """Seconds from a connection's begin to the end of its TLS handshake."""
    head_s: float = 10.0
    """Seconds from the first byte of a request to the end of its headers."""
    body_s: float = 30.0
    """Seconds from the first byte of a request to the end of its body, plus one for each
    :attr:`body_bytes_per_s` that have arrived."""
    body_bytes_per_s: int = 32 * 1024
    idle_s: float = 120.0
    """Seconds that a connection may be open without a request."""
    stall_s: float = 60.0
    """Seconds in which a client must read :attr:`stall_bytes` of the response that waits for it."""
    stall_bytes: int = 16 * 1024
    unsent_bytes: int = 512 * 1024 * 1024
    """Bytes of all responses that wait for their clients; beyond it the connections with most are reset."""
    linger_s: float = 2.0
    """Seconds that the connection of a refused request stays open, so that a client that is still sending can
    read the error."""
    sweep_s: float = 1.0
    """How often connections are checked against the limits of time."""
    connections: int | None = None
    """Connections of a server; by default three quarters of the process's file descriptors, less 64, and at
    least 64."""

    def most_connections(self) -> int:
        """The number of connections that may be open now."""
        if self.connections is not None:
            return self.connections
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files == resource.RLIM_INFINITY:
            return _MOST_CONNECTIONS
        free = int(files * _CONNECTION_SHARE) - _RESERVED_FILES
        return min(_MOST_CONNECTIONS, max(_FEWEST_CONNECTIONS, free))


class Unfinished(Protocol):
    """A request that is being received."""

    def drop(self, error: RequestError) -> None:
        """Forgets what has arrived and refuses the request."""
        ...


class ReceivingBudget:
    """The bytes of all requests that are being received or handled, on all connections of a gateway.

    Beyond ``limit_bytes`` the largest unfinished requests are refused with 503, so that many large ones can't
    keep small ones out. Large bodies that have arrived count until their handler has ended, and may have four
    times as much together. ``setting`` names the limit's setting.
    """

    def __init__(self, limit_bytes: int, setting: str) -> None:
        self.limit_bytes = limit_bytes
        self.total_bytes = 0
        self._setting = setting
        self._bytes: dict[Unfinished, int] = {}
        self.decoded_bytes = 0
        self.handled_bytes = 0

    def hold(self, request: Unfinished, size_bytes: int) -> None:
        """Counts ``size_bytes`` for this request, instead of what was counted for it before."""
        self.total_bytes += size_bytes - self._bytes.get(request, 0)
        self._bytes[request] = size_bytes
        if self.total_bytes > self.limit_bytes:
            self._drop_largest()

    def release(self, request: Unfinished) -> None:
        """Counts the request no more."""
        self.total_bytes -= self._bytes.pop(request, 0)

    def hold_decoded(self, size_bytes: int) -> None:
        """Counts the bytes that a compressed body has become, which may be a thousand times what was
        received. Raises :class:`GatewayExhausted` if there is no room for them."""
        if self.decoded_bytes + size_bytes > self.limit_bytes:
            raise self._exhausted()
        self.decoded_bytes += size_bytes

    def release_decoded(self, size_bytes: int) -> None:
        """Counts these bytes no more."""
        self.decoded_bytes -= size_bytes

    def hold_handled(self, size_bytes: int) -> None:
        """Counts the body of a request whose handler begins. Raises :class:`GatewayExhausted` if there is no
        room for it."""
        if self.handled_bytes + size_bytes > _HANDLED_RATIO * self.limit_bytes:
            message = (
                f"request bodies of over {_HANDLED_RATIO * self.limit_bytes} bytes are being handled "
                f"({_HANDLED_RATIO} times {self._setting})"
            )
            raise GatewayExhausted(message, retry_after_s=RETRY_AFTER_S)
        self.handled_bytes += size_bytes

    def release_handled(self, size_bytes: int) -> None:
        """Counts these bytes no more."""
        self.handled_bytes -= size_bytes

    def _exhausted(self) -> GatewayExhausted:
        message = f"request bodies of over {self.limit_bytes} bytes are being received ({self._setting})"
        return GatewayExhausted(message, retry_after_s=RETRY_AFTER_S)

    def _drop_largest(self) -> None:
        keep_bytes = self.limit_bytes * _KEEP_RATIO
        largest = [(-size_bytes, i, request) for i, (request, size_bytes) in enumerate(self._bytes.items())]
        heapq.heapify(largest)
        while largest and self.total_bytes > keep_bytes:
            _, _, request = heapq.heappop(largest)
            self.release(request)
            request.drop(self._exhausted())
