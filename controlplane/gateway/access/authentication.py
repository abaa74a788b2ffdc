"""Finds out who a request comes from: the owner of its API key.

The key comes as ``Authorization: Bearer``, as ``x-api-key`` (Anthropic's clients), or as the password of
Basic authentication (browsers). It is looked up by its digest, so neither the look-up nor the comparison
depends on how much of a guess is right, and nothing is stored of keys that are not valid.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from controlplane.core.access.keys import UNKNOWN_KEYS, KeyRecord, KeyTable
from controlplane.core.access.principal import Principal, principal_of
from controlplane.errors import KeysUnknown, RequestError, Unauthorized

MAX_CREDENTIAL_BYTES: Final = 16 * 1024
"""A longer key is refused unread."""
CHALLENGE: Final = (b"www-authenticate", b'Bearer realm="tierplane", Basic realm="tierplane"')
RETRY_AFTER_S: Final = 1.0


class _Entry(NamedTuple):
    digest: bytes
    record: KeyRecord
    principal: Principal
    ends_unix_s: float
    """When it stops being valid; 0 if it is not valid any more."""


class Authenticator:
    """The keys of one gateway replica."""

    def __init__(self, *, unix_s: Callable[[], float] = time.time) -> None:
        self._unix_s = unix_s
        self._table = UNKNOWN_KEYS
        self._entries: dict[bytes, _Entry] = {}

    @property
    def version(self) -> str:
        """The version of the table in use; empty before the first."""
        return self._table.version

    def apply(self, table: KeyTable) -> None:
        """Use these keys from now on. A table of unknown keys changes nothing."""
        if not table.version:
            return
        entries: dict[bytes, _Entry] = {}
        for record in table.records:
            principal = principal_of(record)
            end_s = float("inf") if record.expires_unix_s is None else record.expires_unix_s
            if record.revoked_unix_s is not None:
                end_s = 0.0
            for hexadecimal, ends_unix_s in (
                (record.previous_digest, min(end_s, record.previous_until_unix_s)),
                (record.digest, end_s),
            ):
                if hexadecimal:
                    digest = bytes.fromhex(hexadecimal)
                    entries[digest] = _Entry(digest, record, principal, ends_unix_s)
        self._table, self._entries = table, entries

    def principal(self, headers: Mapping[bytes, bytes]) -> Principal:
        """Who sends a request with these headers. Raises :class:`Unauthorized` and :class:`KeysUnknown`."""
        credential = _credential(headers)
        digest = hashlib.sha256(credential).digest()
        entry = self._entries.get(digest)
        if entry is not None and hmac.compare_digest(entry.digest, digest):
            unix_s = self._unix_s()
            if unix_s < entry.ends_unix_s:
                return entry.principal
            raise Unauthorized(f"{entry.record.problem(digest.hex(), unix_s)}: ask an operator for another")
        if not self._table.version:
            raise KeysUnknown(
                "this gateway has not yet learned the API keys from the controller",
                retry_after_s=RETRY_AFTER_S,
            )
        raise Unauthorized("the API key is not valid: check it, or ask an operator for one")


def _credential(headers: Mapping[bytes, bytes]) -> bytes:
    """The key of a request. Raises :class:`Unauthorized` if it has none."""
    value = headers.get(b"authorization")
    if value is None:
        credential = headers.get(b"x-api-key", b"")
    else:
        scheme, _, credential = value.partition(b" ")
        credential = credential.strip()
        kind = scheme.lower()
        if kind == b"basic":
            credential = _password(credential)
        elif kind != b"bearer":
            credential = b""
    if not credential:
        raise Unauthorized(
            "no API key: send the header Authorization: Bearer KEY, or x-api-key: KEY; operators create keys "
            "with `tierplane keys create`"
        )
    if len(credential) > MAX_CREDENTIAL_BYTES:
        raise Unauthorized(f"the API key is longer than {MAX_CREDENTIAL_BYTES} bytes")
    return credential


def _password(value: bytes) -> bytes:
    if len(value) > 2 * MAX_CREDENTIAL_BYTES:
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def challenge(error: RequestError) -> list[tuple[bytes, bytes]]:
    """The headers of a response with this error that say how to send a key."""
    return [CHALLENGE] if isinstance(error, Unauthorized) else []
