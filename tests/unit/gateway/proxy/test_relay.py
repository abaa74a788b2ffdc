from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest

from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.domain.endpoint import EndpointState
from controlplane.gateway.proxy.upstream import UpstreamConnection, UpstreamOrigin
from tests.support.gateway import CHAT, chat_body, plane, running, scripted_engine, take
from tests.support.waiting import until_async

THREE = ({"name": "lightweight"}, {"name": "balanced"}, {"name": "capable"})


async def test_a_response_names_its_tier_and_the_reason() -> None:
    async with running() as rig:
        await rig.engine("a")
        status, headers, value = await rig.post(CHAT, chat_body(max_tokens=4), x_request_id="mine-1")
        assert status == 200
        assert headers["x-tier"] == "balanced"
        assert headers["x-tier-reason"] == "default"
        assert headers["x-request-id"] == "mine-1"
        assert float(headers["x-gpu-seconds"]) >= 0
        assert value["usage"]["completion_tokens"] == 4
        assert value["model"] == "model-balanced"


async def test_a_stream_holds_no_token_ids_that_the_client_did_not_ask_for() -> None:
    async with running() as rig:
        await rig.engine("a")
        stream = await rig.stream(chat_body(max_tokens=5))
        assert stream.done
        assert b"token_ids" not in stream.raw
        with_ids = await rig.stream(chat_body(max_tokens=5, return_token_ids=True))
        assert b'"token_ids":[' in with_ids.raw
        assert with_ids.text == stream.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "auto", "prompt": "hello", "max_tokens": 4}),
        ("/v1/responses", {"model": "auto", "input": "hello", "max_output_tokens": 4}),
        (
            "/v1/messages",
            {"model": "auto", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]},
        ),
        ("/v1/embeddings", {"model": "auto", "input": "hello"}),
    ],
)
async def test_every_route_is_relayed(path: str, body: dict[str, Any]) -> None:
    async with running() as rig:
        await rig.engine("a")
        status, headers, value = await rig.post(path, body)
        assert status == 200, value
        assert headers["x-tier"] == "balanced"
        assert value["model"] == "model-balanced"
        if path in {"/v1/responses", "/v1/messages"}:
            async with rig.client.post(rig.base + path, json={**body, "stream": True}) as response:
                text = await response.text()
            assert ("response.completed" if path == "/v1/responses" else "message_stop") in text


@pytest.mark.parametrize(
    ("body", "headers", "tier"),
    [
        ({"model": "capable"}, {}, "capable"),
        ({"model": "model-lightweight"}, {}, "lightweight"),
        ({}, {}, "balanced"),
        ({}, {"x_complexity": "simple"}, "lightweight"),
        ({"metadata": {"complexity": "complex"}}, {}, "capable"),
        ({}, {"x_complexity": "simple", "x_min_tier": "balanced"}, "balanced"),
        ({"models": ["nonsense", "capable"]}, {}, "capable"),
    ],
)
async def test_the_tier_is_the_one_asked_for(
    body: dict[str, Any], headers: dict[str, str], tier: str
) -> None:
    async with running(plane(*THREE)) as rig:
        for policy in THREE:
            await rig.engine(policy["name"], policy["name"])
        status, response_headers, _ = await rig.post(CHAT, chat_body(max_tokens=1, **body), **headers)
        assert (status, response_headers["x-tier"]) == (200, tier)


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        ({"model": "nonsense"}, {}, 404, "no model 'nonsense'"),
        ({"model": 3}, {}, 400, "model"),
        ({}, {"x_complexity": "very"}, 400, "x-complexity must be one of simple, moderate, complex"),
        ({}, {"x_request_timeout_seconds": "soon"}, 400, "x-request-timeout-seconds must be a number"),
        ({"metadata": {"priority": "urgent"}}, {}, 400, "metadata.priority must be one of"),
        ({}, {"x_min_tier": "best"}, 400, "best"),
        ({"max_tokens": "many"}, {}, 400, ""),
    ],
)
async def test_the_error_for_a_wrong_request_names_what_is_wrong(
    body: dict[str, Any], headers: dict[str, str], status: int, says: str
) -> None:
    async with running() as rig:
        await rig.engine("a")
        answered_status, response_headers, value = await rig.post(CHAT, chat_body(**body), **headers)
        assert answered_status == status
        assert says in value["error"]["message"]
        assert response_headers["x-request-id"]
        assert response_headers["content-type"] == "application/json"


