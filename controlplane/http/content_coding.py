"""Compressed request bodies: ``Content-Encoding: gzip``, ``deflate`` or ``zstd``.

What comes out is bounded while it is decoded, so that a small body can't become a large one, and a large body
is decoded in a thread.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import zstandard

from controlplane.errors import BadRequest, UnsupportedEncoding
from controlplane.http.decoding import Decoder
from controlplane.http.messages import payload_too_large

CODINGS: Final = ("gzip", "deflate", "zstd")
_ALIASES: Final = {"x-gzip": "gzip"}
_AT_ONCE_BYTES: Final = 256 * 1024
"""A body that has not ended after so many bytes is decoded further in a thread."""
_PIECE_BYTES: Final = 1024 * 1024
_ZSTD_WINDOW_BYTES: Final = 8 * 1024 * 1024
"""The largest window that a decoder is expected to support (RFC 9659)."""
_ZSTD_HEADER_BYTES: Final = 18
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"
_ZSTD_BLOCKS: Final = 20_000
_ZSTD_REPEATED: Final = 1
"""The type of a block that is one byte, repeated."""
_FAULTS: Final = (ValueError, EOFError, zstandard.ZstdError)


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Inflated:
    """Reads a body of gzip or deflate."""

    def __init__(self, coding: str, body: bytes) -> None:
        self._decoder = Decoder(coding)
        self._body = body

    def read(self, size: int, /) -> bytes:
        """Up to ``decoding.PIECE_BYTES``, whatever ``size`` is; empty at the end."""
        data, self._body = self._body, b""
        piece = self._decoder.feed(data)
        while not piece and self._decoder.pending:
            piece = self._decoder.feed(b"")
        if not piece and not self._decoder.complete:
            raise EOFError("it ends too early")
        return piece


class _Unpacked:
    """Reads a body of zstd."""

    def __init__(self, body: bytes) -> None:
        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._stream = decoder.stream_reader(body, read_across_frames=True)
        self._body = body

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; empty at the end. The library treats truncated data as complete."""
        piece = self._stream.read(size)
        if not piece:
            _check_frames(self._body)
        return piece


def _check_frames(body: bytes) -> None:
    """Raises EOFError if the last frame of a zstd body is not whole (RFC 8878, 3.1), and ValueError if it has
    over :data:`_ZSTD_BLOCKS` frames and blocks."""
    at = parts = 0
    while at < len(body):
        parts += 1
        frame = body[at : at + _ZSTD_HEADER_BYTES]
        if frame[1:4] == _ZSTD_SKIPPABLE and frame[:1] and frame[0] & 0xF0 == 0x50:
            if parts > _ZSTD_BLOCKS:
                raise ValueError(f"it has over {_ZSTD_BLOCKS} frames")
            at += 8 + int.from_bytes(frame[4:8], "little")
        else:
            at += zstandard.frame_header_size(frame)
            is_last = False
            while not is_last:
                block = int.from_bytes(body[at : at + 3], "little")
                if at + 3 > len(body):
                    raise EOFError("it ends too early")
                parts += 1
                if parts > _ZSTD_BLOCKS:
                    raise ValueError(f"it has over {_ZSTD_BLOCKS} blocks")
                is_last = bool(block & 1)
                at += 3 + (1 if block >> 1 & 3 == _ZSTD_REPEATED else block >> 3)
            at += 4 if zstandard.get_frame_parameters(frame).has_checksum else 0
        if at > len(body):
            raise EOFError("it ends too early")


def coding_of(value: str) -> str:
    """The coding that a ``Content-Encoding`` header names, or ``""`` for none. Raises
    :class:`UnsupportedEncoding` for one that is not decoded here, and for several at once."""
    names = [name for part in value.lower().split(",") if (name := part.strip()) not in {"", "identity"}]
    if not names:
        return ""
    coding = _ALIASES.get(names[0], names[0])
    if len(names) > 1 or coding not in CODINGS:
        accepted = ", ".join(CODINGS)
        raise UnsupportedEncoding(f"Content-Encoding must be one of {accepted}, not '{value[:40]}'")
    return coding


async def decode(
    coding: str, body: bytes, limit_bytes: int, limit_setting: str, large: AbstractAsyncContextManager[object]
) -> bytes:
    """The decoded body. ``large`` is held while a large one is decoded. Raises :class:`PayloadTooLarge` if it
    is over ``limit_bytes``, and :class:`BadRequest` if it is not in this coding."""
    try:
        source = _open(coding, body)
        pieces: list[bytes] = []
        size = 0
        while size <= min(_AT_ONCE_BYTES, limit_bytes):
            piece = source.read(_AT_ONCE_BYTES)
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            pieces.append(piece)
        async with large:
            return await asyncio.to_thread(_rest, source, pieces, limit_bytes, limit_setting)
    except _FAULTS as error:
        raise BadRequest(f"the body is not valid {coding}: {error}") from None


def _rest(source: _Source, pieces: list[bytes], limit_bytes: int, limit_setting: str) -> bytes:
    size = sum(len(piece) for piece in pieces)
    while size <= limit_bytes and (piece := source.read(_PIECE_BYTES)):
        size += len(piece)
        pieces.append(piece)
    if size > limit_bytes:
        raise payload_too_large(limit_bytes, limit_setting)
    return b"".join(pieces)


def _open(coding: str, body: bytes) -> _Source:
    return _Unpacked(body) if coding == "zstd" else _Inflated(coding, body)
