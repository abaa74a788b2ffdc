"""A steady load of chat requests whose right answers are known, from clients that check every token.

The text of a simulated engine follows from the prompt alone (:mod:`controlplane.engines.simulated.text`), so
a client can tell an answer that is whole from one that was cut, repeated or mixed up on its way, whichever
engine or tier gave it. Requests begin at fixed times, whatever became of those before: a plane that stands
still shows in the latencies.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

import aiohttp

from controlplane.engines.simulated.text import ANSWER, decode, digest, encode, next_tokens
from controlplane.errors import DeadlineExceeded

Kind = Literal["stream", "post"]
Fate = Literal["ok", "failed", "shed", "broken", "duplicated", "truncated", "wrong"]
"""How a request ended for its client. ``failed``: with an error status or an error event. ``shed``: with 408
or 429, or with an error event because its deadline passed. ``broken``: the connection was refused or ended
early, which a client can see. ``duplicated``, ``truncated``, ``wrong``: the response looks complete, but it
is not right."""

REPEAT_CHARS = 24
"""A piece of text of this length that occurs twice is a repetition, not chance."""


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are monotonic seconds."""

    kind: Kind
    priority: str
    began_s: float
    ended_s: float = 0.0
    fate: Fate = "ok"
    attempts: int = 1
    detail: str = ""
    """What was wrong, for people."""

    @property
    def latency_ms(self) -> float:
        """Until the answer was whole."""
        return (self.ended_s - self.began_s) * 1e3


@dataclass(frozen=True, slots=True)
class Question:
    """A request and its only right answer."""

    kind: Kind
    body: dict[str, Any]
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def question(number: int, kind: Kind, model: str, tokens: int, natural_tokens: int) -> Question:
    """The ``number``-th request: every other one ends by itself, the rest at ``max_tokens``.

    ``natural_tokens`` is the engines' setting ``tokens``, at which an answer ends with one more token that
    has no text.
    """
    message = f"request {number}: what is there to say?"
    ids = [*encode(f"user: {message}\n"), ANSWER]
    by_itself = number % 2 == 0
    spoken = natural_tokens if by_itself else tokens
    said, _ = next_tokens(digest(ids), ids[-1], spoken)
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": natural_tokens + 50 if by_itself else tokens,
    }
    if kind == "stream":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Question(
        kind,
        body,
        decode(said),
        "stop" if by_itself else "length",
        len(ids),
        spoken + (1 if by_itself else 0),
    )


@dataclass
class Load:
    """A running load; :attr:`outcomes` grows as answers end."""

    outcomes: list[Outcome] = field(default_factory=list)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    def between(self, from_s: float, to_s: float) -> list[Outcome]:
        """What began in that time."""
        return [each for each in self.outcomes if from_s <= each.began_s < to_s]


def half_streamed(
    model: str, tokens: int, natural_tokens: int
) -> Callable[[int], tuple[Question, dict[str, str]]]:
    """Of the questions to ``model``, two in a row are streamed and the next two are not."""

    def ask(number: int) -> tuple[Question, dict[str, str]]:
        kind: Kind = "stream" if number // 2 % 2 == 0 else "post"
        return question(number, kind, model, tokens, natural_tokens), {}

    return ask


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit of connections. Each connection serves one request, as if each request came
    from another client: the kernel then spreads them over the gateway replicas, and no request uses a
    connection to a replica that has died."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=120.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield http


async def generate(
    load: Load,
    http: aiohttp.ClientSession,
    url: str,
    per_s: float,
    ask: Callable[[int], tuple[Question, dict[str, str]]],
    until_s: Callable[[], float],
    *,
    poisson_seed: int | None = None,
) -> None:
    """Begin ``per_s`` requests a second until ``until_s()``, then wait for their answers.

    ``ask`` gives the n-th request and its headers. Evenly spaced, or by a Poisson process with a seed.
    """
    chance = random.Random(poisson_seed) if poisson_seed is not None else None
    due_s = monotonic()
    for number in itertools.count():
        due_s += chance.expovariate(per_s) if chance else 1.0 / per_s
        if due_s >= until_s():
            break
        if (wait_s := due_s - monotonic()) > 0:
            await asyncio.sleep(wait_s)
        asked, headers = ask(number)
        task = asyncio.create_task(_one(load, http, url, asked, headers, due_s))
        load.running.add(task)
        task.add_done_callback(load.running.discard)
    await asyncio.gather(*load.running)