async def test_not_json_is_a_bad_request() -> None:
    async with running() as rig:
        await rig.engine("a")
        async with rig.client.post(rig.base + CHAT, data=b"{nope") as response:
            assert response.status == 400
            assert "not JSON" in (await response.json())["error"]["message"]


async def test_an_unchanged_body_is_relayed_byte_for_byte() -> None:
    seen: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        seen.append(await reader.readexactly(int(length[1])))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(engine, "127.0.0.1", 0)
    async with running() as rig:
        await rig.engine("a")
        port = server.sockets[0].getsockname()[1]
        rig.change("a", base_url=f"http://127.0.0.1:{port}", generation=2)
        odd = b'{ "model":"model-balanced",  "messages" : [], "x": 1.50, "y": "\\u00e9" }'
        async with rig.client.post(rig.base + CHAT, data=odd) as response:
            assert response.status == 200
        changed = odd.replace(b"model-balanced", b"auto")
        async with rig.client.post(rig.base + CHAT, data=changed) as response:
            assert response.status == 200
    server.close()
    await server.wait_closed()
    assert seen[0] == odd
    assert seen[1] == b'{"model":"model-balanced","messages":[],"x":1.50,"y":"\\u00e9"}'


async def test_a_refused_connection_is_retried_elsewhere_unnoticed() -> None:
    async with running() as rig:
        await rig.engine("a")
        await rig.engine("b")
        rig.kill("a")
        for _ in range(8):
            status, _, _ = await rig.post(CHAT, chat_body(max_tokens=1))
            assert status == 200


async def test_a_server_error_is_retried_elsewhere_and_counted() -> None:
    async with running() as rig:
        await rig.engine("a", error_rate=1.0)
        await rig.engine("b")
        responses = [await rig.post(CHAT, chat_body(max_tokens=1)) for _ in range(8)]
        assert {status for status, _, _ in responses} == {200}
        assert any(headers.get("x-attempts") == "2" for _, headers, _ in responses)
        async with rig.client.get(rig.base + "/metrics") as response:
            text = await response.text()
        assert 'tierplane_endpoint_failures_total{gateway="gateway-a",kind="server_error"' in text


async def test_an_engines_own_4xx_is_relayed_and_not_retried() -> None:
    async with running() as rig:
        await rig.engine("a")
        await rig.engine("b")
        status, headers, value = await rig.post(CHAT, chat_body(max_tokens=-1))
        assert status == 400
        assert "x-attempts" not in headers
        assert value["error"]["message"]


async def test_a_dead_tier_is_bridged_by_its_neighbour_and_gets_its_traffic_back() -> None:
    async with running(plane(*THREE)) as rig:
        await rig.engine("a", "balanced")
        await rig.engine("b", "capable")
        rig.change("a", state=EndpointState.RESTARTING)
        status, headers, _ = await rig.post(CHAT, chat_body(max_tokens=1))
        assert (status, headers["x-tier"]) == (200, "capable")
        assert "bridge: balanced restarting" in headers["x-tier-reason"]
        rig.change("a", state=EndpointState.READY)
        _, headers, _ = await rig.post(CHAT, chat_body(max_tokens=1))
        assert headers["x-tier"] == "balanced"


async def test_an_only_engine_that_restarts_loses_no_accepted_request() -> None:
    async with running(plane(retry={"max_attempts": 4})) as rig:
        await rig.engine("a", itl_ms=20)
        waiting = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=50)))
        await until_async(lambda: rig.served_by("a"))
        rig.kill("a")
        rig.change("a", state=EndpointState.RESTARTING)
        await until_async(lambda: rig.gateway.queue)
        assert not waiting.done()
        await rig.engine("a")
        status, _, value = await waiting
        assert status == 200
        assert value["usage"]["completion_tokens"] == 50


async def test_a_full_tier_spills_up_and_a_full_plane_queues_until_the_deadline() -> None:
    async with running(plane(*THREE)) as rig:
        await rig.engine("a", "balanced", limit=1, itl_ms=20)
        await rig.engine("b", "capable", limit=1, itl_ms=20)
        first = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=40)))
        await until_async(lambda: rig.served_by("a"))
        second = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=40)))
        await until_async(lambda: rig.served_by("b"))
        status, _, value = await rig.post(CHAT, chat_body(), x_request_timeout_seconds="0.2")
        assert status == 408, value
        (_, one, _), (_, two, _) = await first, await second
        assert one["x-tier"] == "balanced"
        assert two["x-tier"] == "capable"
        assert "spill: balanced" in two["x-tier-reason"]
        spilled = {"from_tier": "balanced", "to_tier": "capable", "kind": "spill"}
        assert rig.gateway.metrics.registry.get_sample_value("tierplane_spills_total", spilled) == 1


