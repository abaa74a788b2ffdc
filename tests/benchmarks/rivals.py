"""What stands beside the gateway in its benchmark: an engine alone, vllm-router, LiteLLM.

vllm-router and LiteLLM are measured where they are installed, with what their documentation gives for a
proxy in front of one OpenAI-compatible server; they are never a dependency.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from controlplane.engines.simulated.engine import KEY_ENV
from controlplane.errors import SetupError
from controlplane.ray_cluster.ports import free_port
from tests.benchmarks.wrk import Target, body
from tests.support.processes import await_line

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
MODEL = "bench-model"


@contextmanager
def engine(settings: Mapping[str, object]) -> Iterator[Target]:
    """A simulated engine on its own, with a secret."""
    key = secrets.token_hex(16)
    command = [sys.executable, "-m", "controlplane.engines.simulated.server", "--port", "0"]
    command += ["--model", MODEL, "--settings", json.dumps(settings)]
    with _process(command, {KEY_ENV: key}, stdout=subprocess.PIPE) as process:
        url = (
            "http://"
            + await_line(process, "listening on ", START_TIMEOUT_S, "the engine")
            .split("listening on ")[1]
            .strip()
        )
        yield Target("engine", url, MODEL, key)


@contextmanager
def vllm_router(program: str, behind: Target) -> Iterator[Target]:
    """vllm-router in front of an engine."""
    port = free_port()
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", behind.url]
    command += ["--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())]
    with _process(command, {}) as process:
        target = Target("vllm-router", f"http://127.0.0.1:{port}", MODEL, behind.key)
        _until_it_answers(process, target)
        yield target


@contextmanager
def litellm(program: str, behind: Target) -> Iterator[Target]:
    """LiteLLM's proxy, one process, in front of an engine."""
    port = free_port()
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}",
                    "api_base": f"{behind.url}/v1",
                    "api_key": "os.environ/BENCH_ENGINE_KEY",
                },
            }
        ],
        "litellm_settings": {"telemetry": False},
    }
    with tempfile.TemporaryDirectory(prefix="bench-litellm-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [program, "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
        # It does not start without a key of its own.
        key = f"sk-{secrets.token_hex(16)}"
        env = {
            "BENCH_ENGINE_KEY": behind.key,
            "LITELLM_MASTER_KEY": key,
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        with _process(command, env) as process:
            target = Target("litellm", f"http://127.0.0.1:{port}", MODEL, key)
            _until_it_answers(process, target)
            yield target


@contextmanager
def _process(
    command: Sequence[str], env: Mapping[str, str], *, stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the process's group to end, then end it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_TIMEOUT_S)
            break
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    if process.stdout is not None:
        process.stdout.close()


def _until_it_answers(process: subprocess.Popen[str], target: Target) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SetupError(f"{target.path} ended with {process.returncode} before it answered")
        try:
            ask(target, "post")
            return
        except OSError:
            time.sleep(0.25)
    raise SetupError(f"{target.path} did not answer in {START_TIMEOUT_S:g} s")


def ask(target: Target, workload: str) -> str:
    """One request's answer as text. Raises OSError if it is no 200 (urllib's HTTPError is one)."""
    headers = {"content-type": "application/json"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"
    url = f"{target.url}/v1/chat/completions"
    request = urllib.request.Request(url, body(target.model, workload), headers)
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        return str(answer.read().decode())
