"""TLS of a server: handshakes, client certificates, bounds, and files that change or are wrong."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from controlplane.config.access import TlsConfig
from controlplane.errors import SetupError
from controlplane.http.limits import ServerLimits
from controlplane.http.server import HttpServer
from controlplane.http.tls import CHECK_S, ServerTls, file_warnings, server_context
from tests.support.certificates import Authority, Pair
from tests.support.http_server import echo, serving
from tests.support.waiting import until_async

GET = b"GET /here HTTP/1.1\r\nhost: localhost\r\n\r\n"
SETTING = "gateway.tls"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def config(pair: Pair, **more: Any) -> TlsConfig:
    return TlsConfig(cert_file=str(pair.cert), key_file=str(pair.key), **more)


def tls_of(pair: Pair, **more: Any) -> ServerTls:
    return ServerTls(config(pair, **more), SETTING)


@asynccontextmanager
async def connected(
    port: int, context: ssl.SSLContext
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def get(port: int, context: ssl.SSLContext) -> bytes:
    async with connected(port, context) as (reader, writer):
        writer.write(GET)
        return await asyncio.wait_for(reader.readuntil(b"/here"), 5)


def in_both_loops(test: Callable[[Authority], Awaitable[None]]) -> Callable[[Authority, str], None]:
    """The test in asyncio's own event loop, and in uvloop's, in which the gateway runs."""

    def run(authority: Authority, loop: str) -> None:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None)
        with runner:
            runner.run(asyncio.wait_for(test(authority), 30))

    run.__name__ = test.__name__
    return pytest.mark.parametrize("loop", ["asyncio", "uvloop"])(run)


@in_both_loops
async def test_requests_are_answered_over_tls(authority: Authority) -> None:
    async with serving(echo, tls=tls_of(authority.issue("server"))) as (server, port):
        async with connected(port, authority.client()) as (reader, writer):
            for _ in range(2):
                writer.write(GET)
                assert (await reader.readuntil(b"/here")).startswith(b"HTTP/1.1 200 OK\r\n")
            assert len(server.connections) == 1
            protocol = writer.get_extra_info("ssl_object")
            assert protocol.version() == "TLSv1.3"
        await until_async(lambda: not server.connections)


@in_both_loops
async def test_a_stream_and_a_large_body_pass_whole(authority: Authority) -> None:
    body = b"x" * 3_000_000
    async with serving(echo, tls=tls_of(authority.issue("server")), max_body_bytes=4_000_000) as (_, port):
        async with connected(port, authority.client()) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 3000000" in head
            assert await reader.readexactly(len(body)) == body
            writer.write(b"GET /stream HTTP/1.1\r\nhost: h\r\n\r\n")
            assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"three\r\n0\r\n\r\n")


@in_both_loops
async def test_http_1_1_is_negotiated_and_versions_before_1_2_are_refused(authority: Authority) -> None:
    async with serving(echo, tls=tls_of(authority.issue("server"))) as (_, port):
        offering = authority.client()
        offering.set_alpn_protocols(["h2", "http/1.1"])
        async with connected(port, offering) as (_, writer):
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        old = authority.client()
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((OSError, EOFError)):
            await get(port, old)


@in_both_loops
async def test_a_client_certificate_is_asked_for(authority: Authority) -> None:
    tls = tls_of(authority.issue("server"), client_ca_file=str(authority.file))
    async with serving(echo, tls=tls) as (server, port):
        assert b"200 OK" in await get(port, authority.client(authority.issue("client")))
        with pytest.raises((OSError, EOFError)):
            await get(port, authority.client())
        folder = authority.file.parent / "other"
        folder.mkdir()
        with pytest.raises((OSError, EOFError)):
            await get(port, authority.client(Authority(folder, "stranger").issue("mallory")))
        await until_async(lambda: not server.connections)


@in_both_loops
async def test_a_client_certificate_may_be_optional_but_never_a_strangers(authority: Authority) -> None:
    tls = tls_of(authority.issue("server"), client_ca_file=str(authority.file), require_client_cert=False)
    async with serving(echo, tls=tls) as (_, port):
        assert b"200 OK" in await get(port, authority.client())
        folder = authority.file.parent / "other"
        folder.mkdir()
        with pytest.raises((OSError, EOFError)):
            await get(port, authority.client(Authority(folder, "stranger").issue("mallory")))


@in_both_loops
async def test_slow_handshakes_hold_nobody_and_end(authority: Authority) -> None:
    limits = ServerLimits(handshake_s=1.0)
    async with serving(echo, tls=tls_of(authority.issue("server")), limits=limits) as (server, port):
        slow = [await asyncio.open_connection("localhost", port) for _ in range(20)]
        await until_async(lambda: len(server.connections) == len(slow))
        assert b"200 OK" in await get(port, authority.client())
        for reader, writer in slow:
            assert await reader.read() == b""
            writer.close()
        await until_async(lambda: not server.connections)


@in_both_loops
async def test_handshakes_count_as_connections_and_the_oldest_make_room(authority: Authority) -> None:
    limits = ServerLimits(connections=3)
    async with serving(echo, tls=tls_of(authority.issue("server")), limits=limits) as (server, port):
        slow = [await asyncio.open_connection("localhost", port) for _ in range(6)]
        await until_async(lambda: sum(reader.at_eof() for reader, _ in slow) >= 3)
        assert len(server.connections) <= 3
        assert b"200 OK" in await get(port, authority.client())
        for _, writer in slow:
            writer.close()


@in_both_loops
async def test_what_is_not_tls_is_refused(authority: Authority) -> None:
    async with serving(echo, tls=tls_of(authority.issue("server"))) as (server, port):
        reader, writer = await asyncio.open_connection("localhost", port)
        writer.write(GET)
        assert b"HTTP/" not in await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await until_async(lambda: not server.connections)


@in_both_loops
async def test_a_refused_request_gets_its_error_over_tls(authority: Authority) -> None:
    limits = ServerLimits(linger_s=0.2)
    async with serving(echo, tls=tls_of(authority.issue("server")), limits=limits) as (server, port):
        async with connected(port, authority.client()) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 999999\r\n\r\n" + b"x" * 100_000)
            assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
        await until_async(lambda: not server.connections)


@in_both_loops
async def test_a_drain_ends_handshakes_and_lets_requests_finish(authority: Authority) -> None:
    server = HttpServer(echo, max_body_bytes=100, tls=tls_of(authority.issue("server")))
    port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with connected(port, authority.client()) as (_, asking):
        asking.write(b"GET /slow HTTP/1.1\r\nhost: h\r\n\r\n")
        await until_async(lambda: any(connection.busy for connection in server.connections))
        draining = asyncio.ensure_future(server.drain(1.5))
        assert await asyncio.wait_for(reader.read(), 1.4) == b""  # before the request is cut off
        await draining
    writer.close()
    assert not server.connections


@in_both_loops
async def test_a_changed_certificate_is_used_and_a_broken_one_is_not(authority: Authority) -> None:
    first, second = authority.issue("first"), authority.issue("second")
    current = authority.issue("current")
    shutil.copy(first.cert, current.cert)
    shutil.copy(first.key, current.key)
    tls = tls_of(current)

    async def name(port: int) -> str:
        async with connected(port, authority.client()) as (_, writer):
            return str(writer.get_extra_info("peercert")["subject"][0][0][1])

    async with serving(echo, tls=tls, limits=ServerLimits(sweep_s=0.02)) as (_, port):
        assert await name(port) == "first"
        async with connected(port, authority.client()) as (reader, writer):
            shutil.copy(second.cert, current.cert)  # half of the pair: it can't be used
            tls.refresh(tls._checked_s + CHECK_S)
            await tls.close()
            assert await name(port) == "first"
            shutil.copy(second.key, current.key)
            tls.refresh(tls._checked_s + CHECK_S)
            await tls.close()
            assert await name(port) == "second"
            current.cert.write_text("nothing")
            tls.reload()
            current.cert.unlink()
            tls.reload()
            assert await name(port) == "second"
            writer.write(GET)  # a connection from before the change goes on
            assert b"200 OK" in await reader.readuntil(b"/here")


def test_files_behind_a_link_that_is_switched_are_read_again(authority: Authority, tmp_path: Path) -> None:
    """Kubernetes updates a mounted Secret this way."""
    for name in ("one", "two"):
        pair = authority.issue(name)
        (tmp_path / f"..{name}").mkdir()
        pair.cert.rename(tmp_path / f"..{name}" / "tls.crt")
        pair.key.rename(tmp_path / f"..{name}" / "tls.key")
    (tmp_path / "data").symlink_to("..one")
    pair = Pair(tmp_path / "data" / "tls.crt", tmp_path / "data" / "tls.key")
    tls = tls_of(pair)
    before = tls.context
    tls.reload()
    assert tls.context is before
    (tmp_path / "new").symlink_to("..two")
    (tmp_path / "new").rename(tmp_path / "data")
    tls.reload()
    assert tls.context is not before


def broken(case: str, authority: Authority, folder: Path) -> TlsConfig:
    pair = authority.issue("server")
    match case:
        case "no certificate":
            pair.cert.unlink()
        case "no key":
            pair.key.unlink()
        case "a folder":
            pair.key.unlink()
            pair.key.mkdir()
        case "another key":
            pair = Pair(pair.cert, authority.issue("other").key)
        case "a password":
            pair = authority.issue("server", password=b"secret")
        case "no PEM certificate":
            pair.cert.write_text("certificate")
        case "no PEM key":
            pair.key.write_text("key")
        case "a broken certificate":
            lines = pair.cert.read_text().splitlines()
            pair.cert.write_text("\n".join([*lines[:3], *lines[4:]]))
        case "too long":
            pair.cert.write_bytes(b"x" * (1024 * 1024 + 1))
        case "no authority":
            return config(pair, client_ca_file=str(folder / "none.pem"))
        case "a broken authority":
            (folder / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
            return config(pair, client_ca_file=str(folder / "ca.pem"))
    return config(pair)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no certificate", r"gateway.tls.cert_file: there is no file .*server.crt: create it"),
        ("no key", r"gateway.tls.key_file: there is no file .*server.key: create it"),
        ("a folder", r"gateway.tls.key_file: .*server.key can't be read \(Is a directory\): let the user"),
        ("another key", r"gateway.tls.key_file: the key in .*other.key is not that of the first certificate"),
        ("a password", r"gateway.tls.key_file: the key in .* has a password: write it without: openssl pkey"),
        ("no PEM certificate", r"gateway.tls.cert_file: .* has no usable certificate .*: write it as PEM"),
        ("no PEM key", r"gateway.tls.key_file: .* is not a usable private key .*: write it as PEM"),
        ("a broken certificate", r"gateway.tls.cert_file: .* has no usable certificate .*: write it as PEM"),
        ("too long", r"gateway.tls.cert_file: .* is over 1048576 bytes"),
        ("no authority", r"gateway.tls.client_ca_file: there is no file .*none.pem"),
        ("a broken authority", r"gateway.tls.client_ca_file: .* has no usable certificate"),
    ],
)
def test_files_that_can_not_be_used_name_their_setting_and_the_remedy(
    case: str, says: str, authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(SetupError) as caught:
        server_context(broken(case, authority, tmp_path), SETTING)
    assert re.match(says, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("days", "says"), [(-1, "has expired"), (3.1, "expires in 3 days"), (15, None), (400, None)]
)
def test_a_certificate_that_ends_soon_is_a_warning(
    days: float, says: str | None, authority: Authority
) -> None:
    found = file_warnings(config(authority.issue("server", days=days)), SETTING)
    if says is None:
        assert found == []
    else:
        assert [warning.setting for warning in found] == ["gateway.tls.cert_file"]
        assert says in found[0].message


def test_a_key_that_everybody_can_read_is_a_warning(authority: Authority) -> None:
    pair = authority.issue("server")
    pair.key.chmod(0o644)
    assert [warning.setting for warning in file_warnings(config(pair), SETTING)] == ["gateway.tls.key_file"]
