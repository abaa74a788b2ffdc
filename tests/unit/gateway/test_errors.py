"""What a client is told when its request fails before an engine answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.routing.dispatcher import Dispatcher
from controlplane.http.messages import anthropic_type
from tests.support.gateway import CHAT, chat_body, plane, running

MESSAGES = "/v1/messages"
INVALID = "invalid_request_error"
DEEP = b'{"model":"auto","messages":[],"x":%b%b}'


@pytest.mark.parametrize("path", [CHAT, "/v1/route", "/v1/completions", "/v1/responses", MESSAGES])
@pytest.mark.parametrize("depth", [1500, 100_000])
async def test_a_body_that_is_nested_too_deep_is_the_clients_fault(path: str, depth: int) -> None:
    async with running() as rig:
        await rig.engine("a")
        data = DEEP % (b"[" * depth, b"]" * depth)
        async with rig.client.post(rig.base + path, data=data) as response:
            text = await response.text()
            assert response.status == 400
            assert "nested too deep" in text


@pytest.mark.parametrize("depth", [1500, 100_000])
@pytest.mark.parametrize(
    ("path", "begin", "end"), [("/batch", b"", b""), ("/chat", b'{"message":"x","id":', b"}")]
)
async def test_agents_that_nest_too_deep_are_told_so(path: str, begin: bytes, end: bytes, depth: int) -> None:
    async with running() as rig:
        data = begin + b"[" * depth + b"]" * depth + end
        async with rig.client.post(rig.base + path, data=data) as response:
            assert response.status == 400


async def test_a_body_with_a_byte_order_mark_is_served() -> None:
    async with running() as rig:
        await rig.engine("a")
        data = b"\xef\xbb\xbf" + json.dumps(chat_body(max_tokens=2)).encode()
        async with rig.client.post(rig.base + CHAT, data=data) as response:
            assert response.status == 200
        async with rig.client.post(
            rig.base + CHAT, data=json.dumps(chat_body()).encode("utf-16")
        ) as response:
            assert response.status == 400
            assert "UTF-16" in (await response.json())["error"]["message"]


async def test_no_name_is_repeated_for_each_endpoint() -> None:
    async with running() as rig:
        await rig.engine("a")
        await rig.engine("b")
        for body in ({"model": "x" * 1_000_000}, {"models": ["x" * 500] * 60}):
            _, _, value = await rig.post("/v1/route", body)
            assert len(json.dumps(value)) < 4000


@asynccontextmanager
async def engine_that_answers(status: int, body: bytes) -> AsyncIterator[str]:
    """The address of an engine that gives every request the same answer."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        begin = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        writer.write(begin % (status, len(body)) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


# -- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (404, "not_found_error"), (405, "invalid_request_error"), (408, "timeout_error"),
        (413, "request_too_large"), (422, "invalid_request_error"), (429, "rate_limit_error"),
        (500, "api_error"), (502, "api_error"), (503, "overloaded_error"), (529, "overloaded_error"),
    ],
)  # fmt: skip
def test_anthropics_names_of_errors(status: int, kind: str) -> None:
    assert anthropic_type(status) == kind


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind"),
    [
        ({"model": 1}, {}, 400, "invalid_request_error"),
        ({"model": "none"}, {}, 404, "not_found_error"),
        ({"model": "balanced", "x": "x" * 5000}, {}, 413, "request_too_large"),
        ({"model": "balanced"}, {"x_request_timeout_seconds": "0.05"}, 408, "timeout_error"),
    ],
)
async def test_errors_of_messages_are_anthropics(
    body: dict[str, Any], headers: dict[str, str], status: int, kind: str
) -> None:
    async with running(plane(max_body_bytes=4096)) as rig:
        await rig.engine("a", ttft_ms=5000)
        messages = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], **body}
        answered, head, value = await rig.post(MESSAGES, messages, **headers)
        assert answered == status
        assert value["type"] == "error"
        assert value["error"]["type"] == kind
        assert value["error"]["message"]
        if status != 413:  # refused before it was a request
            assert value["request_id"] == head["x-request-id"]


