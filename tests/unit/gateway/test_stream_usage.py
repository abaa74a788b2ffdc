"""The tokens of requests as engines report them: read with care, asked for, and taken out again."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from controlplane.gateway.stream_usage import (
    MAX_TOKENS,
    ReportedUsage,
    StreamUsage,
    ask_usage,
    asks_usage,
    response_usage,
    spliced,
    whole_number,
    without_usage_events,
)

CHOICE = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
)
NULL = CHOICE.replace(b"}}]", b'}}],"usage":null')
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"0", 0),
        (b"12", 12),
        (b"12.0", 12),
        (b"999999999", 999_999_999),
        *(
            (text, None)
            for text in (b"-1", b"1.5", b"1e3", b"true", b'"12"', b"[1]", b"{}", b"null", b"9" * 400)
        ),
    ],
)
def test_whole_numbers(text: bytes, number: int | None) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize(
    ("usage", "prompt", "generated", "wrong"),
    [
        ('{"prompt_tokens":3,"completion_tokens":2}', 3, 2, False),
        ('{"input_tokens":3,"output_tokens":2}', 3, 2, False),
        ('{"prompt_tokens":null,"input_tokens":3,"output_tokens":2.0}', 3, 2, False),
        (f'{{"prompt_tokens":{MAX_TOKENS},"completion_tokens":0}}', MAX_TOKENS, 0, False),
        (f'{{"prompt_tokens":{MAX_TOKENS + 1},"completion_tokens":2}}', None, 2, True),
        ('{"prompt_tokens":3}', 3, None, False),
        ("{}", None, None, False),
        ("null", None, None, False),
        *(
            (f'{{"prompt_tokens":3,"completion_tokens":{wrong}}}', 3, None, True)
            for wrong in ("-1", "9" * 400, "1e999", "1.5", '"2"', "true", "[2]", "{}", "1e2")
        ),
        ('"much"', None, None, False),
        ("[1,2]", None, None, False),
    ],
)
def test_usage_that_can_not_be_right_is_missing(
    usage: str, prompt: int | None, generated: int | None, wrong: bool
) -> None:
    body = f'{{"id":"a","choices":[{{"x":1}}],"usage":{usage}}}'.encode()
    assert response_usage(body) == ReportedUsage(prompt, generated, wrong)


@pytest.mark.parametrize("body", [b"", b"[]", b"no", b'{"x":' + b"[" * 9999, b'{"usage":{}', b"\xff", b'"a"'])
def test_a_body_that_can_not_be_read_has_no_usage(body: bytes) -> None:
    found = response_usage(body)
    assert (found.prompt, found.generated) == (None, None)


@pytest.mark.parametrize(
    ("blocks", "prompt", "generated"),
    [
        ([CHOICE, USAGE, DONE], 3, 2),
        ([CHOICE + USAGE + DONE], 3, 2),
        ([USAGE.replace(b":2", b":1"), USAGE, DONE], 3, 2),
        ([CHOICE.replace(b"}}]", b'}}],"usage":{"prompt_tokens":3,"completion_tokens":2}'), DONE], 3, 2),
        ([NULL, USAGE, NULL], 3, 2),
        ([USAGE.replace(b'"usage":', b'"usage" : ').replace(b"\n\n", b"\r\n\r\n")], 3, 2),
        (
            [
                b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3,'
                b'"output_tokens":1}}}\n\n',
                b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":2}}\n\n',
            ],
            3,
            2,
        ),
        (
            [
                b'data: {"type":"response.created","response":{"id":"r","usage":null}}\n\n',
                b'data: {"type":"response.completed","response":'
                b'{"usage":{"input_tokens":3,"output_tokens":2}}}\n\n',
            ],
            3,
            2,
        ),
        ([CHOICE.replace(b'"a"', b'"\\"usage\\":{\\"prompt_tokens\\":9}"'), DONE], None, None),
        ([CHOICE, DONE], None, None),
    ],
)  # fmt: skip
def test_the_usage_of_a_stream(blocks: list[bytes], prompt: int | None, generated: int | None) -> None:
    usage = StreamUsage()
    for block in blocks:
        usage.add(block)
    assert usage.read() == ReportedUsage(prompt, generated)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ("", False),
        ("null", False),
        ("{}", False),
        ('{"include_usage":false}', False),
        ('{"include_usage":null}', False),
        ('{"include_usage":true}', True),
        ('{"include_usage":1}', True),
        ('"wrong"', True),
        ("[]", True),
    ],
)
def test_whether_a_client_asks_for_usage(options: str, asked: bool) -> None:
    raw = msgspec.Raw(options.encode())
    assert asks_usage(raw) is asked
    if not asked:
        assert ask_usage(raw)["include_usage"] is True


def test_asking_for_usage_keeps_the_other_options() -> None:
    raw = msgspec.Raw(b'{"include_usage":false,"continuous_usage_stats":true,"x":1}')
    assert json.loads(msgspec.json.encode(ask_usage(raw))) == {"include_usage": True, "x": 1}


@pytest.mark.parametrize("end", ["", " ", "\n", "\r\n\t "])
def test_a_body_is_extended_without_being_encoded_again(end: str) -> None:
    value: dict[str, Any] = {"messages": [{"content": "a}"}], "stream": True, "x": {"y": {}}}
    got = spliced((json.dumps(value, indent=1) + end).encode())
    assert json.loads(got) == {**value, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("events", "kept"),
    [
        (CHOICE + USAGE + DONE, CHOICE + DONE),
        (USAGE, b""),
        (USAGE.replace(b"\n\n", b"\r\n\r\n") + DONE, DONE),
        (USAGE.replace(b"[]", b"[ ]"), b""),
        (b": ping\n\n" + USAGE + DONE, b": ping\n\n" + DONE),
        (CHOICE, CHOICE),
        (
            b'data: {"choices":[],"prompt_filter_results":[]}\n\n',
            b'data: {"choices":[],"prompt_filter_results":[]}\n\n',
        ),
        (b'data: {"choices":[],"usage":null}\n\n', b'data: {"choices":[],"usage":null}\n\n'),
        (
            CHOICE.replace(b'"a"', b'"\\"choices\\":[]"') + USAGE,
            CHOICE.replace(b'"a"', b'"\\"choices\\":[]"'),
        ),
    ],
)
def test_events_with_nothing_but_usage_are_taken_out(events: bytes, kept: bytes) -> None:
    assert without_usage_events(events) == kept
