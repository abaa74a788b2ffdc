"""The main job with real vLLM: three tiers answer, and a stream survives the kill of its engine."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import psutil
import pytest

from tests.support.openai_client import FACT, QUESTION, client
from tests.support.plane import Plane
from tests.support.waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(600)]

COUNTS = re.compile(r"^tierplane_(?:requests|resumes|retries|endpoint_failures|spills)_total\{.*", re.M)


def _engine_processes(plane: Plane) -> list[psutil.Process]:
    return [*plane.processes("VLLM::"), *plane.processes("vllm.entrypoints")]


@pytest.mark.parametrize("model", ["lightweight", "balanced", "capable"])
@pytest.mark.parametrize("way", ["own port", "ingress"])
def test_the_capital_of_france_is_paris(plane: Plane, model: str, way: str) -> None:
    url = plane.url if way == "own port" else plane.ingress_url
    with client(url) as openai:
        whole = openai.chat.completions.with_raw_response.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=16
        )
        assert whole.headers["x-tier"] == model
        assert whole.parse().choices[0].message.content == FACT
        stream = openai.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=16, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == FACT


def test_a_stream_survives_the_kill_of_its_engine_word_for_word(plane: Plane) -> None:
    """All tiers of this plane serve one model, so a lost stream goes on at another tier."""
    messages = [{"role": "user", "content": "Tell me a short story about a lighthouse."}]
    # long enough that the kill comes in time on a busy machine, whose engine puts many tokens into a chunk
    ask: dict[str, Any] = {
        "model": "capable",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 120,
        "stream": True,
    }
    ask["extra_body"] = {"ignore_eos": True}
    with client(plane.url) as openai:
        whole = "".join(c.choices[0].delta.content or "" for c in openai.chat.completions.create(**ask))
        before = plane.ready("capable")[0]
        processes_before, resumes_before = len(_engine_processes(plane)), plane.resumes()
        raw = openai.chat.completions.with_raw_response.create(**ask)
        assert raw.headers["x-tier"] == "capable"
        pieces: list[str] = []
        for number, chunk in enumerate(raw.parse()):
            if number == 2:
                os.kill(before["pid"], signal.SIGKILL)
                sent = len("".join(pieces))
            pieces.append(chunk.choices[0].delta.content or "")

    def story() -> str:
        return "\n".join([f"{sent} of {len(whole)} characters", *COUNTS.findall(plane.text("/metrics"))])

    assert "".join(pieces) == whole
    assert sent < len(whole) / 2, f"the kill came too late to break the stream: {story()}"
    # counted when the gateway sees that the client has left, which may be a moment later
    until(lambda: plane.resumes() == resumes_before + 1, 10, "the stream was resumed once", story)
    until(
        lambda: [e for e in plane.ready("capable") if e["generation"] == before["generation"] + 1],
        240,
        "the engine's return",
    )
    until(lambda: len(_engine_processes(plane)) == processes_before, 20, "the end of what was orphaned")
    with client(plane.url) as openai:
        answer = openai.chat.completions.create(model="capable", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == FACT
