"""The HTTP server with clients that are odd, slow or hostile, and what an engine needs of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable

import pytest

from controlplane.http.limits import MAX_HEAD_BYTES, ServerLimits
from controlplane.http.messages import Request, Responder
from controlplane.http.server import HttpResponder, HttpServer
from tests.support.http_server import serving, talk
from tests.support.waiting import loop_turns, until_async

BIG = b"x" * (8 * 1024 * 1024)


async def handler(request: Request, out: Responder) -> None:
    """``/big`` sends much, ``/later`` two pieces with a pause, any other path itself."""
    if request.path == "/big":
        out.send(200, [], BIG)
    elif request.path == "/later":
        out.start(200, [])
        out.write(b"one ")
        await asyncio.sleep(0.3)
        out.write(b"two")
        out.finish()
    else:
        out.send(200, [], request.path.encode() + b" " + request.body)


async def test_a_drain_answers_a_client_that_has_connected_and_not_yet_asked() -> None:
    async with serving(handler) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        draining = asyncio.ensure_future(server.drain(5))
        await until_async(lambda: server.draining)
        writer.write(b"GET /first HTTP/1.1\r\nhost: h\r\n\r\n")
        response = await asyncio.wait_for(reader.read(), 5)
        assert response.endswith(b"/first ")
        assert b"connection: close" in response
        writer.close()
        await draining


async def test_a_drain_answers_a_client_that_the_kernel_has_connected_only() -> None:
    async with serving(handler) as (server, port):
        client = socket.create_connection(("127.0.0.1", port))  # the event loop has not seen it
        client.sendall(b"GET /waiting HTTP/1.1\r\nhost: h\r\n\r\n")
        await server.drain(5)
        client.settimeout(5)
        assert client.recv(4096).endswith(b"/waiting ")
        client.close()


async def test_a_drain_lets_a_response_go_out_complete() -> None:
    async with serving(handler) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(b"GET /big HTTP/1.1\r\nhost: h\r\n\r\n")
        await reader.readexactly(100)
        draining = asyncio.ensure_future(server.drain(5))
        await until_async(lambda: server.draining)
        rest = await reader.read()
        await draining
        assert rest.endswith(BIG[:1000])
        assert len(rest) > len(BIG) - 100
        writer.close()


async def test_a_client_that_takes_nothing_is_dropped() -> None:
    limits = ServerLimits(sweep_s=0.05, idle_s=0.3, stall_s=0.3)
    async with serving(handler, limits=limits) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(b"GET /big HTTP/1.1\r\nhost: h\r\n\r\n")
        await reader.readexactly(100)
        await until_async(lambda: not server.connections)
        writer.transport.abort()


async def test_headers_are_bounded_behind_a_pipelined_request_too() -> None:
    async with serving(handler) as (_, port):
        start = b"GET /1 HTTP/1.1\r\nhost: h\r\n\r\nGET /2 HTTP/1.1\r\nx: "
        data = await talk(port, start, b"y" * MAX_HEAD_BYTES, b"y" * 100)
        assert b"/1" in data
        assert b"headers are over" in data


async def test_what_follows_a_chunked_body_is_bounded() -> None:
    async with serving(handler) as (_, port):
        head = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
        data = await talk(port, head + b"x: ", b"y" * MAX_HEAD_BYTES, b"y" * 1000)
        assert data.startswith(b"HTTP/1.1 400")


async def test_an_offer_to_upgrade_is_not_taken_up() -> None:
    async with serving(handler) as (_, port):
        head = b"POST /x HTTP/1.1\r\nhost: h\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
        head += b"http2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\ncontent-length: 4\r\n\r\nbody"
        data = await talk(port, head + b"GET /y HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        assert data.startswith(b"HTTP/1.1 200 OK")
        assert b"/x body" in data
        assert b"/y" in data


async def test_a_malformed_request_does_not_truncate_the_response_before_it() -> None:
    async with serving(handler) as (_, port):
        data = await talk(port, b"GET /later HTTP/1.1\r\nhost: h\r\n\r\n", b"nonsense\r\n\r\n")
        assert b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\nHTTP/1.1 400" in data


async def test_a_continue_is_not_written_into_a_running_response() -> None:
    async with serving(handler) as (_, port):
        second = b"POST /y HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n"
        second += b"connection: close\r\n\r\n"
        data = await talk(port, b"GET /later HTTP/1.1\r\nhost: h\r\n\r\n", second, b"ok")
        assert b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n" in data
        assert data.endswith(b"/y ok")


async def test_a_client_that_is_still_sending_too_much_gets_the_error() -> None:
    async with serving(handler) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n")
        block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(40):
            writer.write(block)
            await writer.drain()
            await loop_turns()
        data = await asyncio.wait_for(reader.read(), 5)
        assert data.startswith(b"HTTP/1.1 413")
        writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"content-length: 99999999999999999999999999\r\n",
    ],
)
async def test_bodies_of_two_lengths_are_refused(head: bytes) -> None:
    async with serving(handler) as (_, port):
        data = await talk(port, b"POST / HTTP/1.1\r\nhost: h\r\n" + head + b"\r\n0\r\n\r\n")
        assert data.startswith(b"HTTP/1.1 400")
        assert data.count(b"HTTP/1.1 400") == 1


async def test_an_absolute_target_is_its_path() -> None:
    async with serving(handler) as (_, port):
        data = await talk(port, b"GET http://h:1/p?q=1 HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        assert data.endswith(b"/p ")


# What an engine's server needs besides a gateway's.

GET = b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n"
LAST = b"GET %b HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"


def respond_at_once(request: Request, out: HttpResponder) -> Awaitable[None] | None:
    """``/now`` needs no task, ``/later`` does, ``/bug`` fails; the rest use what only this server offers."""

    async def later() -> None:
        await asyncio.sleep(0)
        out.send(200, [], b"later")

    if request.path == "/later":
        return later()
    if request.path == "/bug":
        raise RuntimeError("a defect of the handler")
    if request.path == "/chunks":
        out.start(200, [])
        out.write_chunks([b"one", b"x" * 5000])
        out.write_chunks([b"two"], finish=True)
    elif request.path == "/truncated":
        out.start(200, [])
        out.write_chunks([b"one"])
        out.truncate()
    else:
        out.send(200, [], b"now")
    return None


async def test_responses_sent_at_once_and_later_keep_the_order_of_their_requests() -> None:
    async with serving(respond_at_once) as (_, port):
        data = await talk(port, GET % b"/now" + GET % b"/later" + GET % b"/now" + LAST % b"/later")
        bodies = [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 200 OK\r\n")[1:]]
        assert bodies == [b"now", b"later", b"now", b"later"]


async def test_a_response_sent_at_once_takes_no_task() -> None:
    async with serving(respond_at_once) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        before = asyncio.all_tasks()
        writer.write(GET % b"/now")
        assert (await reader.readuntil(b"now")).startswith(b"HTTP/1.1 200 OK")
        assert asyncio.all_tasks() == before
        (connection,) = server.connections
        assert not connection.busy
        writer.close()


async def test_pieces_are_chunks_of_their_own() -> None:
    async with serving(respond_at_once) as (_, port):
        data = await talk(port, LAST % b"/chunks")
        assert data.endswith(b"\r\n\r\n3\r\none\r\n1388\r\n" + b"x" * 5000 + b"\r\n3\r\ntwo\r\n0\r\n\r\n")
        data = await talk(port, b"GET /chunks HTTP/1.0\r\nhost: h\r\n\r\n")
        assert data.endswith(b"\r\n\r\none" + b"x" * 5000 + b"two")
        data = await talk(port, b"HEAD /chunks HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        assert data.endswith(b"chunked\r\n\r\n")


async def test_a_truncated_response_is_delivered_without_its_end() -> None:
    async with serving(respond_at_once) as (_, port):
        data = await talk(port, GET % b"/truncated")
        assert data.endswith(b"\r\n\r\n3\r\none\r\n")


async def test_a_defect_of_the_handler_closes_the_connection_and_blames_no_client() -> None:
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with serving(respond_at_once) as (_, port):
        assert await talk(port, GET % b"/bug") == b""
        assert "data_received" in str(failures[0]["message"])


async def test_a_port_is_not_shared_unless_allowed() -> None:
    async with serving(respond_at_once, share_port=False) as (_, port):
        with pytest.raises(OSError, match="in use"):
            await HttpServer(respond_at_once, max_body_bytes=2000).start("127.0.0.1", port)


async def test_a_server_can_stop_listening_and_start_again() -> None:
    async with serving(respond_at_once, share_port=False) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET % b"/now")
        await reader.readuntil(b"now")
        server.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        server.abort_connections()
        assert await reader.read() == b""
        writer.close()
        assert await server.start("127.0.0.1", port) == port
        assert (await talk(port, LAST % b"/now")).endswith(b"now")
