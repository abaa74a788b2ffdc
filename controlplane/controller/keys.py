"""The API keys of a plane: creates, rotates and revokes them, and hands their digests to gateways.

The key itself is in the result of :meth:`KeyRegistry.create` and :meth:`KeyRegistry.rotate`, and nowhere
else.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from controlplane.core.access.keys import (
    ID_BYTES,
    PREFIX,
    SECRET_BYTES,
    UNKNOWN_KEYS,
    KeyRecord,
    KeyTable,
    digest_of,
    find_key,
)
from controlplane.core.access.roles import Role
from controlplane.core.domain.request import Priority
from controlplane.core.json_values import StoredState, to_value
from controlplane.core.reconcile.commands import ActionOutcome

STORED_AT: Final = "key/"
"""Prefix of the keys' entries in the store."""
MAX_KEYS: Final = 10_000
"""Keys that a plane may have; beyond it, revoked ones are forgotten first, then none is created."""
MAX_NAME_CHARS: Final = 80
MAX_LABELS: Final = 20
LOCAL_OPERATOR: Final = "local operator"
OPERATOR_KEY_FILE: Final = "operator.key"
"""In the run folder of the machine on which the controller runs: a key for the commands there."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:@/+-]*")


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """What a new key shall be; see :class:`~controlplane.core.access.keys.KeyRecord`."""

    name: str
    team: str = ""
    role: Role = Role.CLIENT
    tiers: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    max_priority: Priority = Priority.NORMAL
    expires_unix_s: float | None = None
    labels: tuple[tuple[str, str], ...] = ()

    def problem(self) -> str:
        """What is wrong with it; empty if nothing is."""
        for what, text in (("name", self.name), ("team", self.team)):
            if what == "team" and not text:
                continue
            if len(text) > MAX_NAME_CHARS or _NAME.fullmatch(text) is None:
                return (
                    f"the {what} must begin with a letter or digit, may have blanks and . _ : @ / + - too, "
                    f"and has at most {MAX_NAME_CHARS} characters"
                )
        if len(self.labels) > MAX_LABELS:
            return f"a key may have {MAX_LABELS} labels"
        if any(len(text) > MAX_NAME_CHARS for label in self.labels for text in label):
            return f"a label's name and value may have {MAX_NAME_CHARS} characters"
        return ""


@dataclass(frozen=True, slots=True)
class KeyResponse:
    """The outcome of an action on a key, and why."""

    outcome: ActionOutcome
    reason: str
    record: KeyRecord | None = None
    """The key as it is now, without its secret."""
    key: str = ""
    """The new key, of ``create`` and ``rotate``: it can't be shown again."""


