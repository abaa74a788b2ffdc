"""Reads JSON from outside: the body of a client's request, or an engine's response.

A reader decodes only the members that its type names and skips all others without creating objects for them,
at about 0.5 GB/s. So what a body costs depends on the type, and not on what the body contains.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from controlplane.errors import shown

T = TypeVar("T")

UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for text that is not JSON, or not of the expected type."""
_REASON_CHARS: Final = 300
_SEARCH_BYTES: Final = 64 * 1024
UTF8_BOM: Final = b"\xef\xbb\xbf"
_WIDE_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_HALF_PAIR: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


class InvalidJson(ValueError):
    """Text from outside can't be read. The message completes "the body …"; ``member`` is the path of the
    member that has the wrong type, None if the text as a whole is wrong."""

    def __init__(self, message: str, member: str | None = None) -> None:
        super().__init__(message)
        self.member = member


def reader(kind: type[T]) -> Callable[[bytes | msgspec.Raw], T]:
    """A function that reads JSON as ``kind`` and raises :class:`InvalidJson`."""
    decode = msgspec.json.Decoder(kind).decode

    def read(text: bytes | msgspec.Raw) -> T:
        try:
            return decode(text)
        except UNREADABLE as error:
            raise invalid(error, bytes(text)) from None

    return read


def invalid(error: Exception, text: bytes) -> InvalidJson:
    """What is wrong with ``text``, for which reading raised one of :data:`UNREADABLE`."""
    if isinstance(error, RecursionError):
        return InvalidJson("is nested too deep")
    if isinstance(error, msgspec.ValidationError):
        reason = shown(str(error), _REASON_CHARS)
        _, found, path = reason.rpartition("$.")
        return InvalidJson(f"is wrong: {reason}", path.rstrip("`") if found else None)
    if not text.strip():
        return InvalidJson("is empty, not JSON")
    if isinstance(error, UnicodeDecodeError):
        return InvalidJson(f"is not JSON: it is not UTF-8 (byte {error.start})")
    if (half := _HALF_PAIR.search(text, 0, _SEARCH_BYTES)) is not None:
        return InvalidJson(f"is not JSON: {half[0].decode()} is half of a surrogate pair")
    return InvalidJson(f"is not JSON: {error}")


def without_mark(text: bytes) -> bytes:
    """``text`` without a byte order mark. Raises :class:`InvalidJson` if it is UTF-16 or UTF-32."""
    if text.startswith(UTF8_BOM):
        return text[len(UTF8_BOM) :]
    if text.startswith(_WIDE_BOMS):
        raise InvalidJson("is UTF-16, with a byte order mark: send UTF-8")
    if b"\0" in text[:4]:
        raise InvalidJson("is UTF-16 or UTF-32: send UTF-8")
    return text


def utf8(text: bytes) -> bytes:
    """``text`` without a byte order mark. Raises :class:`InvalidJson` if it is not UTF-8; the readers don't
    look at the bytes of the members that they skip."""
    text = without_mark(text)
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise invalid(error, text) from None
    return text
