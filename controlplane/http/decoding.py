"""Decodes bodies that were compressed with gzip or deflate, piece by piece."""

from __future__ import annotations

import zlib
from typing import Final

PIECE_BYTES: Final = 1024 * 1024
"""The most decoded bytes of one :meth:`Decoder.feed`. Compressed data may expand a thousandfold, and an event
loop can do other work between two pieces."""
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS
_GZIP_MAGIC: Final = b"\x1f\x8b"


def is_decodable(coding: str) -> bool:
    """Whether :class:`Decoder` knows this ``Content-Encoding``."""
    return coding in ("gzip", "x-gzip", "deflate")


class Decoder:
    """Decodes one body; ``coding`` is one for which :func:`is_decodable` is true."""

    __slots__ = ("_gzip", "_held", "_inflate", "pending")

    def __init__(self, coding: str) -> None:
        self._gzip = coding != "deflate"
        self._inflate: zlib._Decompress | None = None
        self._held = b""
        """Input that was not decoded yet."""
        self.pending = False
        """More decoded bytes may be had without more input."""

    @property
    def complete(self) -> bool:
        """The compressed data, if there was any, has come to its end, and everything was returned."""
        return (self._inflate is None or self._inflate.eof) and not self._held

    def feed(self, data: bytes) -> bytes:
        """Up to :data:`PIECE_BYTES` decoded bytes; the rest by further calls with ``b""`` while
        :attr:`pending`. ValueError if the data is malformed."""
        data = self._held + data
        self._held = b""
        self.pending = False
        inflate = self._inflate
        if inflate is None or inflate.eof:
            if len(data) < 2:
                self._held = data
                return b""
            inflate = self._inflate = self._begin(data)
        try:
            decoded = inflate.decompress(data, PIECE_BYTES)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        self._held = inflate.unconsumed_tail or inflate.unused_data
        self.pending = len(decoded) == PIECE_BYTES or len(self._held) > 1
        return decoded

    def _begin(self, data: bytes) -> zlib._Decompress:
        """The decoder of the data that begins here; gzip's may follow one another."""
        if self._gzip:
            if not data.startswith(_GZIP_MAGIC):
                raise ValueError("not gzip")
            return zlib.decompressobj(_GZIP_WINDOW)
        if self._inflate is not None:
            raise ValueError("more bytes after the end of the compressed data")
        # "deflate" means zlib's format (RFC 9110, 8.4.1.2), but some send the raw data of RFC 1951.
        wrapped = data[0] & 0x0F == zlib.DEFLATED and (data[0] << 8 | data[1]) % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)
