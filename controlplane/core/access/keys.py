"""API keys as the controller stores them and gateways check them. The key itself is nowhere stored: only its
SHA-256 digest is, which is enough for 256 random bits.

A key is ``tp_<id>_<secret>``: the id is public and names the key in logs and lists, the secret has 256 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from controlplane.core.access.roles import Role
from controlplane.core.domain.request import Priority

PREFIX: Final = "tp_"
ID_BYTES: Final = 6
SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key without its secret."""

    key_id: str
    digest: str
    """SHA-256 of the key, in hexadecimal."""
    name: str
    team: str = ""
    role: Role = Role.CLIENT
    tiers: tuple[str, ...] = ()
    """The tiers that may serve its requests; empty: all."""
    models: tuple[str, ...] = ()
    """The models that it may ask for by name; empty: all."""
    max_priority: Priority = Priority.NORMAL
    """The highest priority of its requests."""
    created_unix_s: float = 0.0
    created_by: str = ""
    expires_unix_s: float | None = None
    revoked_unix_s: float | None = None
    labels: tuple[tuple[str, str], ...] = ()
    previous_digest: str = ""
    """The digest from before the last rotation, valid until ``previous_until_unix_s``."""
    previous_until_unix_s: float = 0.0

    def problem(self, digest: str, unix_s: float) -> str:
        """Why a key with this digest, which is one of this record's, is not valid now; empty if it is."""
        if self.revoked_unix_s is not None:
            return "the key was revoked"
        if self.expires_unix_s is not None and unix_s >= self.expires_unix_s:
            return "the key has expired"
        if digest != self.digest and unix_s >= self.previous_until_unix_s:
            return "the key was replaced by a rotation"
        return ""


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Every key, as gateways get it from the controller."""

    version: str
    """A hash of the content; empty if the keys are not known, for example because the store can't be read.
    A gateway then goes on with the table that it has."""
    records: tuple[KeyRecord, ...] = ()


UNKNOWN_KEYS: Final = KeyTable("")


def find_key(records: Iterable[KeyRecord], subject: str) -> KeyRecord | None:
    """The key of this id or name. Of several with the name, one that is not revoked comes first, then the
    newest."""
    named = []
    for record in records:
        if record.key_id == subject:
            return record
        if record.name == subject:
            named.append(record)
    return max(named, key=lambda each: (each.revoked_unix_s is None, each.created_unix_s), default=None)


def digest_of(key: str | bytes) -> str:
    """The digest of a key."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()