class KeyRegistry:
    """The keys of one plane. ``note(kind, subject, reason, actor)`` adds an entry to the audit log. Not safe
    for use by several threads; the controller's event loop owns it."""

    def __init__(self, unix_s: Callable[[], float], note: Callable[[str, str, str, str], None]) -> None:
        self._unix_s = unix_s
        self._note = note
        self._records: dict[str, KeyRecord] = {}
        self._fixed: dict[str, KeyRecord] = {}
        self._unsaved: set[str] = set()
        self._known = False
        self._table = UNKNOWN_KEYS

    # --- state ----------------------------------------------------------------------------------------------

    def restore(self, stored: StoredState) -> None:
        """Take over the stored keys; from now on the keys are known."""
        for key_id, record in stored.entries(STORED_AT, KeyRecord).items():
            self._records.setdefault(key_id, record)
        self._known = True
        self._changed()

    def take_unsaved(self) -> dict[str, Any]:
        """The entries of the store that have changed since the last call; None: removed."""
        values = {
            STORED_AT + key_id: to_value(self._records[key_id]) if key_id in self._records else None
            for key_id in self._unsaved
        }
        self._unsaved.clear()
        return values

    def add_fixed(self, records: Iterable[KeyRecord]) -> None:
        """Accept these keys too, which are not stored: they come from a file."""
        self._fixed = {record.key_id: record for record in records}
        self._changed()

    @property
    def table(self) -> KeyTable:
        """The keys for gateways."""
        return self._table

    @property
    def records(self) -> tuple[KeyRecord, ...]:
        """Every key, oldest first."""
        found = (*self._fixed.values(), *self._records.values())
        return tuple(sorted(found, key=lambda record: (record.created_unix_s, record.key_id)))

    # --- actions --------------------------------------------------------------------------------------------

    def create(self, request: KeyRequest, by: str) -> KeyResponse:
        """Create a key."""
        if not self._known:
            return KeyResponse(ActionOutcome.REFUSED, "the store with the keys can't be read now: try again")
        problem = request.problem()
        if problem:
            return KeyResponse(ActionOutcome.REFUSED, problem)
        if any(each.name == request.name and each.revoked_unix_s is None for each in self.records):
            return KeyResponse(ActionOutcome.REFUSED, f"there is a key named '{request.name}' already")
        if not self._make_room():
            return KeyResponse(ActionOutcome.REFUSED, f"there are {MAX_KEYS} keys: revoke some of them")
        key_id = secrets.token_hex(ID_BYTES)
        key = _new_key(key_id)
        record = KeyRecord(
            key_id=key_id,
            digest=digest_of(key),
            name=request.name,
            team=request.team,
            role=request.role,
            tiers=request.tiers,
            models=request.models,
            max_priority=request.max_priority,
            created_unix_s=self._unix_s(),
            created_by=by,
            expires_unix_s=request.expires_unix_s,
            labels=request.labels,
        )
        self._put(record, "key created", by, f"{record.name}, role {record.role}")
        return KeyResponse(ActionOutcome.DONE, f"key {key_id} is created", record, key)

    def revoke(self, subject: str, by: str) -> KeyResponse:
        """Make a key invalid from now on. ``subject`` is its id or name."""
        record = self._find(subject)
        if isinstance(record, KeyResponse):
            return record
        if record.revoked_unix_s is not None:
            return KeyResponse(ActionOutcome.UNCHANGED, f"key {record.key_id} is revoked already", record)
        revoked = replace(record, revoked_unix_s=self._unix_s())
        self._put(revoked, "key revoked", by, record.name)
        return KeyResponse(ActionOutcome.DONE, f"key {record.key_id} ({record.name}) is revoked", revoked)

    def rotate(self, subject: str, grace_s: float, by: str) -> KeyResponse:
        """Give a key a new secret. The present one stays valid for ``grace_s`` seconds."""
        record = self._find(subject)
        if isinstance(record, KeyResponse):
            return record
        if record.revoked_unix_s is not None:
            return KeyResponse(
                ActionOutcome.REFUSED, f"key {record.key_id} is revoked: create another", record
            )
        if not 0 <= grace_s <= 365 * 86_400:
            return KeyResponse(ActionOutcome.REFUSED, "the grace time must be from 0 s to a year", record)
        key = _new_key(record.key_id)
        rotated = replace(
            record,
            digest=digest_of(key),
            previous_digest=record.digest,
            previous_until_unix_s=self._unix_s() + grace_s,
        )
        self._put(rotated, "key rotated", by, f"{record.name}; the old one is valid for {grace_s:g} s")
        return KeyResponse(ActionOutcome.DONE, f"key {record.key_id} has a new secret", rotated, key)

    def _find(self, subject: str) -> KeyRecord | KeyResponse:
        """The key of this id or name, if it can be changed here."""
        if find_key(self._fixed.values(), subject) is not None:
            reason = f"key '{subject}' comes from a file: change it there"
            return KeyResponse(ActionOutcome.REFUSED, reason)
        found = find_key(self._records.values(), subject)
        if found is not None:
            return found
        reason = f"there is no key '{subject[:MAX_NAME_CHARS]}': `tierplane keys list` shows them"
        return KeyResponse(ActionOutcome.UNKNOWN, reason)

    def _make_room(self) -> bool:
        if len(self._records) < MAX_KEYS:
            return True
        revoked = [record for record in self._records.values() if record.revoked_unix_s is not None]
        if not revoked:
            return False
        oldest = min(revoked, key=lambda record: record.revoked_unix_s or 0.0)
        del self._records[oldest.key_id]
        self._unsaved.add(oldest.key_id)
        return True

    def _put(self, record: KeyRecord, kind: str, by: str, reason: str) -> None:
        self._records[record.key_id] = record
        self._unsaved.add(record.key_id)
        self._note(kind, record.key_id, reason, by)
        self._changed()

    def _changed(self) -> None:
        if not self._known:
            return
        records = self.records
        version = hashlib.sha256(msgspec.json.encode(records)).hexdigest()[:16]
        if version != self._table.version:
            self._table = KeyTable(version, records)


def _new_key(key_id: str) -> str:
    return f"{PREFIX}{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"


def local_operator(folder: Path, unix_s: float) -> KeyRecord:
    """The key of the commands on this machine, from the file in ``folder``, which is written if it is not
    there. Raises OSError."""
    path = folder / OPERATOR_KEY_FILE
    key = read_operator_key(folder)
    if not key:
        key = _new_key(secrets.token_hex(ID_BYTES))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w") as out:
            out.write(key + "\n")
        temporary.replace(path)
    return KeyRecord(
        key_id=key.split("_")[1],
        digest=digest_of(key),
        name=LOCAL_OPERATOR,
        role=Role.OPERATOR,
        max_priority=Priority.HIGH,
        created_unix_s=unix_s,
        created_by=OPERATOR_KEY_FILE,
    )


def read_operator_key(folder: Path) -> str:
    """The key of the commands on this machine; empty if there is none."""
    try:
        key = (folder / OPERATOR_KEY_FILE).read_text("utf-8").strip()
    except OSError:
        return ""
    return key if key.startswith(PREFIX) and key.count("_") >= 2 else ""
