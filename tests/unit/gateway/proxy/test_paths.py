"""The rarer paths of a request: whatever happens, every slot is given back, once."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from controlplane.core.routing.retry import AttemptFailure
from controlplane.gateway.gateway import Gateway
from controlplane.gateway.proxy.upstream import UpstreamFailure
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.waiting import forever, until_async

CHUNK = (
    '{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    '[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@asynccontextmanager
async def scripted(
    rig: Rig, response: bytes, *, reset: bool = False, stay_open: bool = False
) -> AsyncIterator[None]:
    """Endpoint ``a`` answers every request with these bytes, then closes, resets or stays silent."""
    open_writers: list[asyncio.StreamWriter] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(found[1]) if found else 0)
        writer.write(response)
        await writer.drain()
        if stay_open:
            open_writers.append(writer)
        elif reset:
            await asyncio.sleep(0.05)
            own: socket.socket = writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()

    server = await asyncio.start_server(engine, "127.0.0.1", 0)
    await rig.engine("a")
    rig.change("a", base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", generation=2)
    try:
        yield
    finally:
        for writer in open_writers:
            writer.transport.abort()
        server.close()
        await server.wait_closed()


def idle(rig: Rig) -> bool:
    """Nothing is in use any more: no slot, no watched attempt."""
    endpoint_table = rig.gateway.endpoint_table
    return (
        not rig.gateway.info().in_flight
        and not any(load.awaiting_first for load in endpoint_table.by_endpoint_id.values())
        and not rig.gateway._timeouts._attempts
    )


async def becomes_idle(rig: Rig) -> bool:
    return await until_async(lambda: idle(rig))


def ended(rig: Rig) -> float:
    """How many requests were counted as ended."""
    return sum(
        sample.value
        for family in rig.gateway.metrics.registry.collect()
        if family.name == "tierplane_requests"
        for sample in family.samples
        if sample.name.endswith("_total")
    )


# -- slots are given back ------------------------------------------------------------------------------


async def test_of_two_hedged_attempts_the_one_that_failed_first_releases_its_slot() -> None:
    async with running(plane(hedge_after_s=0.05, first_token_timeout_s=30)) as rig:
        await rig.engine("a", ttft_ms=400)
        await rig.engine("b", ttft_ms=400)
        loads = rig.gateway.endpoint_table.by_endpoint_id.values()

        async def kill_first() -> None:
            await until_async(lambda: all(load.in_flight for load in loads))
            rig.kill(next(iter(loads)).endpoint.endpoint_id)

        stream, _ = await asyncio.gather(rig.stream(chat_body(max_tokens=2)), kill_first())
        assert stream.done
        assert await becomes_idle(rig)


async def test_a_body_whose_member_names_are_not_utf_8_is_the_clients_fault() -> None:
    async with running() as rig:
        await rig.engine("a")
        body = b'{"model":"auto","messages":[{"role":"user","content":"x"}],"\xff":1}'
        async with rig.client.post(rig.base + CHAT, data=body) as response:
            assert response.status == 400
        assert idle(rig)
        assert ended(rig) == 1


async def test_an_unforeseen_error_of_an_attempt_releases_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as rig:
        await rig.engine("a")

        async def fails(*_: Any, **__: Any) -> None:
            raise UnicodeError("label empty or too long")

        monkeypatch.setattr("controlplane.gateway.proxy.upstream.UpstreamOrigin.acquire", fails)
        assert (await rig.post(CHAT, chat_body()))[0] == 500
        assert idle(rig)
        assert ended(rig) == 1


async def test_a_lost_stream_whose_events_can_not_be_read_ends_with_an_error_event() -> None:
    async with running() as rig:
        response = STREAM_HEAD + b"data: {not json}\n\n"
        async with scripted(rig, response):
            async with rig.client.post(rig.base + CHAT, json=chat_body(stream=True)) as got:
                text = await got.text()
        assert "endpoint_lost" in text
        assert idle(rig)
        assert ended(rig) == 1


async def test_a_client_that_stops_reading_holds_its_slot_until_the_deadline_at_most() -> None:
    async with running(plane(token_timeout_s=0.2, silence_timeout_s=0.2)) as rig:
        event = b"data: " + (CHUNK % ("x" * 2000)).encode() + b"\n\n"
        async with scripted(rig, STREAM_HEAD + event * 8000, stay_open=True):
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.gateway.port, limit=1024)
            body = b'{"model":"model-balanced","messages":[],"stream":true}'
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-request-timeout-seconds: 1\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            started_s = time.monotonic()
            await reader.readexactly(100)
            load = rig.gateway.endpoint_table.by_endpoint_id["a"]
            assert load.in_flight == 1
            assert await becomes_idle(rig)
            assert time.monotonic() - started_s > 0.6
            # It was the client that was slow: the engine is not to blame.
            assert not load.breaker._consecutive
            counted = rig.gateway.metrics.registry.get_sample_value
            blamed = {"tier": "balanced", "kind": str(AttemptFailure.TOKEN_TIMEOUT)}
            assert counted("tierplane_endpoint_failures_total", blamed) is None
            writer.transport.abort()
        assert ended(rig) == 1


# -- streams of other engines ----------------------------------------------------------------------------


async def test_events_that_end_with_carriage_returns_are_relayed_as_they_come() -> None:
    async with running() as rig:
        events = [(CHUNK % word).encode() for word in ("one", "two")]
        data = b"".join(b"data: " + event + b"\r\n\r\n" for event in events)
        async with scripted(rig, STREAM_HEAD + data + b"data: [DONE]\r\n\r\n"):
            stream = await rig.stream(chat_body())
        assert stream.done
        assert stream.text == "onetwo"
        assert stream.error is None


@pytest.mark.parametrize(
    ("path", "event"),
    [
        (CHAT, b"data: " + (CHUNK % "say data: [DONE] to end").encode()),
        ("/v1/messages", b'event: content_block_delta\ndata: {"delta":{"text":"a message_stop event"}}'),
        ("/v1/responses", b'event: x\ndata: {"delta":"[DONE] is the end"}'),
    ],
)
async def test_text_that_looks_like_the_end_of_a_stream_is_not_its_end(path: str, event: bytes) -> None:
    async with running() as rig, scripted(rig, STREAM_HEAD + event + b"\n\n"):
        body = {**chat_body(), "stream": True, "input": "x", "max_tokens": 5}
        async with rig.client.post(rig.base + path, json=body) as response:
            text = await response.text()
        assert "endpoint_lost" in text or "was not resumed" in text


async def test_a_messages_stream_that_begins_with_an_error_is_retried_elsewhere() -> None:
    async with running() as rig:
        error = b'event: error\ndata: {"type":"error","error":{"type":"x","message":"boom"}}\n\n'
        async with scripted(rig, STREAM_HEAD + error):
            await rig.engine("b")
            for i in range(4):
                body = {**chat_body(f"n {i}", max_tokens=3), "stream": True}
                async with rig.client.post(rig.base + "/v1/messages", json=body) as response:
                    text = await response.text()
                assert "boom" not in text
                assert "message_stop" in text


async def test_an_answer_without_a_length_that_is_reset_is_not_whole() -> None:
    async with running(plane(retry={"max_attempts": 1})) as rig:
        async with scripted(rig, JSON_HEAD + b'connection: close\r\n\r\n{"half":', reset=True):
            status, _, value = await rig.post(CHAT, chat_body())
        assert status == 502, value


# -- what clients see ----------------------------------------------------------------------------------


async def test_errors_contain_neither_addresses_nor_an_engines_message_about_our_key() -> None:
    async with running(plane(retry={"max_attempts": 1})) as rig:
        error = b'{"error":"wrong key sk-12***89"}'
        head = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: %d\r\n\r\n" % len(error)
        async with scripted(rig, head + error):
            status, _, value = await rig.post(CHAT, chat_body())
            assert status == 502
            assert "sk-12" not in value["error"]["message"]
        status, _, value = await rig.post(CHAT, chat_body())
        assert status == 503
        assert "127.0.0.1" not in value["error"]["message"]


@pytest.mark.parametrize("timeout", ["1" + "0" * 400, '"nan"', "true"])
async def test_a_time_out_that_is_not_a_time_is_a_bad_request(timeout: str) -> None:
    async with running() as rig:
        await rig.engine("a")
        body = b'{"model":"auto","messages":[],"metadata":{"timeout":%b}}' % timeout.encode()
        async with rig.client.post(rig.base + CHAT, data=body) as response:
            assert response.status == 400


# -- deadlines -------------------------------------------------------------------------------------------


async def test_the_deadline_of_a_running_stream_is_reported_as_such() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=50)
        stream = await rig.stream(chat_body(max_tokens=100), x_request_timeout_seconds="0.5")
        assert stream.error is not None
        assert stream.error["code"] == "deadline_exceeded"
        assert ended(rig) == 1
        assert idle(rig)


async def test_a_probe_that_only_reached_its_deadline_does_not_close_the_breaker() -> None:
    async with running() as rig:
        await rig.engine("a", hang=True)
        breaker = rig.gateway.endpoint_table.by_endpoint_id["a"].breaker
        loop = asyncio.get_running_loop()
        breaker.failure(loop.time() - 1.05, weight=3)
        assert breaker.state == "open"
        status, _, _ = await rig.post(CHAT, chat_body(), x_request_timeout_seconds="0.3")
        assert status == 408
        assert breaker.state != "closed"


async def test_connecting_takes_no_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(plane(connect_timeout_s=5)) as rig:
        await rig.engine("a")
        loop = asyncio.get_running_loop()

        async def never(*_: Any, **__: Any) -> Any:
            await forever()

        monkeypatch.setattr(rig.gateway._connections._loop, "create_connection", never, raising=False)
        rig.gateway._connections._by_key.clear()
        connections = rig.gateway._connections.to(rig.gateway.endpoint_table.by_endpoint_id["a"])
        started_s = loop.time()
        with pytest.raises(UpstreamFailure) as caught:
            await connections.origin.acquire(fresh=True, deadline_s=started_s + 0.1)
        assert caught.value.kind is None
        assert loop.time() - started_s < 1


async def test_a_long_answer_that_is_not_streamed_is_not_taken_for_a_stalled_engine() -> None:
    async with running(plane(silence_timeout_s=0.2)) as rig:
        await rig.engine("a", ttft_ms=900)
        await rig.engine("b", ttft_ms=900)
        status, headers, _ = await rig.post(CHAT, chat_body(max_tokens=1))
        assert status == 200
        assert "x-attempts" not in headers


async def test_a_first_token_that_is_slow_everywhere_comes_in_the_end() -> None:
    async with running(plane(silence_timeout_s=0.3)) as rig:
        await rig.engine("a", ttft_ms=900)
        await rig.engine("b", ttft_ms=900)
        assert (await rig.stream(chat_body(max_tokens=1))).done


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://10.1.2.3:"), ("127.0.0.1", "http://127.0.0.1:")],
)
async def test_a_gateway_on_every_address_is_reached_by_its_nodes_address(host: str, url: str) -> None:
    gateway = Gateway(plane(), "gateway-a")
    await gateway.start(host, 0, "10.1.2.3")
    assert gateway.info().url.startswith(url)
    await gateway.drain(0.1)


async def test_a_hedge_that_wins_at_another_tier_names_that_tier() -> None:
    tiers = ({"name": "balanced"}, {"name": "capable"})
    async with running(plane(*tiers, hedge_after_s=0.05, first_token_timeout_s=30)) as rig:
        await rig.engine("a", limit=1, ttft_ms=2_000)
        await rig.engine("b", "capable")
        stream = await rig.stream(chat_body(max_tokens=2))
        assert stream.done
        assert stream.headers["x-tier"] == "capable"
        assert await becomes_idle(rig)


async def test_clients_that_leave_at_any_moment_leave_nothing_behind() -> None:
    async with running(plane(hedge_after_s=0.03, queue={"capacity": 50})) as rig:
        for name in "ab":
            await rig.engine(name, limit=3, ttft_ms=60, itl_ms=5)

        async def leave_after(delay_s: float) -> None:
            task = asyncio.ensure_future(rig.stream(chat_body(max_tokens=10)))
            await asyncio.sleep(delay_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        await asyncio.gather(*(leave_after(0.004 * i) for i in range(60)))
        assert await becomes_idle(rig)
        assert not rig.gateway.queue
        assert all(each.meter._running == 0 for each in rig.gateway._connections._by_key.values())
        assert ended(rig) <= 60
