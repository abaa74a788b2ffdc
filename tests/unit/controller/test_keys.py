"""The keys of a plane."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from controlplane.controller.keys import (
    OPERATOR_KEY_FILE,
    STORED_AT,
    KeyRegistry,
    KeyRequest,
    local_operator,
    read_operator_key,
)
from controlplane.core.access.keys import digest_of
from controlplane.core.access.roles import Role
from controlplane.core.json_values import StoredState
from controlplane.core.reconcile.commands import ActionOutcome

NOW_S = 1000.0


class Plane:
    """A registry, what it has noted, and what it has stored."""

    def __init__(self, stored: dict[str, object] | None = None) -> None:
        self.notes: list[tuple[str, str, str, str]] = []
        self.keys = KeyRegistry(lambda: NOW_S, lambda *note: self.notes.append(note))
        self.stored: dict[str, object] = stored or {}
        self.keys.restore(StoredState(self.stored))

    def save(self) -> dict[str, object]:
        for key, value in self.keys.take_unsaved().items():
            if value is None:
                self.stored.pop(key, None)
            else:
                self.stored[key] = value
        return self.stored


def test_a_key_is_shown_once_and_only_its_digest_is_stored() -> None:
    plane = Plane()
    made = plane.keys.create(KeyRequest("agent", "search", tiers=("capable",)), "ada")
    assert made.outcome is ActionOutcome.DONE
    assert made.record is not None
    assert made.record.digest == digest_of(made.key)
    assert made.key.split("_")[1] == made.record.key_id
    assert made.key not in repr(plane.save())
    assert made.key.split("_", 2)[2] not in repr((plane.stored, plane.notes, plane.keys.table))
    assert plane.notes == [("key created", made.record.key_id, "agent, role client", "ada")]
    again = Plane(plane.stored)
    assert again.keys.records == (made.record,)
    assert again.keys.table == plane.keys.table


def test_a_revoked_key_stays_listed_and_its_name_is_free_again() -> None:
    plane = Plane()
    first = plane.keys.create(KeyRequest("agent"), "ada")
    version = plane.keys.table.version
    assert plane.keys.create(KeyRequest("agent"), "ada").outcome is ActionOutcome.REFUSED
    assert plane.keys.revoke("agent", "bob").outcome is ActionOutcome.DONE
    assert plane.keys.table.version != version
    assert plane.keys.revoke("agent", "bob").outcome is ActionOutcome.UNCHANGED
    second = plane.keys.create(KeyRequest("agent"), "ada")
    assert second.record is not None
    assert second.key != first.key
    assert plane.keys.revoke("agent", "bob").record is not None
    assert {record.revoked_unix_s for record in plane.keys.records} == {NOW_S}
    assert plane.keys.revoke("nobody", "bob").outcome is ActionOutcome.UNKNOWN


def test_a_rotation_keeps_the_old_secret_for_the_grace_time() -> None:
    plane = Plane()
    first = plane.keys.create(KeyRequest("agent"), "ada")
    rotated = plane.keys.rotate("agent", 60.0, "bob")
    assert rotated.record is not None
    assert rotated.record.digest == digest_of(rotated.key)
    assert rotated.record.previous_digest == digest_of(first.key)
    assert rotated.record.previous_until_unix_s == NOW_S + 60.0
    assert plane.keys.rotate("agent", -1.0, "bob").outcome is ActionOutcome.REFUSED
    plane.keys.revoke("agent", "bob")
    assert plane.keys.rotate("agent", 0.0, "bob").outcome is ActionOutcome.REFUSED


@pytest.mark.parametrize(
    "request_",
    [
        KeyRequest(""),
        KeyRequest("a" * 81),
        KeyRequest("a\nb"),
        KeyRequest("a", team="\x1b[2J"),
        KeyRequest("a", labels=(("b", "c"),) * 21),
    ],
)
def test_a_request_that_makes_no_sense_creates_nothing(request_: KeyRequest) -> None:
    plane = Plane()
    refused = plane.keys.create(request_, "ada")
    assert refused.outcome is ActionOutcome.REFUSED
    assert refused.reason
    assert not refused.key
    assert plane.keys.records == ()


def test_no_key_is_created_while_the_store_is_not_known() -> None:
    keys = KeyRegistry(lambda: NOW_S, lambda *_: None)
    assert keys.create(KeyRequest("agent"), "ada").outcome is ActionOutcome.REFUSED
    assert keys.table.version == ""


def test_a_damaged_key_does_not_hide_the_others() -> None:
    plane = Plane()
    plane.keys.create(KeyRequest("agent"), "ada")
    stored = StoredState({**plane.save(), f"{STORED_AT}ff": {"key_id": 3}})
    keys = KeyRegistry(lambda: NOW_S, lambda *_: None)
    keys.restore(stored)
    assert [record.name for record in keys.records] == ["agent"]
    assert set(stored.damaged) == {f"{STORED_AT}ff"}


def test_the_local_operators_key_is_readable_by_its_owner_only_and_stays_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert read_operator_key(folder) == ""
    made = local_operator(folder, NOW_S)
    path = folder / OPERATOR_KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert digest_of(read_operator_key(folder)) == made.digest
    assert made.role is Role.OPERATOR
    assert local_operator(folder, NOW_S).digest == made.digest
    plane = Plane()
    plane.keys.add_fixed([made])
    assert plane.keys.table.records == (made,)
    assert plane.keys.revoke("local operator", "ada").outcome is ActionOutcome.REFUSED
    assert plane.save() == {}
