"""Which names and pages may use a server that checks no key."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from controlplane.http.access import AccessRules, is_loopback
from controlplane.http.messages import Request, Responder
from tests.support.gateway import CHAT, chat_body, plane, running
from tests.support.http_server import serving, talk
from tests.support.waiting import forever

LOOPBACK = AccessRules(
    loopback_only=True, allowed_hosts=["gw.example.com"], cors_origins=["https://ok.example"]
)
OPEN = AccessRules(loopback_only=False)
CLOSE = b"connection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        *[(name, True) for name in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")],
        *[(name, False) for name in ("0.0.0.0", "::", "10.0.0.1", "gw.example", "")],
    ],
)
def test_loopback_addresses(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8080", 0),
        (b"[::1]:8080", 0),
        (b"localhost", 0),
        (b"LOCALHOST.:1", 0),
        (b"10.1.2.3", 0),
        (b"gateway:8080", 0),
        (b"a.localhost", 0),
        (b"host.docker.internal:8080", 0),
        (b"gw.example.com", 0),
        (b"GW.Example.com.:80", 0),
        (b"evil.example", 403),
        (b"evil.example:8080", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"gw.example.com.evil.example", 403),
        (b"localhost.evil.example", 403),
        (b"1.2.3.4.5", 403),
        (b"a b", 400),
        (b"a,b", 400),
        (b"evil.example/path", 400),
        (b"user@localhost", 400),
        (b"localhost:port", 400),
        (b"[::1", 400),
    ],
)
def test_hosts_of_a_server_on_loopback(host: bytes, status: int) -> None:
    for _ in range(2):  # what was checked is remembered
        error = LOOPBACK.refusal("GET", {b"host": host})
        assert (error.status if error else 0) == status
    if status == 403:
        assert error is not None
        assert "gateway.allowed_hosts" in error.message


def test_a_server_on_other_addresses_takes_every_host_unless_some_are_listed() -> None:
    assert OPEN.refusal("GET", {b"host": b"gw.example"}) is None
    listed = AccessRules(loopback_only=False, allowed_hosts=["gw.example"])
    assert listed.refusal("GET", {b"host": b"gw.example:443"}) is None
    assert listed.refusal("GET", {b"host": b"10.0.0.1"}) is not None


def test_very_many_hosts_are_not_remembered() -> None:
    rules = AccessRules(loopback_only=False)
    for i in range(2000):
        assert rules.refusal("GET", {b"host": b"h%d" % i}) is None
    assert len(rules.good_hosts) <= 256


JSON = {b"content-type": b"application/json"}


@pytest.mark.parametrize(
    ("method", "headers", "allowed"),
    [
        ("POST", {}, True),
        ("POST", {b"content-type": b"application/x-www-form-urlencoded"}, True),
        ("POST", {b"origin": b"https://evil.example"}, False),
        ("POST", {b"origin": b"https://evil.example", **JSON}, False),
        ("POST", {b"origin": b"null", **JSON}, False),
        ("POST", {b"origin": b"http://127.0.0.1:3000", **JSON}, False),
        ("POST", {b"origin": b"http://127.0.0.1:8080", **JSON}, True),
        ("POST", {b"origin": b"HTTP://127.0.0.1:8080", b"sec-fetch-site": b"same-origin"}, True),
        ("POST", {b"sec-fetch-site": b"cross-site"}, False),
        ("POST", {b"sec-fetch-site": b"same-site"}, False),
        ("POST", {b"sec-fetch-site": b"none"}, True),
        ("POST", {b"origin": b"https://evil.example", b"sec-fetch-site": b"cross-site"}, False),
        ("DELETE", {b"origin": b"https://evil.example"}, False),
        ("POST", {b"origin": b"https://ok.example", **JSON}, True),
        (
            "POST",
            {b"origin": b"https://ok.example", b"content-type": b"application/json; charset=utf-8"},
            True,
        ),
        ("POST", {b"origin": b"https://ok.example", b"sec-fetch-site": b"cross-site", **JSON}, True),
        ("POST", {b"origin": b"https://ok.example", b"content-type": b"text/plain"}, False),
        (
            "POST",
            {b"origin": b"https://ok.example", b"content-type": b"Multipart/Form-Data; boundary=x"},
            False,
        ),
        ("POST", {b"origin": b"https://ok.example"}, False),
        ("POST", {b"origin": b"https://ok.example.evil.example", **JSON}, False),
        ("GET", {b"origin": b"https://evil.example", b"sec-fetch-site": b"cross-site"}, True),
        ("HEAD", {b"sec-fetch-site": b"cross-site"}, True),
    ],
)
def test_pages_of_other_sites(method: str, headers: dict[bytes, bytes], allowed: bool) -> None:
    error = LOOPBACK.refusal(method, {b"host": b"127.0.0.1:8080", **headers})
    assert (error is None) is allowed
    if error is not None:
        assert error.status == 403


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        (b"https://gw.example", b"gw.example", True),
        (b"https://gw.example", b"gw.example:443", True),
        (b"http://gw.example:80", b"gw.example", True),
        (b"https://gw.example:8443", b"gw.example:8443", True),
        (b"https://gw.example", b"gw.example:8443", False),
        (b"https://other.example", b"gw.example", False),
    ],
)
def test_a_page_of_the_gateways_own_name_is_no_other_site(origin: bytes, host: bytes, same: bool) -> None:
    assert (OPEN.refusal("POST", {b"host": host, b"origin": origin}) is None) is same


def test_only_allowed_pages_may_read_responses() -> None:
    assert LOOPBACK.response_headers({b"origin": b"https://evil.example"}) == []
    headers = dict(LOOPBACK.response_headers({b"origin": b"https://ok.example"}))
    assert headers[b"access-control-allow-origin"] == b"https://ok.example"
    assert b"x-request-id" in headers[b"access-control-expose-headers"]
    assert headers[b"vary"] == b"origin"
    everyone = AccessRules(loopback_only=True, cors_origins=["*"])
    assert dict(everyone.response_headers({b"origin": b"null"}))[b"access-control-allow-origin"] == b"null"


async def hello(request: Request, out: Responder) -> None:
    """Sends a word."""
    out.send(200, [(b"x-tier", b"a")], b"hello")


async def test_a_preflight_and_the_request_after_it() -> None:
    async with serving(hello, access=LOOPBACK) as (_, port):
        ask = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\norigin: https://%b\r\n"
        ask += b"access-control-request-method: POST\r\n"
        ask += b"access-control-request-headers: authorization,content-type,x-stainless-os\r\n" + CLOSE
        data = await talk(port, ask % b"ok.example")
        assert data.startswith(b"HTTP/1.1 200")
        assert b"access-control-allow-origin: https://ok.example\r\n" in data
        assert b"access-control-allow-headers: authorization,content-type,x-stainless-os\r\n" in data
        assert b"access-control-allow-methods: GET, HEAD, POST\r\n" in data
        data = await talk(port, ask % b"evil.example")
        assert data.startswith(b"HTTP/1.1 403")
        assert b"access-control-allow" not in data
        post = b"POST / HTTP/1.1\r\nhost: localhost\r\norigin: https://ok.example\r\n"
        post += b"content-type: application/json\r\ncontent-length: 2\r\n" + CLOSE
        data = await talk(port, post, b"{}")
        assert b"access-control-allow-origin: https://ok.example\r\n" in data
        assert data.endswith(b"hello")


async def test_a_preflight_can_not_inject_headers() -> None:
    async with serving(hello, access=LOOPBACK) as (_, port):
        ask = b"OPTIONS / HTTP/1.1\r\nhost: localhost\r\norigin: https://ok.example\r\n"
        ask += b"access-control-request-method: POST\r\naccess-control-request-headers: a: b;\x7f\r\n" + CLOSE
        assert b"access-control-allow-headers" not in await talk(port, ask)


@pytest.mark.parametrize("way", ["own port", "ingress"])
async def test_the_gateway_refuses_foreign_names_and_pages_and_counts_them(way: str) -> None:
    async with running(plane(cors_origins=["https://ok.example"])) as rig:
        await rig.engine("a")

        async def ask(method: str, path: str, body: bytes = b"", **headers: str) -> int:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            if way == "own port":
                async with rig.client.request(method, rig.base + path, data=body, headers=names) as response:
                    return response.status
            lines = [(name.encode(), value.encode()) for name, value in {"host": "h", **names}.items()]
            scope = {"type": "http", "method": method, "path": path, "headers": lines, "query_string": b""}
            return await status_of(rig.gateway.app, scope, body)

        assert await ask("GET", "/status", host="evil.example") == 403
        assert await ask("GET", "/status", host="localhost:1") == 200
        assert await ask("POST", CHAT, b"{}", origin="https://evil.example", content_type="text/plain") == 403
        body = json.dumps(chat_body()).encode()
        assert (
            await ask("POST", CHAT, body, origin="https://ok.example", content_type="application/json") == 200
        )
        counted = rig.gateway.metrics.text()
        assert 'reason="forbidden"' in counted


async def status_of(app: Any, scope: dict[str, Any], body: bytes) -> int:
    """The status with which the ingress answers."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await forever()

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 5)
    return int(sent[0]["status"])
