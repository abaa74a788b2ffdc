"""Who a request comes from."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

import pytest

from controlplane.core.access.keys import KeyRecord, KeyTable, digest_of
from controlplane.core.access.roles import Permission, Role
from controlplane.errors import KeysUnknown, Unauthorized
from controlplane.gateway.access.authentication import MAX_CREDENTIAL_BYTES, Authenticator

KEY, OLD_KEY = b"tp_0123456789ab_new", b"tp_0123456789ab_old"
NOW_S = 1000.0


def record(**changes: object) -> KeyRecord:
    values = {"key_id": "0123456789ab", "digest": digest_of(KEY), "name": "agent", **changes}
    return KeyRecord(**values)  # type: ignore[arg-type]


def authenticator(*records: KeyRecord, unix_s: float = NOW_S) -> Authenticator:
    made = Authenticator(unix_s=lambda: unix_s)
    made.apply(KeyTable("1", records))
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"authorization", b"Bearer " + KEY),
        (b"authorization", b"bearer   " + KEY + b" "),
        (b"x-api-key", KEY),
        (b"authorization", b"Basic " + base64.b64encode(b"anyone:" + KEY)),
    ],
)
def test_a_key_comes_in_any_of_the_usual_headers(name: bytes, value: bytes) -> None:
    principal = authenticator(record(team="search")).principal({name: value})
    assert (principal.id, principal.team) == ("0123456789ab", "search")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": KEY},
        {b"authorization": b"Digest " + KEY},
        {b"authorization": b"Bearer " + KEY + b"x"},
        {b"authorization": b"Bearer " + KEY[:-1]},
        {b"authorization": b"Bearer " + KEY.upper()},
        {b"authorization": b"Bearer " + hashlib.sha256(KEY).hexdigest().encode()},
        {b"authorization": b"Bearer 0123456789ab"},
        {b"authorization": b"Basic !!!"},
        {b"authorization": b"Basic " + base64.b64encode(KEY + b":")},
        {b"authorization": b"Bearer " + b"a" * (MAX_CREDENTIAL_BYTES + 1)},
        {b"authorization": b"Basic " + b"a" * (3 * MAX_CREDENTIAL_BYTES)},
        {b"authorization": b"Bearer \xff\x00"},
        {b"authorization": b"Bearer wrong", b"x-api-key": KEY},
    ],
)
def test_nothing_else_gets_in(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(Unauthorized) as caught:
        authenticator(record()).principal(headers)
    assert KEY.decode() not in caught.value.message


def test_a_revoked_an_expired_and_a_rotated_key_say_so() -> None:
    headers = {b"x-api-key": KEY}
    for changes, reason in (
        ({"revoked_unix_s": 1.0}, "revoked"),
        ({"expires_unix_s": NOW_S}, "expired"),
        (
            {"digest": "00" * 32, "previous_digest": digest_of(KEY), "previous_until_unix_s": NOW_S},
            "rotation",
        ),
    ):
        with pytest.raises(Unauthorized, match=reason):
            authenticator(record(**changes)).principal(headers)


def test_both_secrets_are_valid_while_the_grace_time_lasts() -> None:
    rotated = record(previous_digest=digest_of(OLD_KEY), previous_until_unix_s=NOW_S + 1)
    for key in (KEY, OLD_KEY):
        assert authenticator(rotated).principal({b"x-api-key": key}).name == "agent"
    revoked = authenticator(replace(rotated, revoked_unix_s=1.0))
    with pytest.raises(Unauthorized):
        revoked.principal({b"x-api-key": OLD_KEY})


def test_before_the_first_table_nobody_gets_in_and_an_unknown_table_changes_nothing() -> None:
    made = Authenticator(unix_s=lambda: NOW_S)
    with pytest.raises(KeysUnknown):
        made.principal({b"x-api-key": KEY})
    made.apply(KeyTable("1", (record(),)))
    made.apply(KeyTable(""))
    assert made.principal({b"x-api-key": KEY}).name == "agent"
    made.apply(KeyTable("2", ()))
    with pytest.raises(Unauthorized):
        made.principal({b"x-api-key": KEY})


def test_roles_allow_what_they_are_for() -> None:
    allowed = {role: {each for each in Permission if role.allows(each)} for role in Role}
    any_key = {Permission.PUBLIC, Permission.KEY}
    assert allowed[Role.CLIENT] == any_key | {Permission.INFER}
    assert allowed[Role.VIEWER] == any_key | {Permission.READ}
    assert allowed[Role.OPERATOR] == set(Permission)
