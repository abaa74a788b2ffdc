"""What every kind of engine must do, tested through a supervisor and over HTTP only.

A new kind of engine joins with one entry in ``KINDS``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, NotFoundError, OpenAI

from controlplane.config import RestartConfig, TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines import engine_for
from controlplane.engines.base import Engine
from controlplane.engines.metrics_scraper import metric_sum
from controlplane.engines.supervision import reaper
from controlplane.engines.supervision.status import EngineStatus
from controlplane.engines.supervision.supervisor import EngineSupervisor
from controlplane.errors import EngineStartError
from tests.support.engines import alive, call, events_of, parent_of, pid_of, resolver, supervised, tier_of
from tests.support.waiting import until

READY_S = 240.0

KINDS = [
    pytest.param("simulated"),
    pytest.param("endpoint"),
    pytest.param("llamacpp"),
    pytest.param("vllm", marks=pytest.mark.vllm),
]
WITH_PROCESS = [kind for kind in KINDS if kind.values != ("endpoint",)]


@dataclass(frozen=True)
class Running:
    """An engine that is ready."""

    kind: str
    tier: TierConfig
    engine: Engine
    supervisor: EngineSupervisor
    status: EngineStatus

    @property
    def client(self) -> OpenAI:
        return OpenAI(
            base_url=self.status.base_url + "/v1", api_key=self.status.secret, timeout=120, max_retries=0
        )


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    kind = request.param
    with ExitStack() as stack:
        settings = {}
        if kind == "endpoint":
            # The address is another engine's, as it would be anywhere.
            other, _ = stack.enter_context(supervised(tier_of("simulated"), replica_id="elsewhere"))
            status = other.wait_ready(READY_S)
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("TIERPLANE_TEST_KEY", status.secret)
            settings = {"url": status.base_url}
        tier = tier_of(kind, restart=RestartConfig(max_restarts=3, backoff_initial_s=0.1), **settings)
        supervisor, _ = stack.enter_context(supervised(tier, resolve=resolver(tier)))
        yield Running(kind, tier, engine_for(tier), supervisor, supervisor.wait_ready(READY_S))


MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CHAT: dict[str, Any] = {"model": "served", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}


def test_it_is_ready_and_says_where(running: Running) -> None:
    status = running.status
    assert status.state is EndpointState.READY
    assert status.base_url.startswith("http://")
    assert not status.base_url.endswith("/")
    assert status.generation == 1
    assert (status.pid is not None) is running.engine.has_process
    assert call(status.base_url + running.engine.ready_path, status.secret)[0] == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("secret", ["", "wrong"])
def test_v1_demands_the_secret(running: Running, path: str, secret: str) -> None:
    body = None if path.endswith("models") else CHAT
    assert call(running.status.base_url + path, secret, body)[0] == 401


def test_the_openai_client_is_refused_with_a_wrong_key(running: Running) -> None:
    with pytest.raises(AuthenticationError):
        running.client.with_options(api_key="wrong").models.list()


def test_it_answers_to_the_tiers_name(running: Running) -> None:
    assert "served" in [model.id for model in running.client.models.list()]


def test_an_unknown_model_is_not_found(running: Running) -> None:
    if running.kind == "llamacpp":
        pytest.skip("llama.cpp serves its one model under any name; the gateway checks names itself")
    with pytest.raises(NotFoundError):
        running.client.chat.completions.create(model="nope", messages=MESSAGES, max_tokens=1)


def test_chat(running: Running) -> None:
    response = running.client.chat.completions.create(**CHAT)
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content
    assert response.choices[0].finish_reason in ("stop", "length")
    assert response.usage.prompt_tokens > 0
    assert 0 < response.usage.completion_tokens <= 8


def test_chat_streamed_says_the_same(running: Running) -> None:
    whole = running.client.chat.completions.create(**CHAT)
    text, finishes, usage = "", [], None
    chunks = running.client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            finishes += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert finishes == [whole.choices[0].finish_reason]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_completions_whole_and_streamed(running: Running) -> None:
    request_body: dict[str, Any] = {
        "model": "served",
        "prompt": "The capital of France is",
        "max_tokens": 4,
        "temperature": 0,
    }
    whole = running.client.completions.create(**request_body)
    assert whole.choices[0].text
    streamed = running.client.completions.create(**request_body, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text


def test_an_empty_conversation_is_a_client_error(running: Running) -> None:
    status, _, text = call(
        running.status.base_url + "/v1/chat/completions", running.status.secret, {"model": "served"}
    )
    assert 400 <= status < 500
    assert "error" in text


def test_what_its_capabilities_promise(running: Running) -> None:
    capabilities = running.engine.capabilities(running.tier)
    client = running.client
    if capabilities.responses:
        response = client.responses.create(
            model="served", input="What is the capital of France?", max_output_tokens=8
        )
        assert response.output_text
        names = [
            event.type
            for event in client.responses.create(
                model="served", input="Hello", max_output_tokens=3, stream=True
            )
        ]
        assert names[0] == "response.created"
        assert names[-1] in ("response.completed", "response.incomplete")
        assert "response.output_text.delta" in names
    if capabilities.messages:
        body = {"model": "served", "messages": MESSAGES, "max_tokens": 4}
        url = running.status.base_url + "/v1/messages"
        status, _, text = call(url, running.status.secret, body, timeout_s=60)
        assert (status, '"type"' in text) == (200, True)
        _, _, text = call(url, running.status.secret, {**body, "stream": True}, timeout_s=60)
        kinds = [event["type"] for event in events_of(text)]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    if capabilities.embeddings:
        vectors = client.embeddings.create(model="served", input=["one", "two"])
        assert len(vectors.data) == 2
        assert len(vectors.data[0].embedding) == len(vectors.data[1].embedding) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_resumes_from_token_ids(running: Running, stream: bool) -> None:
    if not running.engine.capabilities(running.tier).resume_by_token_ids:
        pytest.skip(f"{running.kind} does not promise to resume")
    secret, url = running.status.secret, running.status.base_url
    chat = {**CHAT, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    _, _, text = call(url + "/v1/chat/completions", secret, {**chat, "stream": True}, timeout_s=60)
    events = events_of(text)
    prompt_ids = events[0]["prompt_token_ids"]
    ids = _token_ids(events)
    assert len(ids) == 12
    request_body = {
        "model": "served",
        "prompt": prompt_ids + ids[:5],
        "max_tokens": 7,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        "stream": stream,
    }
    status, _, text = call(url + "/v1/completions", secret, request_body, timeout_s=60)
    assert status == 200
    responses = events_of(text) if stream else events_of(f"data: {text}")
    assert ids[:5] + _token_ids(responses) == ids


def _token_ids(responses: list[dict[str, Any]]) -> list[int]:
    choices = [choice for response in responses for choice in response["choices"]]
    return [token for choice in choices for token in choice.get("token_ids") or []]


def test_metrics_carry_the_names_it_promises(running: Running) -> None:
    engine = running.engine
    if not engine.metrics_path:
        assert engine.metric_names.running == ""
        pytest.skip("an address has no metrics of its own")
    names = engine.metric_names
    before = metric_sum(_metrics(running), names.generation_tokens_total) or 0
    running.client.chat.completions.create(**CHAT)
    text = until(
        lambda: (
            text
            if (metric_sum(text := _metrics(running), names.generation_tokens_total) or 0) > before
            else None
        ),
        15,
        "the token counter moves",
    )
    missing = [
        name
        for name in (getattr(names, field) for field in type(names).__dataclass_fields__)
        if name and metric_sum(text, name) is None
    ]
    assert missing == []


def test_a_client_that_hangs_up_aborts_its_request(running: Running) -> None:
    if not running.engine.metric_names.running:
        pytest.skip("an address does not show what it runs")
    request_body = {**CHAT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    body = json.dumps(request_body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {running.status.secret}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.status.port), timeout=60) as client:
        client.sendall(head.encode() + body)
        assert client.recv(4096)
        until(lambda: _running(running) >= 1, 30, "it runs")
    hung_up_s = time.monotonic()
    until(lambda: _running(running) == 0, 30, "the request is aborted")
    # It would have taken longer than that to the end.
    assert time.monotonic() - hung_up_s < (30 if running.kind == "vllm" else 7)


def _metrics(running: Running) -> str:
    return call(running.status.base_url + running.engine.metrics_path, running.status.secret)[2]


def _running(running: Running) -> float:
    text = _metrics(running)
    names = running.engine.metric_names
    return (metric_sum(text, names.running) or 0.0) + (metric_sum(text, names.waiting) or 0.0)


# In the next two the running engine is lost.


def family_of(pid: int) -> list[int]:
    return reaper.ProcessFamily(pid, reaper.start_of(pid), "", adopts=False).members()


def test_it_comes_back_after_sigkill_and_after_the_loss_of_its_reaper(running: Running) -> None:
    if not running.engine.has_process:
        pytest.skip("an address has no process here")
    supervisor = running.supervisor
    now = supervisor.status
    assert (now.state, now.generation, now.restarts) == (EndpointState.READY, 1, 0), "it was lost before"
    pid = pid_of(running.status)
    family = family_of(pid)
    os.kill(pid, signal.SIGKILL)
    until(lambda: supervisor.status.generation == 2, 30)
    assert not [pid for pid in family if alive(pid)]
    second = supervisor.wait_ready(READY_S)
    second_pid = pid_of(second)
    family = family_of(second_pid)
    os.kill(parent_of(second_pid), signal.SIGKILL)
    until(lambda: supervisor.status.generation == 3, 30)
    assert not [pid for pid in family if alive(pid)]
    assert supervisor.wait_ready(READY_S).restarts == 2


def test_no_process_is_left_after_stop(running: Running) -> None:
    if not running.engine.has_process:
        pytest.skip("an address has no process here")
    status = running.supervisor.wait_ready(READY_S)
    family = family_of(pid_of(status))
    assert status.pid in family
    running.supervisor.stop()
    assert not [pid for pid in family if alive(pid)]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", status.port), timeout=5)


# From here on each test starts an engine of its own.


@pytest.mark.parametrize("kind", WITH_PROCESS)
def test_a_bad_flag_is_named_and_not_tried_twice(kind: str) -> None:
    # Past the configuration's own check, as when another version of the engine is installed.
    tier = tier_of(kind, restart=RestartConfig(max_restarts=5)).model_copy(
        update={"engine_args": {"bogus-flag": 1}}
    )
    with supervised(tier, replica_id="flag", resolve=resolver(tier)) as (supervisor, _):
        with pytest.raises(EngineStartError, match=r"bogus[-_]flag"):
            supervisor.wait_ready(READY_S)
        assert supervisor.status.state is EndpointState.FAILED
        assert supervisor.status.restarts == 0


@pytest.mark.parametrize("kind", [kind for kind in WITH_PROCESS if kind.values != ("simulated",)])
def test_a_missing_model_is_diagnosed_and_not_tried_twice(kind: str, tmp_path: Path) -> None:
    tier = tier_of(kind, restart=RestartConfig(max_restarts=5))
    missing = str(tmp_path / "no-such-model")
    # Past the resolver, as when the folder vanishes between: the engine's own words are read.
    with supervised(tier, replica_id="model", resolve=lambda model, progress: missing) as (supervisor, _):
        with pytest.raises(EngineStartError, match=r"model"):
            supervisor.wait_ready(READY_S)
        assert supervisor.status.restarts == 0
        assert supervisor.status.generation == 1


def test_an_address_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("TIERPLANE_TEST_KEY", "k")
    tier = tier_of("endpoint", url=f"http://127.0.0.1:{port}", health_interval_s=0.1)
    with supervised(tier) as (supervisor, recorder):
        until(lambda: "connection refused" in supervisor.status.diagnosis)
        assert supervisor.status.state is EndpointState.STARTING
        assert supervisor.status.phase == f"waiting for http://127.0.0.1:{port}"
        supervisor.stop()
    assert recorder.states[-1] is EndpointState.STOPPED


def test_an_address_is_lost_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with supervised(tier_of("simulated"), replica_id="elsewhere") as (other, _):
        status = other.wait_ready(READY_S)
        monkeypatch.setenv("TIERPLANE_TEST_KEY", status.secret)
        tier = tier_of("endpoint", url=status.base_url, health_interval_s=0.05, health_failures=2)
        with supervised(tier) as (supervisor, recorder):
            supervisor.wait_ready(READY_S)
            call(status.base_url + "/simulated/knobs", status.secret, {"refuse": True, "for_s": 1.0})
            until(lambda: supervisor.status.state is EndpointState.RESTARTING)
            assert "connection refused" in supervisor.status.diagnosis
            supervisor.wait_ready(20)
            assert supervisor.drain(5)
        assert EndpointState.FAILED not in recorder.states


def test_an_address_that_refuses_the_key_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with supervised(tier_of("simulated"), replica_id="elsewhere") as (other, _):
        status = other.wait_ready(READY_S)
        monkeypatch.setenv("TIERPLANE_TEST_KEY", "wrong")
        with supervised(tier_of("endpoint", url=status.base_url)) as (supervisor, _):
            until(
                lambda: (
                    "returned status 401; check the key in TIERPLANE_TEST_KEY" in supervisor.status.diagnosis
                )
            )


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_vllm_leaves_nothing_when_its_supervisor_and_its_reaper_are_killed_together() -> None:
    """vLLM's core process does not notice that its parent is gone: the reaper's watchdog ends it."""
    import subprocess
    import sys

    script = (
        "import sys, time\n"
        "from tests.support.engines import resolver, supervised, tier_of\n"
        "tier = tier_of('vllm')\n"
        "with supervised(tier, replica_id='owner', resolve=resolver(tier)) as (supervisor, _):\n"
        "    print(supervisor.wait_ready(240).pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    family = family_of(pid)
    assert len(family) >= 3
    its_reaper = parent_of(pid)
    os.kill(its_reaper, signal.SIGSTOP)
    owner.kill()
    os.kill(its_reaper, signal.SIGKILL)
    owner.communicate()
    until(lambda: not [each for each in family if alive(each)], 60, "vLLM's processes end")
