"""A whole plane on a real Ray cluster, with simulated engines: what is killed comes back by itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from controlplane.ray_cluster.ports import free_port
from controlplane.ray_cluster.session import processes
from tests.support.openai_client import QUESTION, client
from tests.support.plane import TIERPLANE, Plane, command, running
from tests.support.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TIERS = ("lightweight", "balanced", "capable")


def tier(name: str, **more: Any) -> dict[str, Any]:
    values = {"name": name, "engine": "simulated", "engine_args": {"itl_ms": 5, "tokens": 40}}
    return {**values, "restart": {"backoff_initial_s": 0.1}, **more}


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    tiers = [tier("lightweight", replicas=2), tier("balanced"), tier("capable")]
    with running({"tiers": tiers, "controller": {"heartbeat_s": 0.5}}) as started:
        yield started
    assert not processes(started.plane_id), "Ctrl-C stops all that was started"


def ask(url: str, model: str) -> str:
    with client(url) as openai:
        answer = openai.chat.completions.create(model=model, messages=QUESTION, max_tokens=8)
        return answer.choices[0].message.content or ""


@pytest.mark.parametrize("model", TIERS)
@pytest.mark.parametrize("way", ["own port", "ingress"])
def test_each_tier_answers_streaming_and_not(plane: Plane, model: str, way: str) -> None:
    url = plane.url if way == "own port" else plane.ingress_url
    with client(url) as openai:
        whole = openai.chat.completions.with_raw_response.create(
            model=model, messages=QUESTION, max_tokens=8, temperature=0
        )
        assert whole.headers["x-tier"] == model
        text = whole.parse().choices[0].message.content
        stream = openai.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=8, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        assert {card.id for card in openai.models.list()} >= {"auto", *TIERS}


def test_a_killed_engine_is_back_by_itself_and_leaves_no_orphan(plane: Plane) -> None:
    before = plane.ready("capable")[0]
    os.kill(before["pid"], signal.SIGKILL)
    assert ask(plane.url, "capable")  # bridged, or after the restart: not lost
    after = until(
        lambda: [e for e in plane.ready("capable") if e["generation"] > before["generation"]],
        60,
        "a new generation",
    )[0]
    assert after["endpoint_id"] == before["endpoint_id"]
    assert after["pid"] != before["pid"]
    assert not psutil.pid_exists(before["pid"])
    engines = plane.processes("controlplane.engines.simulated.server", "--model", "simulated-capable")
    # The reaper and its watchdog carry the engine's command line, too.
    alone = [process.pid for process in engines if "reaper.py" not in command(process)]
    assert alone == [after["pid"]]


def test_a_killed_replica_actor_is_replaced_and_its_engine_ends(plane: Plane) -> None:
    before = plane.ready("balanced")[0]
    plane.replica_actor(before).kill()
    until(lambda: not psutil.pid_exists(before["pid"]), 20, "the orphaned engine's end")
    assert ask(plane.url, "balanced")
    until(
        lambda: [e for e in plane.ready("balanced") if e["endpoint_id"] != before["endpoint_id"]],
        60,
        "a new replica",
    )


def test_the_controllers_death_is_not_noticed_by_requests(plane: Plane) -> None:
    epoch = plane.get("/status")["snapshot"]["epoch"]
    # Those that live: the replica that was killed before may still be listed, and never registers again.
    living = [each for each in plane.get("/status")["endpoints"] if psutil.pid_exists(each["pid"] or -1)]
    known = {endpoint["endpoint_id"] for endpoint in living}
    assert len(known) == 4
    controllers = plane.processes("ray::ControllerActor")
    assert controllers
    for process in controllers:
        process.kill()
    for _ in range(20):
        assert ask(plane.url, "auto")
    until(lambda: plane.get("/status")["snapshot"]["epoch"] != epoch, 60, "the new controller's snapshot")
    until(
        lambda: {endpoint["endpoint_id"] for endpoint in plane.get("/status")["endpoints"]} >= known,
        60,
        "all replicas registered again",
    )


def test_a_client_that_hangs_up_aborts_the_request(plane: Plane) -> None:
    body = {"model": "balanced", "messages": QUESTION, "stream": True, "max_tokens": 5000, "ignore_eos": True}

    async def leave() -> None:
        host, port = plane.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await reader.readuntil(b"data: ")
        assert plane.get("/health")["tiers"]["balanced"]["in_flight"] == 1
        writer.transport.abort()

    asyncio.run(leave())
    until(lambda: plane.get("/health")["tiers"]["balanced"]["in_flight"] == 0, 5, "the abort")


def test_status_health_and_metrics(plane: Plane) -> None:
    until(lambda: plane.get("/health")["status"] == "healthy", 60, "all tiers ready again")
    assert "secret" not in plane.text("/status")
    metrics = plane.text("/metrics")
    assert 'tierplane_requests_total{gateway="' in metrics
    assert 'tierplane_endpoints{gateway="' in metrics


def test_serve_run_takes_the_file_as_it_stands_and_bad_ones_are_refused(
    tmp_path: Path, run_dir: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "applications:\n- import_path: deployments.app:build\n  args:\n    tiers:\n"
        "    - {name: a, engine: simulated, nonsense: 1}\n    - {name: a, engine: other}\n"
    )
    done = subprocess.run(
        [*TIERPLANE, "up", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert "nonsense" in said
    assert "engine" in said
    assert "Traceback" not in said


def test_serve_run_starts_a_plane(tmp_path: Path, run_dir: Path) -> None:
    """Ray's own command with our file: no command of ours is involved."""
    source = Path("configs/simulated.yaml").read_text()
    port, ingress = free_port(), free_port()
    text = source.replace("port: 8000", f"port: {ingress}").replace("port: 8080", f"port: {port}")
    assert text.count(str(port)) >= 1
    path = tmp_path / "plane.yaml"
    path.write_text(text)
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(run_dir)}
    env.pop("RAY_ADDRESS", None)
    command = [str(Path(sys.executable).parent / "serve"), "run", "--app-dir", ".", str(path)]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            until(lambda: _answers(f"http://127.0.0.1:{port}/health/ready"), 120, "serve run")
            until(lambda: _healthy(f"http://127.0.0.1:{port}"), 60, "all tiers")
            assert ask(f"http://127.0.0.1:{port}", "lightweight")
            assert ask(f"http://127.0.0.1:{ingress}", "lightweight")
        finally:
            run.send_signal(signal.SIGINT)
            try:
                run.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(json.load(answer)["status"] == "healthy")
    except (urllib.error.URLError, OSError):
        return False