async def test_a_full_queue_says_when_to_retry() -> None:
    async with running(plane(queue={"capacity": 1})) as rig:
        await rig.engine("a", limit=1, itl_ms=20)
        running_one = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=30)))
        await until_async(lambda: rig.served_by("a"))
        queued = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=1), x_priority="high"))
        await until_async(lambda: rig.gateway.queue)
        status, headers, value = await rig.post(CHAT, chat_body(max_tokens=1))
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert "gateway.queue.capacity" in value["error"]["message"]
        assert (await running_one)[0] == (await queued)[0] == 200


async def test_a_client_that_leaves_is_removed_from_the_queue() -> None:
    async with running(plane(queue={"capacity": 1})) as rig:
        await rig.engine("a", limit=1, itl_ms=20)
        first = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=40)))
        await until_async(lambda: rig.served_by("a"))
        leaving = asyncio.ensure_future(rig.post(CHAT, chat_body(max_tokens=1)))
        await until_async(lambda: len(rig.gateway.queue) == 1)
        leaving.cancel()
        await until_async(lambda: len(rig.gateway.queue) == 0)
        assert (await first)[0] == 200


async def test_a_client_that_hangs_up_aborts_the_request_in_the_engine() -> None:
    async with running() as rig:
        server = await rig.engine("a", itl_ms=20, tokens=1000)
        async with rig.client.post(rig.base + CHAT, json=chat_body(stream=True, max_tokens=1000)) as response:
            await response.content.readline()
            assert rig.gateway.info().in_flight == 1
            response.close()
        await until_async(lambda: not server.http.connections)
        assert rig.gateway.info().in_flight == 0


@pytest.mark.parametrize(
    ("path", "last"),
    [
        (CHAT, b"data: [DONE]\n\n"),
        ("/v1/completions", b"data: [DONE]\n\n"),
        ("/v1/responses", b'data: {"type":"response.completed"}\n\n'),
        ("/v1/messages", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
async def test_a_client_that_leaves_at_the_last_event_was_served(path: str, last: bytes, whole: bool) -> None:
    """OpenAI's client does not wait for the end of the body, which may come a little after ``[DONE]``."""
    begun = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"text":"x","token_ids":[7]}]}\n\n'
    async with running() as rig, scripted_engine(begun + last if whole else begun) as url:
        await rig.engine("a")
        rig.change("a", base_url=url, generation=2)
        got = await take(rig, chat_body(prompt="x", input="x"), last if whole else begun[:20], path)
        assert got.endswith(last) is whole
        value = rig.gateway.metrics.registry.get_sample_value
        fate = {"outcome": "ok", "reason": "stream"} if whole else {"outcome": "cancelled", "reason": "499"}
        await until_async(lambda: value("tierplane_requests_total", {"tier": "balanced", **fate}))
        assert rig.gateway.ledger.tiers["balanced"].requests == int(whole)
        assert rig.gateway.info().in_flight == 0
        families = rig.gateway.metrics.registry.collect()
        samples = [family for family in families if family.name == "tierplane_requests"]
        assert sum(s.value for each in samples for s in each.samples if s.name.endswith("_total")) == 1


async def test_an_engine_that_passes_health_checks_but_gives_no_tokens_is_found_by_its_silence() -> None:
    async with running(plane(silence_timeout_s=0.3)) as rig:
        await rig.engine("a", hang=True)
        await rig.engine("b")
        streams = await asyncio.gather(*(rig.stream(chat_body(f"n {i}", max_tokens=2)) for i in range(6)))
        assert all(stream.done for stream in streams)


async def test_a_request_whose_first_token_times_out_is_retried_elsewhere() -> None:
    async with running(plane(first_token_timeout_s=0.3, silence_timeout_s=30)) as rig:
        await rig.engine("a", ttft_ms=60_000)
        await rig.engine("b")
        streams = await asyncio.gather(*(rig.stream(chat_body(f"n {i}", max_tokens=2)) for i in range(6)))
        assert all(stream.done for stream in streams)
        assert any(stream.headers.get("x-attempts") == "2" for stream in streams)


