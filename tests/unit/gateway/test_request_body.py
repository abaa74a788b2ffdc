"""Reading and rewriting request bodies."""

from __future__ import annotations

import contextlib
import json
import tracemalloc

import pytest

from controlplane.core.access.principal import Principal
from controlplane.core.domain.request import Priority
from controlplane.errors import BadRequest
from controlplane.gateway.request_body import parse, rewrite
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import Request


def test_a_rewrite_leaves_other_members_as_they_stand() -> None:
    body = b'{"model":"auto","temperature":0.10,"models":["a"],"nested":{"model":"auto","a" : 1}}'
    changed = rewrite(body, model="x")
    assert changed == b'{"model":"x","temperature":0.10,"nested":{"model":"auto","a" : 1}}'


def test_one_conversation_has_one_affinity_key() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    first = parse(json.dumps({"messages": messages}).encode())
    longer = parse(json.dumps({"messages": [*messages, {"role": "assistant", "content": "a"}]}).encode())
    other = parse(json.dumps({"messages": [messages[0], {"role": "user", "content": "v"}]}).encode())
    assert first.affinity_key() == longer.affinity_key() != other.affinity_key()


# -- bounds ----------------------------------------------------------------------------------------------

FULL_BODY_BYTES = 16 * 1024 * 1024


def _full(begin: str, unit: str, end: str) -> bytes:
    return f"{begin}{unit * ((FULL_BODY_BYTES - 100) // len(unit))}{end}".encode()


MANY_VALUES = {
    "models": _full('{"models":[', '"",', '""],"messages":[]}'),
    "metadata": _full('{"metadata":{"a":[', "[],", '[]]},"model":"m"}'),
    "a hint": _full('{"metadata":{"priority":[', "[],", '[]]},"model":"m"}'),
    "n": _full('{"n":[', "[],", '[]],"model":"m"}'),
    "return_token_ids": _full('{"return_token_ids":[', "{},", '0],"model":"m"}'),
    "messages": _full('{"messages":[', "0,", '0],"model":"m"}'),
    "prompt": _full('{"prompt":[', "[1],", '[1]],"model":"m"}'),
    "unknown": _full('{"tools":[', '{"a":1},', '{}],"model":"m"}'),
}


@pytest.mark.parametrize("name", MANY_VALUES)
def test_of_a_body_of_many_small_values_few_become_objects(name: str) -> None:
    body = MANY_VALUES[name]
    tracemalloc.start()
    try:
        with contextlib.suppress(BadRequest):
            context = RequestContext(Request("POST", "/v1/chat/completions", "", {}, body), "", 0.0, 1.0)
            tracemalloc.reset_peak()
            rewrite(context.body, model="x")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * FULL_BODY_BYTES  # a copy or two of the body; an object for each value is far more


def test_a_rewrite_makes_no_dictionary_of_a_million_members() -> None:
    members = ",".join(f'"{number}":0' for number in range(1_000_000))
    with pytest.raises(BadRequest, match="over 1000 members"):
        rewrite(f"{{{members}}}".encode(), model="x")


def test_a_long_body_is_rewritten_like_a_short_one() -> None:
    text = "x" * 100_000
    assert rewrite(f'{{"model":"a","text":"{text}"}}'.encode(), model="b") == (
        f'{{"model":"b","text":"{text}"}}'.encode()
    )


@pytest.mark.parametrize(
    ("member", "param"),
    [
        ('"model":"%s"', "model"),
        ('"models":["a","%s"]', "models"),
        ('"metadata":{"session_id":"%s"}', "metadata.session_id"),
        ('"metadata":{"agent_type":"%s"}', "metadata.agent_type"),
        ('"metadata":{"min_tier":"%s"}', "metadata.min_tier"),
        ('"metadata":{"priority":"%s"}', "metadata.priority"),
        ('"metadata":{"timeout":"%s"}', "metadata.timeout"),
    ],
)
def test_a_name_without_end_is_refused_by_its_member(member: str, param: str) -> None:
    body = f"{{{member % ('9' * 1_000_000)}}}".encode()
    with pytest.raises(BadRequest) as caught:
        RequestContext(Request("POST", "/v1/chat/completions", "", {}, body), "", 0.0, 1.0)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("header", [b"x-session-id", b"x-agent-type", b"x-min-tier", b"x-complexity"])
