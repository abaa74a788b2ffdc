"""kill -9 of one of two real vLLM engines of a tier, while each runs greedy streams."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from time import monotonic
from typing import Any

import aiohttp

from tests.support.plane import Plane, running

TIER = "only"
KILL_AFTER_EVENTS = 20
"""The engine is killed when every stream has brought so much."""
MAX_TOKENS = 120
PROMPTS = (
    "Tell me about the history of Lisbon.",
    "Explain how a steam engine works.",
    "Describe a day in the life of a beekeeper.",
    "Why is the sky blue?",
)
RECOVERY_LIMIT_S = 240.0


def plane_args() -> dict[str, Any]:
    """Two engines with the bundled model on CPU."""
    tier = {
        "name": TIER,
        "model": "bundled:smollm2-135m",
        "engine": "vllm",
        "device": "cpu",
        "replicas": 2,
        "engine_args": {"max-model-len": 2048, "max-num-seqs": 8},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        "concurrency_limit": 8,
        "drain_timeout_s": 2.0,
    }
    return {"tiers": [tier]}


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """The row, and a line for each text that differs."""
    with running(plane_args()) as plane:
        return asyncio.run(_measure(plane))


class _Stream:
    """One stream as a client sees it."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.events = 0
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: Any = None
        self.error = ""
        self.done = False
        self.latency_ms = 0.0

    @property
    def answer(self) -> tuple[str, str | None, Any]:
        """What must be the same whatever happens to engines."""
        return self.text, self.finish_reason, self.usage

    async def run(self, http: aiohttp.ClientSession, url: str) -> None:
        """Read it to its end."""
        body = {
            "model": TIER,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": self.prompt}],
        }
        began_s = monotonic()
        try:
            async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    self._take(line.strip())
        except (aiohttp.ClientError, TimeoutError) as error:
            self.error = f"{type(error).__name__}: {error}"
        self.latency_ms = (monotonic() - began_s) * 1e3

    def _take(self, line: bytes) -> None:
        if line == b"data: [DONE]":
            self.done = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                self.error = str(event["error"]["message"])
                return
            self.events += 1
            if event.get("usage"):
                used = event["usage"]
                self.usage = used["prompt_tokens"], used["completion_tokens"]
            for choice in event["choices"]:
                self.text += choice["delta"].get("content") or ""
                self.finish_reason = choice.get("finish_reason") or self.finish_reason


async def _run(http: aiohttp.ClientSession, url: str, at_once: int) -> list[_Stream]:
    streams = [_Stream(prompt) for prompt in PROMPTS]
    for start in range(0, len(streams), at_once):
        await asyncio.gather(*(each.run(http, url) for each in streams[start : start + at_once]))
    return streams


async def _measure(plane: Plane) -> tuple[list[dict[str, Any]], list[str]]:
    timeout = aiohttp.ClientTimeout(total=600.0)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        alone = await _run(http, plane.url, 1)
        streams = [_Stream(prompt) for prompt in PROMPTS]
        tasks = [asyncio.create_task(each.run(http, plane.url)) for each in streams]
        while not all(
            each.events >= KILL_AFTER_EVENTS or task.done() for each, task in _pairs(streams, tasks)
        ):
            await asyncio.sleep(0.01)
        hit = max(_in_flight(plane), key=lambda each: each[1])[0]
        before = next(each for each in plane.endpoints(TIER) if each["endpoint_id"] == hit)
        os.kill(before["pid"], signal.SIGKILL)
        struck_s = monotonic()
        await asyncio.gather(*tasks)
        recovered_s = await asyncio.to_thread(_recovered_s, plane, hit, before["pid"], struck_s)
        after = await _run(http, plane.url, 1)
    details = [
        f"{each.prompt!r}: {each.answer} instead of {right.answer} {each.error}"
        for each, right in zip(streams, alone, strict=True)
        if each.answer != right.answer
    ]
    row = {
        "fault": "vllm-engine",
        "requests": len(streams),
        "failed": sum(bool(each.error) for each in streams),
        "resumed": round(plane.resumes()),
        "duplicated": sum(len(each.text) > len(right.text) for each, right in _pairs(streams, alone)),
        "truncated": sum(not each.error and not each.done for each in streams),
        "different": len(details),
        "p99_before_ms": round(max(each.latency_ms for each in alone), 1),
        "p99_during_ms": round(max(each.latency_ms for each in streams), 1),
        "p99_after_ms": round(max(each.latency_ms for each in after), 1),
        "recovered_s": recovered_s,
    }
    return [row], details


def _pairs(left: Sequence[Any], right: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(left, right, strict=True))


def _in_flight(plane: Plane) -> list[tuple[str, int]]:
    endpoints = plane.get("/health")["tiers"][TIER]["endpoints"]
    return [(each["endpoint"], each["in_flight"]) for each in endpoints]


def _recovered_s(plane: Plane, endpoint_id: str, pid: int, struck_s: float) -> float | None:
    """Until the engine is back with another process; None if it is not in time."""
    while monotonic() - struck_s < RECOVERY_LIMIT_S:
        found = [each for each in plane.endpoints(TIER) if each["endpoint_id"] == endpoint_id]
        if found and found[0]["state"] == "ready" and found[0]["pid"] != pid:
            return round(monotonic() - struck_s, 1)
        time.sleep(0.25)
    return None
