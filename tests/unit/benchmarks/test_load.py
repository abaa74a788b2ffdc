"""The clients of the chaos benchmark must see what they are there to see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.benchmarks.load import Outcome, Question, judge, p99_ms, percentile, question
from tests.support.gateway import plane, running

ASKED = question(1, "stream", "balanced", tokens=40, natural_tokens=60)


def stream(
    pieces: list[str],
    *,
    finish: str = "length",
    tokens: int = 40,
    done: bool = True,
    error: str = "",
) -> bytes:
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    if error:
        events.append({"error": {"message": error}})
    else:
        events.append({"choices": [{"delta": {}, "finish_reason": finish}]})
        usage = {"prompt_tokens": ASKED.prompt_tokens, "completion_tokens": tokens}
        events.append({"choices": [], "usage": usage})
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return (text + ("data: [DONE]\n\n" if done else "")).encode()


def right() -> list[str]:
    """The right text in pieces."""
    return [ASKED.text[at : at + 5] for at in range(0, len(ASKED.text), 5)]


@pytest.mark.parametrize(
    ("received", "fate"),
    [
        (stream(right()), "ok"),
        (stream(right(), done=False), "truncated"),
        (stream(right()[:-3]), "truncated"),
        (stream([*right()[:10], *right()[14:]]), "truncated"),
        (stream([*right()[:20], *right()[10:]]), "duplicated"),
        (stream([*right(), *right()]), "duplicated"),
        (stream([*right()[:5], "something else", *right()[8:]]), "wrong"),
        (stream(right(), finish="stop"), "wrong"),
        (stream(right(), tokens=39), "wrong"),
        (stream(right()) + b"data: [DONE]\n\n", "wrong"),
        (stream(right()) + b'data: {"choices": []}\n\n', "wrong"),
        (stream(right()[:5], error="the engine was lost", done=False), "failed"),
        (b"", "truncated"),
    ],
)
def test_what_a_stream_is_worth(received: bytes, fate: str) -> None:
    assert judge(ASKED, 200, received)[0] == fate


@pytest.mark.parametrize(("status", "fate"), [(429, "shed"), (408, "shed"), (503, "failed"), (404, "failed")])
def test_what_a_refusal_is_worth(status: int, fate: str) -> None:
    assert judge(ASKED, status, b"{}")[0] == fate


@pytest.mark.parametrize("kind", ["stream", "post"])
async def test_the_right_answers_are_those_of_the_simulated_engine(kind: Any) -> None:
    async with running(plane()) as rig:
        await rig.engine("a", tokens=20)
        for number in range(4):
            asked: Question = question(number, kind, "balanced", tokens=12, natural_tokens=20)
            async with rig.client.post(f"{rig.base}/v1/chat/completions", json=asked.body) as answer:
                assert judge(asked, answer.status, await answer.read()) == ("ok", "")


def test_percentiles_are_of_values_that_were_there() -> None:
    assert percentile([], 0.99) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    outcomes = [Outcome("post", "normal", 0.0, 0.1), Outcome("post", "normal", 0.0, 9.0, fate="failed")]
    assert p99_ms(outcomes) == 100.0
