"""Every route of the table asks for a key, on the gateway's own port and on Serve's ingress."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.config.access import AuthConfig
from controlplane.core.access.keys import KeyRecord, KeyTable, digest_of
from controlplane.core.access.roles import Permission, Role
from controlplane.gateway.gateway import Gateway
from controlplane.http.messages import Headers, Request
from tests.support.gateway import plane

PUBLIC = {"/health/live", "/health/ready"}
KEYS = {role: f"tp_{number:012x}_{role}" for number, role in enumerate(Role)}


class Kept:
    """A responder that keeps the status and the body."""

    started = gone = congested = False

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        self.status, self.headers, self.body, self.started = status, dict(headers), body, True

    def start(self, status: int, headers: Headers) -> None:
        self.status, self.headers, self.started = status, dict(headers), True

    def write(self, data: bytes) -> None:
        self.body += data

    async def drain(self) -> None: ...

    def finish(self) -> None: ...

    def abort(self) -> None: ...


def secured(**auth: Any) -> Gateway:
    gateway = Gateway(plane(auth=AuthConfig(enabled=True, **auth)), "g")
    records = tuple(
        KeyRecord(key.split("_")[1], digest_of(key), f"a {role}", role=role) for role, key in KEYS.items()
    )
    gateway.apply_keys(KeyTable("1", records))
    return gateway


async def ask(gateway: Gateway, method: str, path: str, key: str = "") -> Kept:
    headers = {b"authorization": f"Bearer {key}".encode()} if key else {}
    out = Kept()
    path = path.replace("{id}", "balanced")
    await gateway.handle(Request(method, path, "", headers, b"[]"), out)
    return out


async def test_every_route_answers_401_without_a_key_and_403_with_too_little() -> None:
    gateway = secured()
    assert {route.path for route in gateway.routes if route.permission is Permission.PUBLIC} == PUBLIC
    for route in gateway.routes:
        methods = [route.method, "HEAD"] if route.method == "GET" else [route.method]
        for method in methods:
            out = await ask(gateway, method, route.path)
            if route.path in PUBLIC:
                assert out.status in (200, 503), route.path
                continue
            assert out.status == 401, route.path
            assert b"www-authenticate" in out.headers
            assert (await ask(gateway, method, route.path, "tp_000000000000_wrong")).status == 401
            for role, key in KEYS.items():
                status = (await ask(gateway, method, route.path, key)).status
                assert (status == 403) is not role.allows(route.permission), (route.path, role)
                assert status != 401


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/v1/nothing", "/STATUS", "/status/", "//status", "/plane/"]
)
async def test_whoever_has_no_key_does_not_learn_what_there_is(path: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        out = await ask(secured(), method, path)
        assert out.status == 401
        assert b"/v1/models" not in out.body


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_a_wrong_method_is_no_way_around_a_key(method: str) -> None:
    gateway = secured()
    for route in gateway.routes:
        if route.path not in PUBLIC:
            assert (await ask(gateway, method, route.path)).status == 401


async def test_metrics_may_be_open() -> None:
    gateway = secured(open_metrics=True)
    assert (await ask(gateway, "GET", "/metrics")).status == 200
    assert (await ask(gateway, "GET", "/status")).status == 401


async def test_ten_thousand_wrong_keys_are_refused_and_leave_nothing() -> None:
    gateway = secured()
    right = KEYS[Role.OPERATOR]
    wrong = [right[:-1], right + "0", right.upper(), right.lower()[::-1], f" {right[1:]}", digest_of(right)]
    wrong += [f"{right[:-4]}{number:04x}" for number in range(10_000)]

    def sizes() -> dict[str, int]:
        values = vars(gateway.authenticator).items()
        return {name: len(value) for name, value in values if hasattr(value, "__len__")}

    before = sizes()
    for key in wrong:
        assert (await ask(gateway, "GET", "/status", key)).status == 401
    assert sizes() == before
    assert (await ask(gateway, "GET", "/status", right)).status == 200
