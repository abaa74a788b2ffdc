"""Whatever a client sends: it gets a response that says whose fault it is, and no engine is blamed for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.routing.circuit_breaker import BreakerState
from controlplane.gateway.api.agents import CapturedResponse
from controlplane.gateway.request_context import APIS
from controlplane.http.messages import ANTHROPIC_PATH, Request
from tests.support.gateway import Rig, plane

RELAYED = [*APIS, "/chat"]
POSTED = [*RELAYED, "/v1/route", "/batch"]

TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["auto", "balanced", "\x1b]0;x\x07", "\0", "9" * 600])
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 1, 2, -1]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
KEYS = st.one_of(st.text(max_size=5), st.sampled_from(["role", "content", "type", "text"]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=6,
)
MESSAGES = [{"role": "user", "content": "hello"}]
HINTS = ("complexity", "agent_type", "min_tier", "priority", "session_id", "timeout", "other")
MEMBERS = {
    "model": st.one_of(st.just("auto"), VALUES),
    "models": st.one_of(st.just(["balanced"]), VALUES),
    "messages": st.one_of(
        st.just(MESSAGES), VALUES, st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES}))
    ),
    "prompt": st.one_of(st.just("hello"), VALUES),
    "input": st.one_of(st.just("hello"), VALUES),
    "message": st.one_of(st.just("hello"), VALUES),
    "metadata": st.one_of(VALUES, st.dictionaries(st.sampled_from(HINTS), VALUES, max_size=4)),
    "requests": VALUES,
    **dict.fromkeys(
        (
            "stream", "stream_options", "n", "temperature", "stop", "return_token_ids", "system", "tools",
            "tool_choice", "user", "instructions", "dimensions", "encoding_format", "min_tokens", "id",
            "response_format", "seed", "logprobs",
        ),
        VALUES,
    ),
}  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"max_tokens": st.one_of(st.just(2), VALUES), "timeout": st.one_of(st.just(5), VALUES)}, optional=MEMBERS
)
HEADER_NAMES = st.sampled_from([
    b"x-complexity", b"x-agent-type", b"x-min-tier", b"x-priority", b"x-session-id", b"authorization",
    b"x-request-timeout-seconds", b"x-request-id", b"traceparent", b"content-type", b"accept",
    b"x-stream-comments",
])  # fmt: skip
HEADERS = st.dictionaries(
    HEADER_NAMES,
    st.one_of(
        st.binary(max_size=20), st.sampled_from([b"high", b"simple", b"5", b"-1", b"nan", b"a" * 5000])
    ),
    max_size=3,
)
NESTED = st.sampled_from(
    [b"[" * 1500, b"[" * 1500 + b"]" * 1500, b'{"a":' * 100_000, b"-", b"1" * 5000, b"NaN"]
)
TORN = st.one_of(
    st.binary(max_size=40),
    NESTED,
    NESTED.map(lambda value: b'{"model":"auto","messages":[],"x":' + value + b"}"),
    st.tuples(st.binary(max_size=4), BODIES).map(
        lambda pair: pair[0] + json.dumps(pair[1]).encode() + pair[0]
    ),
    BODIES.map(lambda body: b"\xef\xbb\xbf" + json.dumps(body).encode()),
    BODIES.map(lambda body: json.dumps(body).encode("utf-16")),
)


class Fuzzed:
    """A gateway before a simulated engine, in a loop that runs as long as a request does."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._rig = self._runner.run(self._start())

    async def _start(self) -> Rig:
        rig = Rig(plane())
        await rig.engine("a", ttft_ms=0, itl_ms=0, max_model_len=2048)
        return rig

    def send(self, path: str, headers: dict[bytes, bytes], body: bytes) -> CapturedResponse:
        """The response to one request."""
        out = CapturedResponse()
        request = Request("POST", path, "", headers, body)
        self._runner.run(asyncio.wait_for(self._rig.gateway.handle(request, out), 20))
        return out

    def check(self, path: str, out: CapturedResponse) -> None:
        """The response is whole, blames nobody wrongly, and leaves nothing behind."""
        [load] = self._rig.gateway.endpoint_table.by_endpoint_id.values()
        assert out.started
        assert not out.gone
        assert out.status < 500, out.body[:500]
        assert load.breaker.state is BreakerState.CLOSED
        assert load.in_flight == 0
        if b"text/event-stream" in out.headers.get(b"content-type", b""):
            return
        value = json.loads(out.body)
        if out.status >= 400:
            assert value["error"]["message"]
            assert out.headers[b"x-request-id"]
            if path.startswith(ANTHROPIC_PATH):
                assert value["type"] == "error"

    def close(self) -> None:
        """Stop everything."""
        self._runner.run(self._rig.close())
        self._runner.close()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    """Started once: what one request left behind would show in the next."""
    found = Fuzzed()
    yield found
    found.close()


@pytest.mark.parametrize("path", POSTED)
@given(headers=HEADERS, body=BODIES)
@settings(max_examples=100)
def test_members_of_any_type_are_refused_or_served(
    fuzzed: Fuzzed, path: str, headers: dict[bytes, bytes], body: dict[str, Any]
) -> None:
    fuzzed.check(path, fuzzed.send(path, headers, json.dumps(body).encode()))


@pytest.mark.parametrize("path", POSTED)
@given(body=TORN)
@settings(max_examples=40)
def test_bytes_of_any_kind_are_refused_or_served(fuzzed: Fuzzed, path: str, body: bytes) -> None:
    fuzzed.check(path, fuzzed.send(path, {}, body))


@given(items=st.lists(st.one_of(BODIES, VALUES, st.just({"message": "hello", "max_tokens": 2})), max_size=4))
@settings(max_examples=40)
def test_every_item_of_a_batch_has_a_result(fuzzed: Fuzzed, items: list[Any]) -> None:
    out = fuzzed.send("/batch", {}, json.dumps(items).encode())
    fuzzed.check("/batch", out)
    results = json.loads(out.body)["results"]
    assert len(results) == len(items)
    assert all(result["status"] == "ok" or result["error"]["message"] for result in results)
    assert all(result["status"] == "ok" for result, item in zip(results, items, strict=True) if item == {
        "message": "hello", "max_tokens": 2
    })  # fmt: skip
