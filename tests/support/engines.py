"""For tests of engines: processes that are watched to their end, supervisors that are always stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from controlplane.config import RestartConfig, TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines.simulated.engine import KEY_ENV
from controlplane.engines.supervision import reaper
from controlplane.engines.supervision.status import EngineStatus
from controlplane.engines.supervision.supervisor import EngineSupervisor
from controlplane.models import bundled

NO_RESTARTS = RestartConfig(max_restarts=0)
BUNDLED = "bundled:smollm2-135m"


class Recorder:
    """Records log events, and the states that a supervisor went through."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.statuses: list[EngineStatus] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def changed(self, status: EngineStatus) -> None:
        self.statuses.append(status)

    @property
    def states(self) -> list[EndpointState]:
        """The states in order, each once in a row."""
        found: list[EndpointState] = []
        for status in self.statuses:
            if not found or found[-1] is not status.state:
                found.append(status.state)
        return found


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    stat = reaper._stat(pid)
    return stat is not None and stat[0] not in "ZX"


def pid_of(status: EngineStatus) -> int:
    """The id of the engine's process, which there must be."""
    assert status.pid is not None
    return status.pid


def parent_of(pid: int) -> int:
    """The process that started it: of an engine, its reaper."""
    return psutil.Process(pid).ppid()


def marked(marker_part: bytes) -> list[int]:
    """Living processes that carry an engine marker with ``marker_part`` in it."""
    found = []
    for pid in reaper._pids():
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        prefix = reaper.MARKER.encode() + b"="
        if alive(pid) and any(item.startswith(prefix) and marker_part in item for item in environ):
            found.append(pid)
    return found


def local(model: str, _progress: Callable[[str], None]) -> str:
    """A resolver for models that are local paths."""
    return model


def tier_of(kind: str, **settings: Any) -> TierConfig:
    """A tier of that kind, small enough for a test."""
    kinds: dict[str, dict[str, Any]] = {
        "simulated": {"engine_args": {"ttft-ms": 20, "itl-ms": 5}},
        "llamacpp": {"model": BUNDLED, "engine_args": {"ctx-size": 4096}},
        "vllm": {"model": BUNDLED, "device": "cpu", "engine_args": {"max-model-len": 2048}},
        "endpoint": {"model": "served", "api_key_env": "TIERPLANE_TEST_KEY"},
    }
    return TierConfig(
        **{
            "name": f"t-{kind}",
            "engine": kind,
            "served_model_name": "served",
            "restart": NO_RESTARTS,
            **kinds[kind],
            **settings,
        }
    )


def resolver(tier: TierConfig) -> Callable[[str, Callable[[str], None]], str]:
    """Of a tier whose model may be bundled."""
    return lambda model, progress: bundled.resolve(model, tier.engine, progress) if model else ""


@contextmanager
def supervised(
    tier: TierConfig,
    *,
    replica_id: str = "r1",
    resolve: Callable[[str, Callable[[str], None]], str] = local,
) -> Iterator[tuple[EngineSupervisor, Recorder]]:
    """A started supervisor that is stopped at the end, whatever happens."""
    recorder = Recorder()
    supervisor = EngineSupervisor(
        tier, replica_id=replica_id, resolve_model=resolve, on_change=recorder.changed, log=recorder
    )
    supervisor.start()
    try:
        yield supervisor, recorder
    finally:
        supervisor.stop()


def call(
    url: str, secret: str = "", body: Any = None, timeout_s: float = 10.0
) -> tuple[int, dict[str, str], str]:
    """GET, or POST with a body: status, headers, text. An error status is returned, not raised."""
    headers = {"content-type": "application/json"}
    if secret:
        headers["authorization"] = f"Bearer {secret}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, dict(response.headers), response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of each server-sent event, without ``[DONE]``."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


class SimulatedServer:
    """A process of the simulated engine, and its address."""

    def __init__(self, secret: str = "s", **settings: Any) -> None:
        self.secret = secret
        self.popen = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "controlplane.engines.simulated.server",
                "--model",
                "m",
                "--settings",
                json.dumps(settings),
            ],
            stdout=subprocess.PIPE,
            env={**os.environ, KEY_ENV: secret},
        )
        assert self.popen.stdout is not None
        self.printed: list[str] = []
        self.port = 0
        for raw in self.popen.stdout:
            self.printed.append(raw.decode().strip())
            if "listening on" in self.printed[-1]:
                self.port = int(self.printed[-1].rsplit(":", 1)[1])
            if self.printed[-1] == "simulated: ready":
                break

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> tuple[int, dict[str, str], str]:
        body.setdefault("messages", [{"role": "user", "content": "hello"}])
        return call(f"http://127.0.0.1:{self.port}{path}", self.secret, body)

    def get(self, path: str, secret: str | None = None) -> tuple[int, dict[str, str], str]:
        return call(f"http://127.0.0.1:{self.port}{path}", self.secret if secret is None else secret)

    def knobs(self, **values: Any) -> Any:
        status, _, text = call(f"http://127.0.0.1:{self.port}/simulated/knobs", self.secret, values)
        assert status == 200, text
        return json.loads(text)

    def count(self, name: str, label: str = "") -> float:
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics")[2].splitlines()
            if line.startswith(f"simulated:{name}{{") and label in line
        )

    def close(self) -> int:
        self.popen.terminate()
        self.popen.communicate(timeout=10)
        return self.popen.returncode