async def test_a_hedge_replaces_a_slow_first_token() -> None:
    async with running(plane(hedge_after_s=0.1, first_token_timeout_s=30)) as rig:
        await rig.engine("a", ttft_ms=5_000)
        await rig.engine("b")
        for i in range(4):
            stream = await asyncio.wait_for(rig.stream(chat_body(f"n {i}", max_tokens=2)), 3)
            assert stream.done
        await until_async(lambda: rig.gateway.info().in_flight == 0)


async def test_hedged_requests_on_few_connections_all_end(monkeypatch: pytest.MonkeyPatch) -> None:
    released_too_early = 0
    release = UpstreamOrigin.release

    def checked(origin: UpstreamOrigin, connection: UpstreamConnection) -> None:
        nonlocal released_too_early
        released_too_early += connection._waiter is not None
        release(origin, connection)

    monkeypatch.setattr(UpstreamOrigin, "release", checked)
    config = plane(hedge_after_s=0.002, first_token_timeout_s=30, request_timeout_s=10)
    async with running(config) as rig:
        for name in ("a", "b"):
            await rig.engine(name, ttft_ms=4, itl_ms=1, jitter=0.5, limit=64)

        async def client(number: int) -> None:
            for turn in range(10):
                stream = await rig.stream(chat_body(f"n {number} {turn}", max_tokens=1))
                assert stream.done

        await asyncio.wait_for(asyncio.gather(*(client(number) for number in range(16))), 60)
        await until_async(lambda: rig.gateway.info().in_flight == 0)
        assert not rig.gateway._timeouts._attempts
        assert rig.gateway.metrics.hedges.labels("won")._value.get() > 0
    assert released_too_early == 0


async def test_limits_are_shared_with_other_gateways() -> None:
    async with running() as rig:
        await rig.engine("a", limit=4)
        others = tuple(GatewayInfo(name, "", "") for name in ("gateway-a", "gateway-b"))
        rig.publish(others)
        assert rig.gateway.endpoint_table.pools[0].limit == 2


async def test_health_models_status_usage_and_explain() -> None:
    async with running(plane(*THREE)) as rig:
        status, value = await rig.get("/health")
        assert (status, value["status"]) == (503, "unhealthy")
        assert (await rig.get("/health/ready"))[0] == 503
        assert (await rig.get("/health/live"))[0] == 200
        await rig.engine("a", "balanced")
        rig.endpoints["a"] = replace(rig.endpoints["a"], secret="very-secret")
        rig.publish()
        status, value = await rig.get("/health")
        assert (status, value["status"]) == (200, "degraded")
        assert "lightweight: no replica has reported yet" in value["why"]
        assert (await rig.get("/health/ready"))[0] == 200
        _, value = await rig.get("/v1/models")
        assert [model["id"] for model in value["data"]][:4] == ["auto", "lightweight", "balanced", "capable"]
        async with rig.client.get(rig.base + "/status") as response:
            assert "very-secret" not in await response.text()
        await rig.post(CHAT, chat_body(max_tokens=3), x_session_id="s1")
        _, value = await rig.get("/usage?session=s1")
        assert value["usage"]["generated_tokens"] == 3
        _, _, explanation = await rig.post("/v1/route", {"model": "capable"})
        assert explanation["outcome"] == "send"
        assert explanation["bridged"]
        assert explanation["endpoints"][0]["endpoint"] == "a"


async def test_unknown_paths_and_methods() -> None:
    async with running() as rig:
        assert (await rig.get("/nothing"))[0] == 404
        assert (await rig.get(CHAT))[0] == 405


async def test_a_stream_past_its_deadline_ends_with_that_error_and_counts_as_no_lost_engine() -> None:
    async with running() as rig:
        await rig.engine("a", itl_ms=50.0)
        await rig.engine("b", itl_ms=50.0)
        stream = await rig.stream(chat_body(max_tokens=100), x_request_timeout_seconds="0.5")
        assert stream.error is not None
        assert stream.error["code"] == "deadline_exceeded"
        assert not stream.done
        assert 3 < len(stream.text.split()) < 20
        _, health = await rig.get("/health")
        assert all(each["in_flight"] == 0 for each in health["tiers"]["balanced"]["endpoints"])
        assert 'tierplane_resumes_total{method="refused"}' not in rig.gateway._own_metrics()