async def _one(
    load: Load,
    http: aiohttp.ClientSession,
    url: str,
    asked: Question,
    headers: dict[str, str],
    due_s: float,
) -> None:
    outcome = Outcome(asked.kind, headers.get("x-priority", "normal"), due_s)
    received = bytearray()
    try:
        async with http.post(f"{url}/v1/chat/completions", json=asked.body, headers=headers) as answer:
            outcome.attempts = int(answer.headers.get("x-attempts", "1"))
            async for data in answer.content.iter_any():
                received += data
            outcome.fate, outcome.detail = judge(asked, answer.status, bytes(received))
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.fate = "broken"
        outcome.detail = f"{type(error).__name__} after {len(received)} bytes: {error}"
    outcome.ended_s = monotonic()
    load.outcomes.append(outcome)


def judge(asked: Question, status: int, received: bytes) -> tuple[Fate, str]:
    """What an answer that came to its end is worth, and why."""
    if status in {408, 429}:
        return "shed", f"{status}: {received[:200]!r}"
    if status != 200:
        return "failed", f"{status}: {received[:200]!r}"
    if asked.kind == "post":
        whole = json.loads(received)
        choice = whole["choices"][0]
        return _compare(asked, choice["message"]["content"], choice["finish_reason"], whole["usage"])
    text: list[str] = []
    finish = usage = None
    done = False
    for line in received.split(b"\n"):
        if not line.startswith(b"data: "):
            continue
        if done:
            return "wrong", "events after [DONE]"
        if line == b"data: [DONE]":
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            late = event["error"].get("code") == DeadlineExceeded.code
            return "shed" if late else "failed", str(event["error"].get("message"))
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text.append(choice["delta"].get("content") or "")
            finish = choice.get("finish_reason") or finish
    if not done:
        return "truncated", f"no [DONE] after {len(text)} events"
    return _compare(asked, "".join(text), finish, usage)


def _compare(asked: Question, text: str, finish: str | None, usage: Any) -> tuple[Fate, str]:
    if text != asked.text:
        return _difference(asked.text, text)
    if finish != asked.finish_reason:
        return "wrong", f"finish_reason {finish} instead of {asked.finish_reason}"
    counted = (usage or {}).get("prompt_tokens"), (usage or {}).get("completion_tokens")
    if counted != (asked.prompt_tokens, asked.completion_tokens):
        return "wrong", f"usage {counted} instead of {asked.prompt_tokens, asked.completion_tokens}"
    return "ok", ""


def _difference(right: str, text: str) -> tuple[Fate, str]:
    if right.startswith(text):
        return "truncated", f"{len(text)} of {len(right)} characters, and an ending"
    at = next((at for at, (a, b) in enumerate(zip(right, text, strict=False)) if a != b), len(right))
    again = text[at : at + REPEAT_CHARS]
    where = f"{at} of {len(right)} characters are right, then {again!r}"
    if len(text) > len(right) or again in right[:at]:
        return "duplicated", where
    if again and again in right[at:]:
        return "truncated", f"{where}: a part is missing"
    return "wrong", where


def percentile(values: Sequence[float], ratio: float) -> float | None:
    """The smallest value that ``ratio`` of them do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * ratio) - 1)] if ordered else None


def p99_ms(outcomes: Sequence[Outcome]) -> float | None:
    """Of the answers that were right."""
    value = percentile([each.latency_ms for each in outcomes if each.fate == "ok"], 0.99)
    return None if value is None else round(value, 1)
