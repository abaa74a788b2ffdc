"""The few fields of a request body that routing needs, and how a body is changed without touching the rest.

Values that are not ours stay byte for byte what the client sent: a rewrite replaces or adds top-level
members and copies the others as they stand.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec

from controlplane.errors import BadRequest

AUTO: Final = "auto"
GATEWAY_FIELDS: Final = ("models",)
"""Members that are for the gateway only and are not sent on."""
AFFINITY_MESSAGES: Final = 2


class RequestBody(msgspec.Struct, gc=False):
    """What routing reads. Everything else in the body is the engine's business."""

    model: str | None = None
    models: list[str] | None = None
    """Acceptable models in the order of preference; ``model`` is ignored when it is given."""
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
        """A hash of what requests of one conversation have in common: their first messages."""
        if self.messages:
            try:
                first = _messages(self.messages)[:AFFINITY_MESSAGES]
            except msgspec.DecodeError:
                return None
            return zlib.crc32(b"\0".join(bytes(message) for message in first))
        if self.prompt:
            return zlib.crc32(bytes(self.prompt)[:512])
        return None


_envelope = msgspec.json.Decoder(RequestBody).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def parse(body: bytes) -> RequestBody:
    """The envelope of a body. Raises :class:`BadRequest` that names the member that is wrong."""
    try:
        return _envelope(body)
    except msgspec.ValidationError as error:
        text = str(error)
        _, _, path = text.rpartition("$.")
        param = path.rstrip("`") if path != text else None
        raise BadRequest(f"the request body is wrong: {text}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None


def rewrite(body: bytes, **members: Any) -> bytes:
    """The body with these top-level members set and the gateway's own ones taken out.

    Raises :class:`BadRequest`: the names of members are looked at here for the first time.
    """
    try:
        values: dict[str, Any] = _members(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None
    for name in GATEWAY_FIELDS:
        values.pop(name, None)
    values.update(members)
    return _encode(values)