@pytest.mark.parametrize(
    ("answer", "status", "kind", "says"),
    [
        (b'{"error":{"message":"too long","type":"BadRequestError","code":400}}', 400, INVALID, "too long"),
        (
            b'{"type":"error","error":{"type":"BadRequestError","message":"too long"}}',
            400,
            INVALID,
            "too long",
        ),
        (b'{"detail":"no such thing"}', 422, INVALID, "no such thing"),
        (b"<h1>Not Found</h1>", 404, "not_found_error", "Not Found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_own_error_is_anthropics_under_messages(
    answer: bytes, status: int, kind: str, says: str, stream: bool
) -> None:
    async with engine_that_answers(status, answer) as url, running() as rig:
        await rig.engine("a")
        rig.change("a", base_url=url)
        body = {"model": "auto", "max_tokens": 5, "messages": [], "stream": stream}
        answered, head, value = await rig.post(MESSAGES, body)
        assert (answered, value["type"], value["error"]["type"]) == (status, "error", kind)
        assert says in value["error"]["message"]
        assert value["request_id"] == head["x-request-id"]


async def test_an_engine_that_can_not_count_tokens_is_named() -> None:
    async with engine_that_answers(404, b'{"detail":"Not Found"}') as url, running() as rig:
        await rig.engine("a")
        rig.change("a", base_url=url)
        status, head, value = await rig.post("/v1/messages/count_tokens", {"model": "auto", "messages": []})
        assert (status, head["x-should-retry"]) == (501, "false")
        assert "tier 'balanced' does not count tokens" in value["error"]["message"]


async def test_an_engines_response_that_is_nested_too_deep_fails_no_batch() -> None:
    deep = b'{"choices":[{"message":{"content":"x"}}],"y":%b%b}' % (b"[" * 1500, b"]" * 1500)
    async with engine_that_answers(200, deep) as url, running() as rig:
        await rig.engine("a")
        rig.change("a", base_url=url)
        status, _, value = await rig.post("/batch", [{"message": "x"}, {"messag": "x"}])
        assert (status, value["failed"]) == (200, 2)
        assert value["results"][0]["error"]["code"] == "engine_error"


async def test_a_plane_without_engines_is_overloaded_in_anthropics_words() -> None:
    async with running() as rig:
        await rig.engine("a")
        rig.change("a", state=EndpointState.FAILED)
        status, head, value = await rig.post(MESSAGES, {"model": "auto", "max_tokens": 1, "messages": []})
        assert (status, value["error"]["type"]) == (503, "overloaded_error")
        assert head["retry-after"]


async def test_unknown_urls_and_wrong_methods_have_codes_of_their_own() -> None:
    async with running() as rig:
        async with rig.client.get(rig.base + "/v1/nothing") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "unknown_url"
            assert response.headers["x-request-id"]
        async with rig.client.get(rig.base + CHAT) as response:
            assert (response.status, response.headers["allow"]) == (405, "POST")
            assert (await response.json())["error"]["code"] == "method_not_supported"
        async with rig.client.post(rig.base + "/v1/models") as response:
            assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")
        async with rig.client.get(rig.base + MESSAGES) as response:
            assert (await response.json())["type"] == "error"


async def test_a_missed_deadline_is_not_worth_another_try() -> None:
    async with running() as rig:
        await rig.engine("a", ttft_ms=5000)
        status, head, _ = await rig.post(CHAT, chat_body(), x_request_timeout_seconds="0.05")
        assert (status, head["x-should-retry"]) == (408, "false")


@pytest.mark.parametrize("body", [{"model": "none"}, {"model": 1}])
async def test_a_refused_request_names_no_tier(body: dict[str, Any]) -> None:
    async with running() as rig:
        await rig.engine("a")
        _, head, _ = await rig.post(CHAT, {"messages": [], **body})
        assert "x-tier" not in head
        assert "x-tier-reason" not in head
        assert head["x-request-id"]


@pytest.mark.parametrize(("given", "kept"), [("mine-1", True), ("a" * 200, False), ("a b", False)])
async def test_a_clients_request_id_is_short_and_plain_or_replaced(given: str, kept: bool) -> None:
    async with running() as rig:
        await rig.engine("a")
        _, head, _ = await rig.post(CHAT, {"model": "none"}, x_request_id=given)
        assert (head["x-request-id"] == given) is kept


async def test_a_defect_is_logged_once_and_told_by_its_request_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    async with running() as rig:
        await rig.engine("a")
        monkeypatch.setattr(Dispatcher, "submit", defect)
        with capture_logs() as logged:
            status, head, value = await rig.post(CHAT, chat_body(), x_request_id="req-7")
        assert (status, head["x-request-id"]) == (500, "req-7")
        assert "req-7" in value["error"]["message"]
        assert "secret" not in value["error"]["message"]
        assert [line["request_id"] for line in logged if line["log_level"] == "error"] == ["req-7"]


async def test_control_characters_of_a_client_are_escaped_in_messages() -> None:
    async with running() as rig:
        await rig.engine("a")
        for body in (
            {"model": "a\x1b]0;b"},
            {"metadata": {"min_tier": "a\x1b]0;b"}},
            {"models": ["\x1b[2J"]},
        ):
            _, _, value = await rig.post(CHAT, {"messages": [], **body})
            assert value["error"]["message"].isprintable()
