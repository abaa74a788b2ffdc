"""Writes responses as HTTP/1.1 to one connection."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Final, Protocol

from controlplane.http.messages import Headers, header_lines

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_SHORT_CHUNK_BYTES: Final = 4096
_CHUNK_SIZE_LINES: Final = [b"%x\r\n" % size for size in range(_SHORT_CHUNK_BYTES)]


def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} Unknown\r\n".encode()


class Connection(Protocol):
    """Where the bytes go."""

    closed: bool

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than data is written."""
        ...

    def write(self, data: bytes) -> None:
        """Sends bytes."""
        ...

    async def drain(self) -> None:
        """Waits until the client has read enough for more to be written."""
        ...

    def close(self) -> None:
        """Closes the connection once everything written has been sent."""
        ...

    def abort(self) -> None:
        """Closes the connection at once."""
        ...


class HttpResponder:
    """The :class:`~controlplane.http.messages.Responder` of one request on this server."""

    __slots__ = ("_chunked", "_connection", "_extra", "_head_only", "_keep_alive", "finished", "started")

    def __init__(
        self,
        connection: Connection,
        keep_alive: bool,
        head_only: bool = False,
        chunked: bool = True,
        extra: Headers | None = None,
    ) -> None:
        """``chunked`` is false for a client of HTTP/1.0; ``extra`` are headers of every response."""
        self._connection = connection
        self._extra = extra
        self._keep_alive = keep_alive
        self._head_only = head_only
        self._chunked = chunked
        self.started = False
        self.finished = False

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected; then writes are discarded."""
        return self._connection.closed

    @property
    def chunked(self) -> bool:
        """Whether the client speaks HTTP/1.1."""
        return self._chunked

    def _head(self, status: int, headers: Headers) -> list[bytes]:
        if self._extra:
            headers = [*headers, *self._extra]
        parts = [_STATUS_LINES.get(status) or _status_line(status), header_lines(headers)]
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        return parts

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends a complete response."""
        self.started = True
        parts = self._head(status, headers)
        parts.append(b"content-length: %d\r\n\r\n" % len(body))
        if not self._head_only:
            parts.append(body)
        self._connection.write(b"".join(parts))
        self._end()

    def start(self, status: int, headers: Headers) -> None:
        """Begins a response of unknown length."""
        self.started = True
        if not self._chunked:
            self._keep_alive = False  # an HTTP/1.0 client reads the body until the connection ends
        parts = self._head(status, headers)
        parts.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._connection.write(b"".join(parts))

    def write(self, data: bytes) -> None:
        """Sends a piece of the body."""
        if not data or self._head_only:
            return
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def write_chunks(self, pieces: Iterable[bytes], *, finish: bool = False) -> None:
        """Sends several pieces of the body, none of them empty, in one write; each is one HTTP chunk.

        With ``finish``, the body is complete.
        """
        if not self._chunked or self._head_only:
            self.write(b"".join(pieces))
            if finish:
                self.finish()
            return
        lines, short = _CHUNK_SIZE_LINES, _SHORT_CHUNK_BYTES
        chunks = [
            (lines[size] if (size := len(piece)) < short else b"%x\r\n" % size) + piece for piece in pieces
        ]
        chunks.append(b"0\r\n\r\n" if finish else b"")
        self._connection.write(b"\r\n".join(chunks))
        if finish:
            self._end()

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than data is written."""
        return self._connection.congested

    async def drain(self) -> None:
        """Waits until the client has read enough for more to be written."""
        await self._connection.drain()

    def finish(self) -> None:
        """Marks the body as complete."""
        if self.finished:
            return
        if self._chunked and not self._head_only:
            self._connection.write(b"0\r\n\r\n")
        self._end()

    def abort(self) -> None:
        """Aborts the response at once; the client sees that it is incomplete."""
        self.finished = True
        self._connection.abort()

    def truncate(self) -> None:
        """Sends what was written, then closes the connection without marking the body as complete."""
        self.finished = True
        self._connection.close()

    def owns(self, connection: object) -> bool:
        """Whether this response goes out on that connection."""
        return self._connection is connection

    def _end(self) -> None:
        self.finished = True
        if not self._keep_alive:
            self._connection.close()
