"""Decodes the few members of a request body that routing needs, and rewrites a body without decoding the
rest.

A rewrite replaces or adds top-level members and copies all others byte for byte as the client sent them.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec

from controlplane.errors import BadRequest
from controlplane.http import json_reader
from controlplane.http.json_reader import UNREADABLE, InvalidJson, invalid, reader

GATEWAY_FIELDS: Final = ("models",)
"""Members that only the gateway uses; they are not sent to engines."""
MAX_NAME_CHARS: Final = 512
"""The longest name of a model, a tier, a session or a type of agent."""
MAX_MODELS: Final = 64
"""The longest list ``models``."""
MAX_MEMBERS: Final = 1000
"""The most top-level members of a large body that has to be rewritten."""
_MAX_MODELS_BYTES: Final = 8 * MAX_MODELS * MAX_NAME_CHARS
_LARGE_BYTES: Final = 64 * 1024
_NULL: Final = b"null"
_ONE: Final = (b"1", _NULL)


class Metadata(msgspec.Struct, gc=False):
    """The members of ``metadata`` that the gateway reads."""

    complexity: str | None = None
    agent_type: str | None = None
    min_tier: str | None = None
    priority: str | None = None
    session_id: str | None = None
    timeout: float | str | None = None


class RequestBody(msgspec.Struct, gc=False):
    """The members that the gateway reads."""

    model: str | None = None
    models: msgspec.Raw = msgspec.Raw()
    """Acceptable models in order of preference; if given, ``model`` is ignored. See :meth:`model_names`."""
    stream: bool | None = None
    metadata: Metadata | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    n: msgspec.Raw = msgspec.Raw()
    return_token_ids: msgspec.Raw = msgspec.Raw()
    stream_options: msgspec.Raw = msgspec.Raw()

    def model_names(self) -> tuple[str, ...]:
        """The names in ``models``. Raises :class:`BadRequest`."""
        raw = bytes(self.models)
        if len(raw) <= _MAX_MODELS_BYTES:
            try:
                names = _names(raw) if raw != _NULL else []
            except InvalidJson as error:
                raise BadRequest(f"models {error}", param="models") from None
            if len(names) <= MAX_MODELS:
                return tuple(checked_name(name, "models") for name in names)
        raise BadRequest(f"models must be a list of at most {MAX_MODELS} names", param="models")

    @property
    def one_choice(self) -> bool:
        """Whether one answer is wanted: ``n`` is 1 or missing."""
        return not self.n or bytes(self.n) in _ONE

    @property
    def asks_token_ids(self) -> bool:
        """Whether the client has set ``return_token_ids``, to whatever value."""
        return bool(self.return_token_ids) and bytes(self.return_token_ids) != _NULL

    def affinity_key(self) -> int | None:
        """A hash of what the requests of one conversation have in common: the first messages, or the start of
        the prompt."""
        if self.messages:
            try:
                begin = _beginning(self.messages)
            except InvalidJson:
                return None
            if not begin.second:
                return zlib.crc32(bytes(begin.first))
            return zlib.crc32(b"\0".join((bytes(begin.first), bytes(begin.second))))
        if self.prompt:
            return zlib.crc32(bytes(self.prompt)[:512])
        return None


class _Beginning(msgspec.Struct, array_like=True, gc=False):
    """A conversation is identified by its first two messages; those that follow are skipped."""

    first: msgspec.Raw = msgspec.Raw()
    second: msgspec.Raw = msgspec.Raw()


class _MemberName(str):
    """The name of a top-level member; a type of its own, so that the decoder's hook is called for each."""

    __slots__ = ()


class _TooManyMembers(Exception):
    pass


class _MemberCount:
    """Raises :class:`_TooManyMembers` at the first name over :data:`MAX_MEMBERS`."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, kind: type, name: str) -> _MemberName:
        self._count += 1
        if self._count > MAX_MEMBERS:
            raise _TooManyMembers
        return _MemberName(name)


def _large_members(body: bytes) -> dict[str, msgspec.Raw]:
    """The members of a body in which there may be more than a dictionary should have."""
    counted = msgspec.json.Decoder(dict[_MemberName, msgspec.Raw], dec_hook=_MemberCount())
    try:
        return dict(counted.decode(body).items())
    except _TooManyMembers:
        raise InvalidJson(f"has over {MAX_MEMBERS} members") from None
    except UNREADABLE as error:
        raise invalid(error, body) from None


_body = msgspec.json.Decoder(RequestBody).decode
_members = reader(dict[str, msgspec.Raw])
_beginning = reader(_Beginning)
_names = reader(list[str])
_encode = msgspec.json.Encoder().encode


def parse(body: bytes) -> RequestBody:
    """The members of a body that the gateway reads. Raises :class:`BadRequest` that names a wrong member."""
    try:
        return _body(body)
    except UNREADABLE as error:
        problem = invalid(error, body)
        raise BadRequest(f"the request body {problem}", param=problem.member) from None


def without_mark(body: bytes) -> bytes:
    """The body without a byte order mark, which some engines reject. Raises :class:`BadRequest` if it is
    UTF-16 or UTF-32. Other bytes that are not UTF-8 are refused in the members that the gateway reads; in
    those that it passes on they are the engine's to judge."""
    try:
        return json_reader.without_mark(body)
    except InvalidJson as error:
        raise BadRequest(f"the request body {error}") from None


def checked_name(name: str, source: str) -> str:
    """``name``, which was in the header or member ``source``. Raises :class:`BadRequest` if it is longer than
    :data:`MAX_NAME_CHARS`: names are repeated in responses, stored in tables and shown."""
    if len(name) > MAX_NAME_CHARS:
        text = f"{source} may have at most {MAX_NAME_CHARS} characters, this one has {len(name)}"
        raise BadRequest(text, param=source)
    return name


def raw_members(body: bytes) -> dict[str, msgspec.Raw]:
    """The top-level members of a body as the client wrote them. Raises :class:`InvalidJson`, also for a long
    body of more than :data:`MAX_MEMBERS`."""
    return _members(body) if len(body) <= _LARGE_BYTES else _large_members(body)


def rewrite(body: bytes, **members: Any) -> bytes:
    """The body with these top-level members set and the :data:`GATEWAY_FIELDS` removed. Raises
    :class:`BadRequest` for a malformed body: :func:`parse` did not decode every member."""
    try:
        values: dict[str, Any] = raw_members(body)
    except InvalidJson as error:
        raise BadRequest(f"the request body {error}") from None
    for name in GATEWAY_FIELDS:
        values.pop(name, None)
    values.update(members)
    return _encode(values)