def test_a_name_in_a_header_is_bounded_too(header: bytes) -> None:
    headers = {header: b"a" * 50_000}
    with pytest.raises(BadRequest) as caught:
        RequestContext(Request("POST", "/v1/chat/completions", "", headers, b"{}"), "", 0.0, 1.0)
    assert caught.value.param == header.decode()


def test_callers_are_told_apart_by_who_was_verified_not_by_a_header() -> None:
    def caller(principal: Principal | None) -> str:
        request = Request("POST", "/v1/chat/completions", "", {b"authorization": b"Bearer forged"}, b"{}")
        request.principal = principal
        return RequestContext(request, "", 0.0, 1.0).caller

    assert caller(None) == ""
    assert caller(Principal("a1", "agent")) == "a1"
    assert caller(Principal("a1", "agent", team="search")) == "search"


@pytest.mark.parametrize(
    ("most", "asked", "given"),
    [
        (Priority.NORMAL, b"high", Priority.NORMAL),
        (Priority.NORMAL, b"low", Priority.LOW),
        (Priority.LOW, None, Priority.LOW),
        (Priority.LOW, b"normal", Priority.LOW),
        (Priority.HIGH, None, Priority.NORMAL),
        (Priority.HIGH, b"high", Priority.HIGH),
    ],
)
def test_a_request_can_only_lower_its_keys_priority(
    most: Priority, asked: bytes | None, given: Priority
) -> None:
    headers = {b"x-priority": asked} if asked else {}
    request = Request("POST", "/v1/chat/completions", "", headers, b"{}")
    request.principal = Principal("a1", "agent", max_priority=most)
    assert RequestContext(request, "", 0.0, 1.0).request.priority is given
    hidden = b'{"metadata":{"priority":"%b"}}' % asked if asked else b"{}"
    request = Request("POST", "/v1/chat/completions", "", {}, hidden)
    request.principal = Principal("a1", "agent", max_priority=most)
    assert RequestContext(request, "", 0.0, 1.0).request.priority is given


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":1}', b'{"model":["a"]}', b'{"models":"a"}', b'{"models":[1]}', b'{"models":{}}',
        b'{"stream":"true"}', b'{"stream":1}', b'{"metadata":[]}', b'{"metadata":"a"}',
        b'{"metadata":{"priority":1}}', b'{"metadata":{"timeout":[]}}', b"[]", b'"a"', b"1", b"null",
    ],
)  # fmt: skip
def test_a_member_that_decides_the_route_must_have_its_type(body: bytes) -> None:
    with pytest.raises(BadRequest):
        RequestContext(Request("POST", "/v1/chat/completions", "", {}, body), "", 0.0, 1.0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":"a"}', b'{"messages":{}}', b'{"messages":null}', b'{"messages":1}', b'{"messages":[]}',
        b'{"prompt":{}}', b'{"n":"1"}', b'{"n":[]}', b'{"max_tokens":"100"}', b'{"temperature":null}',
        b'{"user":{}}', b'{"return_token_ids":"yes"}', b'{"model":null,"models":null,"metadata":null}',
        b'{"metadata":{"mine":[1,2]}}', b'{"stream":null}',
    ],
)  # fmt: skip
def test_other_members_are_left_to_the_engine(body: bytes) -> None:
    context = RequestContext(Request("POST", "/v1/chat/completions", "", {}, body), "", 0.0, 1.0)
    assert context.body == body


@pytest.mark.parametrize(
    ("body", "one", "asks"),
    [
        (b"{}", True, False),
        (b'{"n":1,"return_token_ids":null}', True, False),
        (b'{"n":null,"return_token_ids":false}', True, True),
        (b'{"n":2,"return_token_ids":true}', False, True),
        (b'{"n":"1"}', False, False),
    ],
)
def test_what_resuming_needs_to_know_is_read(body: bytes, one: bool, asks: bool) -> None:
    fields = parse(body)
    assert (fields.one_choice, fields.asks_token_ids) == (one, asks)


def test_a_byte_order_mark_is_not_sent_on() -> None:
    request = Request("POST", "/v1/chat/completions", "", {}, b'\xef\xbb\xbf{"model":"a"}')
    assert RequestContext(request, "", 0.0, 1.0).body == b'{"model":"a"}'
