"""Decodes the few members of a request body that routing needs, and rewrites a body without decoding the
rest.

A rewrite replaces or adds top-level members and copies all others byte for byte as the client sent them.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec

from controlplane.errors import BadRequest

GATEWAY_FIELDS: Final = ("models",)
"""Members that only the gateway uses; they are not sent to engines."""
AFFINITY_MESSAGES: Final = 2
"""For affinity, a conversation is identified by this many of its first messages."""


class RequestBody(msgspec.Struct, gc=False):
    """The members that the gateway reads."""

    model: str | None = None
    models: list[str] | None = None
    """Acceptable models in order of preference; if given, ``model`` is ignored."""
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    n: Any = None
    return_token_ids: Any = None

    def hint(self, name: str) -> Any:
        """A member of ``metadata``, or None."""
        return self.metadata.get(name) if self.metadata else None

    def affinity_key(self) -> int | None:
        """A hash of what the requests of one conversation have in common: the first messages, or the start of
        the prompt."""
        if self.messages:
            try:
                first = _messages(self.messages)[:AFFINITY_MESSAGES]
            except msgspec.DecodeError:
                return None
            return zlib.crc32(b"\0".join(bytes(message) for message in first))
        if self.prompt:
            return zlib.crc32(bytes(self.prompt)[:512])
        return None


_body = msgspec.json.Decoder(RequestBody).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def parse(body: bytes) -> RequestBody:
    """The members of a body that the gateway reads. Raises :class:`BadRequest` that names a wrong member."""
    try:
        return _body(body)
    except msgspec.ValidationError as error:
        text = str(error)
        _, _, path = text.rpartition("$.")
        param = path.rstrip("`") if path != text else None
        raise BadRequest(f"the request body is wrong: {text}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None


def rewrite(body: bytes, **members: Any) -> bytes:
    """The body with these top-level members set and the :data:`GATEWAY_FIELDS` removed. Raises
    :class:`BadRequest` for a malformed body: :func:`parse` did not decode every member."""
    try:
        values: dict[str, Any] = _members(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None
    for name in GATEWAY_FIELDS:
        values.pop(name, None)
    values.update(members)
    return _encode(values)
