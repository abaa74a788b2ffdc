"""Traces: one span for each request, between the client's and the engine's; nothing when off."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from controlplane.gateway.telemetry.tracing import otlp_tracing
from controlplane.http.messages import Request, Responder
from tests.support.gateway import CHAT, Rig, chat_body, running
from tests.support.http_server import serving

TRACE_ID, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


@asynccontextmanager
async def traced(
    status: int = 200, ratio: float = 1.0
) -> AsyncIterator[tuple[Rig, list[Request], list[Span]]]:
    """A rig, the requests that its engine received, and the spans that the collector received."""
    received: list[Request] = []
    spans: list[Span] = []

    async def engine(request: Request, out: Responder) -> None:
        received.append(request)
        out.send(status, [(b"content-type", b"application/json")], json.dumps(ANSWER).encode())

    async def collector(request: Request, out: Responder) -> None:
        compressed = request.header(b"content-encoding") == "gzip"
        body = gzip.decompress(request.body) if compressed else request.body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans)
        out.send(200, [(b"content-type", b"application/x-protobuf")], b"")

    async with (
        serving(engine) as (_, engine_port),
        serving(collector, max_body_bytes=1 << 20) as (_, port),
        running() as rig,
    ):
        await rig.engine("e")
        rig.change("e", base_url=f"http://127.0.0.1:{engine_port}", generation=9)
        tracing = otlp_tracing(f"http://127.0.0.1:{port}/v1/traces", "gateway-a", ratio)
        rig.gateway.trace(tracing)
        yield rig, received, spans
        await asyncio.to_thread(tracing._provider.force_flush, 5000)


async def test_a_request_is_one_span_between_the_clients_and_the_engines() -> None:
    async with traced() as (rig, received, spans):
        parent = f"00-{TRACE_ID}-{CLIENT_SPAN}-01"
        status, headers, _ = await rig.post(CHAT, chat_body(), traceparent=parent)
        assert status == 200
    (span,) = spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, CLIENT_SPAN)
    assert received[-1].header(b"traceparent") == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    assert received[-1].header(b"x-request-id") == headers["x-request-id"]
    attributes = {each.key: each.value.string_value or each.value.int_value for each in span.attributes}
    assert attributes["tierplane.outcome"] == "ok"
    assert attributes["tierplane.tier"] == "balanced"
    assert attributes["tierplane.attempts"] == 1
    assert attributes["tierplane.request_id"] == headers["x-request-id"]
    assert span.end_time_unix_nano > span.start_time_unix_nano


async def test_a_failed_request_says_so() -> None:
    async with traced(status=500) as (rig, _, spans):
        status, _, _ = await rig.post(CHAT, chat_body())
        assert status >= 500
    (span,) = spans
    assert span.status.code == 2
    assert not span.parent_span_id


async def test_what_is_not_sampled_is_passed_on_as_such_and_not_sent() -> None:
    async with traced(ratio=0.0) as (rig, received, spans):
        await rig.post(CHAT, chat_body())
    assert spans == []
    passed_on = re.fullmatch(
        "00-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})", received[-1].header(b"traceparent")
    )
    assert passed_on is not None
    assert int(passed_on[1], 16) & 1 == 0


async def test_off_means_nothing_is_added() -> None:
    async with traced() as (rig, received, _):
        rig.gateway._tracing = rig.gateway.metrics.on_finished = None
        await rig.post(CHAT, chat_body(), traceparent=f"00-{TRACE_ID}-{CLIENT_SPAN}-01")
    assert not received[-1].header(b"traceparent")


async def test_an_unreachable_collector_does_not_disturb_requests(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as rig:
        await rig.engine("e")
        rig.gateway.trace(otlp_tracing("http://127.0.0.1:9/v1/traces", "gateway-a", 1.0))
        status, _, _ = await rig.post(CHAT, chat_body())
        assert status == 200
