"""``tierplane up | down | status | logs`` as people use them, on a real Ray with simulated engines."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from controlplane.ray_cluster import session
from controlplane.ray_cluster.ports import free_port
from controlplane.ray_cluster.session import RunRecord, processes
from tests.support.config_file import write_config
from tests.support.plane import titled
from tests.support.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

COMMAND = (sys.executable, "-c", "from controlplane.cli import main; main()")
START_S = 150.0
ROBBED = """
import subprocess, sys
from controlplane.ray_cluster import session
from controlplane.cli import main
from controlplane.ray_cluster.ports import Ports

chosen, choose, start, servers = {}, Ports.choose, session.start, []
SERVER = "import socket, sys; s = socket.create_server(('', int(sys.argv[1]))); print(flush=True); input()"


def remember(self, purpose, preferred=0):
    chosen[purpose] = choose(self, purpose, preferred)
    return chosen[purpose]


def rob(*args, **kwargs):
    record = start(*args, **kwargs)
    if not servers:
        command = [sys.executable, "-c", SERVER, str(chosen["HAProxy's statistics"]), "--password=s3cret"]
        servers.append(subprocess.Popen(command, env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        servers[0].stdout.readline()
    return record


Ports.choose, session.start = remember, rob
try:
    main()
finally:
    servers[0].communicate()
"""
"""``tierplane``, but another program takes a port of HAProxy when Ray is up and HAProxy is not."""


@dataclass
class Machine:
    """A run folder and a configuration of its own, and the commands on them."""

    run_dir: Path
    config: Path
    url: str
    ingress_url: str
    env: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        left_out = {"RAY_ADDRESS", session.PLANE_ID_VARIABLE}
        env = {key: value for key, value in os.environ.items() if key not in left_out}
        return {**env, "TIERPLANE_RUN_DIR": str(self.run_dir), **self.env}

    def run(
        self, *arguments: str, timeout_s: float = 120.0, command: Sequence[str] = COMMAND
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def record(self) -> RunRecord:
        values = json.loads((self.run_dir / "up.json").read_text())
        return RunRecord(**{**values, "applications": tuple(values["applications"])})


def tier(name: str, **engine_args: Any) -> dict[str, Any]:
    settings = {"itl_ms": 20, "tokens": 40, **engine_args}
    return {"name": name, "engine": "simulated", "engine_args": settings, "drain_timeout_s": 20.0}


@contextlib.contextmanager
def machine(
    tiers: Sequence[Mapping[str, Any]],
    controller: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """A place to run commands in. Whatever still runs there at the end is stopped, and that is a failure."""
    run_dir = Path(tempfile.mkdtemp(prefix="tp-cli-", dir="/tmp"))
    port, ingress = free_port(), free_port()
    args = {
        "tiers": list(tiers),
        "gateway": {"port": port},
        "controller": {"heartbeat_s": 0.5, **(controller or {})},
    }
    path = write_config(run_dir, args, http_options={"host": "127.0.0.1", "port": ingress})
    urls = (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ingress}")
    place = Machine(run_dir, path, *urls, dict(env or {}))
    left = False
    try:
        yield place
    finally:
        if (run_dir / "up.json").exists():
            left = True
            place.run("down", "--now")
        shutil.rmtree(run_dir, ignore_errors=True)
    assert not left, "a plane was left running"


HOOK_SECRET = "a secret of the test"


@pytest.fixture(scope="module")
def hook() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A webhook's address, and the signatures and bodies that came there."""
    received: list[tuple[str, bytes]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.headers.get("x-tierplane-signature", ""), body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/alerts", received
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def up(hook: tuple[str, list[tuple[str, bytes]]]) -> Iterator[tuple[Machine, str]]:
    """A detached plane, and what ``up`` printed."""
    alerts = {
        "interval_s": 0.5,
        "repeat_s": 2.0,
        "webhooks": [{"url": hook[0], "secret_env": "TEST_HOOK_SECRET", "min_severity": "critical"}],
        "rules": {"TierplaneTierDown": {"for_s": 1.0}},
    }
    tiers = [tier("lightweight"), tier("balanced")]
    with machine(tiers, {"alerts": alerts}, {"TEST_HOOK_SECRET": HOOK_SECRET}) as place:
        done = place.run(
            "up", str(place.config), "--detach", "--timeout", str(START_S), timeout_s=START_S + 60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        plane_id = place.record().plane_id
        yield place, done.stdout
        if (place.run_dir / "up.json").exists():
            assert place.run("down").returncode == 0
        assert processes(plane_id) == []


def test_what_up_prints_works(up: tuple[Machine, str]) -> None:
    place, said = up
    assert "lightweight    ready      1/1" in said
    (curl,) = [line for line in said.splitlines() if line.startswith("curl ")]
    answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"]
    snippet = said[said.index("from openai import") :]
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer["choices"][0]["message"]["content"]
    assert place.url in curl


def test_a_second_up_is_refused(up: tuple[Machine, str]) -> None:
    place, _ = up
    done = place.run("up", str(place.config))
    assert done.returncode == 1
    assert "is already up" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_for_programs_and_for_people(up: tuple[Machine, str]) -> None:
    place, _ = up
    done = place.run("status", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["ready"]
    assert [each["name"] for each in value["tiers"]] == ["lightweight", "balanced"]
    endpoint = value["tiers"][0]["endpoints"][0]
    assert (endpoint["state"], endpoint["generation"], endpoint["restarts"]) == ("ready", 1, 0)
    assert endpoint["simulated"]
    assert endpoint["age_s"] > 0
    assert len(value["gateways"]) == 1
    assert "secret" not in done.stdout
    shown = place.run("status").stdout
    assert "lightweight" in shown
    assert "ready" in shown


def _both_controllers_are_killed(place: Machine) -> None:
    """Ours and Serve's; Ray makes them anew."""
    plane_id = place.record().plane_id
    before = titled(plane_id, "ray::ServeController") + titled(plane_id, "ray::ControllerActor")
    for each in before:
        each.kill()
    until(lambda: set(titled(plane_id, "ray::ServeController")) - set(before), 30)


def test_an_operator_restarts_an_engine_and_takes_a_tier_out_and_back(up: tuple[Machine, str]) -> None:
    place, _ = up

    def endpoints(tier: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{place.url}/status", timeout=5) as answer:
            return [each for each in json.load(answer)["endpoints"] if each["tier"] == tier]

    (before,) = endpoints("balanced")
    done = place.run("restart", before["endpoint_id"], "--reason", "new settings")
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: [e for e in endpoints("balanced") if (e["state"], e["generation"]) == ("ready", 2)], 30)
    done = place.run("drain", "lightweight", "--reason", "its weights change")
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: not endpoints("lightweight"), 30)
    assert answers(place.url), "its neighbour answers"
    replicas = partial(titled, place.record().plane_id, "ServeReplica:tierplane:lightweight")
    until(lambda: not replicas(), 30)
    _both_controllers_are_killed(place)
    for _ in range(60):
        assert not replicas(), "it starts although it is drained"
        time.sleep(0.1)
    assert place.run("uncordon", "lightweight").returncode == 0
    until(lambda: [e for e in endpoints("lightweight") if e["state"] == "ready"], 60)
    said = [json.loads(line) for line in place.run("events", "--json").stdout.splitlines()]
    ours = {(each["kind"], each["subject"], each["reason"]) for each in said if each["actor"] == "operator"}
    assert ("drain", "lightweight", "its weights change") in ours
    assert ("restart asked", before["endpoint_id"], "new settings") in ours


def test_a_tier_that_is_down_rings_until_it_is_acknowledged_and_is_over_when_it_is_back(
    up: tuple[Machine, str], hook: tuple[str, list[tuple[str, bytes]]]
) -> None:
    place, _ = up
    _, received = hook

    def all_notifications() -> list[tuple[str, str, str]]:
        items = [item for _, body in received for item in json.loads(body)["alerts"]]
        return [(item["event"], item["rule"], item["subject"]) for item in items]

    def notifications() -> list[tuple[str, str, str]]:
        return all_notifications()[heard:]

    def silent() -> bool:
        sent = all_notifications()
        return not shown() and sent.count(("firing", *down)) == sent.count(("resolved", *down))

    def page() -> dict[str, Any]:
        with urllib.request.urlopen(f"{place.url}/alerts", timeout=5) as answer:
            return dict(json.load(answer))

    def shown() -> list[dict[str, Any]]:
        return list(page()["alerts"])

    def noted() -> list[str]:
        said = place.run("events", "--json", "-n", "200").stdout.splitlines()
        ours = [each for each in map(json.loads, said) if each["subject"] == "lightweight"]
        return [each["kind"] for each in ours if "alert" in each["kind"]]

    down = ("TierplaneTierDown", "lightweight")
    # On a slow machine the tests before have made it ring already: only what comes now counts. That an alert
    # is over is in the snapshot before the webhook has been told.
    until(silent, 60)
    heard, before = len(all_notifications()), len(noted())
    # While a tier is cordoned nothing of it is started, and its replica is not replaced.
    assert place.run("cordon", "lightweight", "--reason", "a test").returncode == 0
    for process in titled(place.record().plane_id, "ServeReplica:tierplane:lightweight"):
        process.kill()
    until(lambda: ("firing", *down) in notifications(), 60)
    listed = json.loads(place.run("alerts", "--json").stdout)
    [alert] = [each for each in listed["alerts"] if each["rule"] == down[0]]
    assert (alert["state"], alert["severity"], alert["subject"]) == ("firing", "critical", "lightweight")
    assert listed["webhooks"][0]["delivered"] >= 1
    assert "TierDown" in place.run("alerts").stdout
    until(lambda: [each["subject"] for each in shown()] == ["lightweight"], 10)
    until(lambda: ("repeated", *down) in notifications(), 20)
    with urllib.request.urlopen(f"{place.url}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'alert="TierplaneTierDown",severity="critical",subject="lightweight"} 1.0' in text
    done = place.run("alerts", "ack", "TierDown", "lightweight", "--by", "ada")
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: [each["acknowledged"] for each in shown()] == ["ada"], 10)
    # A controller that is started anew remembers it, and has the secret from its environment again.
    epoch = page()["snapshot"]["epoch"]
    for process in titled(place.record().plane_id, "ray::ControllerActor"):
        process.kill()
    until(lambda: page()["known"] and page()["snapshot"]["epoch"] != epoch, 60)
    assert [(each["subject"], each["acknowledged"]) for each in shown()] == [("lightweight", "ada")]
    count = len(notifications())
    assert ("resolved", *down) not in notifications(), "it rings until its tier is back"
    assert place.run("uncordon", "lightweight").returncode == 0
    until(lambda: ("resolved", *down) in notifications(), 60)
    assert notifications()[count:] == [("resolved", *down)], "no further notification in between"
    until(lambda: shown() == [], 10)
    for signed, body in received:
        unix_s = signed.removeprefix("t=").partition(",")[0]
        mac = hmac.new(HOOK_SECRET.encode(), f"{unix_s}.".encode() + body, hashlib.sha256).hexdigest()
        assert signed == f"t={unix_s},v1={mac}"
    assert noted()[before:] == ["alert", "alert acknowledged", "alert over"]
    assert HOOK_SECRET not in place.run("logs", "controller").stdout


def test_logs_are_there_by_name(up: tuple[Machine, str]) -> None:
    place, _ = up
    balanced = place.run("logs", "balanced").stdout
    assert "engine ready" in balanced
    assert "lightweight" not in balanced
    assert "gateway started" in place.run("logs", "gateway").stdout
    assert "registered" in place.run("logs", "controller").stdout


def test_a_request_keeps_its_id_and_streams_arrive_as_they_are_made(up: tuple[Machine, str]) -> None:
    place, _ = up
    for url in (place.url, place.ingress_url):
        with stream(url, "balanced", tokens=40, request_id="my-id-7") as answer:
            assert answer.headers["x-request-id"] == "my-id-7"
            times_s = [time.monotonic() for line in answer if line.startswith(b"data: ")]
        assert times_s[-1] - times_s[0] > 0.5, "40 tokens, 20 ms each: not all at once"


def test_a_killed_gateway_is_replaced(up: tuple[Machine, str]) -> None:
    place, _ = up
    (gateway,) = titled(place.record().plane_id, "ServeReplica:tierplane:gateway")
    gateway.kill()
    for url in (place.url, place.ingress_url):
        until(partial(answers, url), 60, f"a gateway at {url}", every_s=0.2)


def test_down_lets_a_stream_end_and_leaves_nothing(up: tuple[Machine, str]) -> None:
    place, _ = up
    plane_id, temp_dir = place.record().plane_id, Path(place.record().temp_dir)
    with stream(place.url, "balanced", tokens=150) as answer:
        assert answer.readline().startswith(b"data: ")
        down = place.begin("down")
        lines = [line for line in answer if line.startswith(b"data: ")]
    said, _ = down.communicate(timeout=90)
    assert down.returncode == 0, said
    assert lines[-1].strip() == b"data: [DONE]", said
    assert len(lines) >= 150
    assert "none left" in said
    assert processes(plane_id) == []
    assert not temp_dir.exists()
    again = place.run("down")
    assert again.returncode == 0
    assert "Nothing to stop" in again.stdout


def test_a_tier_that_can_t_start_is_named_with_its_diagnosis_and_all_is_stopped() -> None:
    broken = {**tier("broken", exit_code=3), "restart": {"max_restarts": 1, "backoff_initial_s": 0.1}}
    with machine([tier("sound"), broken]) as place:
        up = place.begin("up", str(place.config))
        plane_id = until_record(place).plane_id
        said, _ = up.communicate(timeout=START_S)
        assert up.returncode == 1, said
        assert "tier 'broken' can't be started" in said
        assert "3" in said[said.index("tier 'broken'") :]
        assert "Traceback" not in said
        assert processes(plane_id) == []


def test_a_signal_while_starting_stops_all() -> None:
    with machine([tier("slow", load_s=600)]) as place:
        up = place.begin("up", str(place.config))
        try:
            plane_id = until_record(place).plane_id
            assert up.stdout is not None
            for line in up.stdout:
                if "starting" in line and "slow" in line:
                    break
            up.send_signal(signal.SIGTERM)
            said, _ = up.communicate(timeout=90)
        finally:
            up.kill()
            up.wait()
        assert up.returncode == 0, said
        assert "none left" in said
        assert processes(plane_id) == []


def test_down_stops_an_up_that_was_killed() -> None:
    with machine([tier("only")]) as place:
        up = place.begin("up", str(place.config))
        plane_id = until_record(place).plane_id
        until(lambda: answers(place.url), START_S)
        up.kill()
        up.communicate(timeout=10)
        assert answers(place.url), "the plane goes on without its terminal"
        down = place.run("down")
        assert down.returncode == 0, down.stdout + down.stderr
        assert processes(plane_id) == []


def test_on_a_foreign_ray_only_the_plane_is_stopped() -> None:
    theirs = "theirs"
    with machine([tier("only")]) as place:
        other = Path(tempfile.mkdtemp(prefix="tp-ray-", dir="/tmp"))
        script = (
            "import os, time, psutil\n"
            "from controlplane.ray_cluster import session as r\n"
            "from controlplane.ray_cluster.ports import Ports\n"
            f"record = r.RunRecord('{theirs}', 'x', ('x',), 'x', os.getpid(), 0.0, time.time(), True)\n"
            "with Ports() as ports:\n"
            "    record = r.start(r.prepare(record), ports, dashboard=False)\n"
            "print(record.ray_address, record.temp_dir)\n"
        )
        env = {**place.environment(), "TIERPLANE_RUN_DIR": str(other)}
        try:
            started = subprocess.run(
                [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
            )
            assert started.returncode == 0, started.stderr
            address, temp_dir = started.stdout.split()
            place.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{temp_dir}/auth_token"}
            done = place.run("up", str(place.config), "-d", "--address", address, timeout_s=START_S)
            assert done.returncode == 0, done.stdout + done.stderr
            assert answers(place.url)
            down = place.run("down")
            assert down.returncode == 0, down.stdout + down.stderr
            assert "Ray continues to run" in down.stdout
            assert not answers(place.url)
            assert titled(theirs, "raylet")
            assert not titled(theirs, "ControllerActor")
            assert not titled(theirs, "controlplane.engines.simulated.server")
        finally:
            stop = "from controlplane.ray_cluster import session as r\nr.stop(r.load_record())"
            subprocess.run([sys.executable, "-c", stop], env=env, check=True, timeout=60)
            shutil.rmtree(other, ignore_errors=True)
        assert processes(theirs) == []


def stream(url: str, model: str, *, tokens: int, request_id: str = "r-1") -> Any:
    body = {
        "model": model,
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Go on"}],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "x-request-id": request_id},
    )
    return urllib.request.urlopen(request, timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def until_record(place: Machine) -> RunRecord:
    until((place.run_dir / "up.json").exists, 30)
    return place.record()


def test_a_port_that_haproxy_loses_is_named_and_up_starts_again_with_others() -> None:
    with machine([tier("only")]) as place:
        done = place.run(
            *("up", str(place.config), "--detach", "--json", "--timeout", str(START_S)),
            timeout_s=2 * START_S,
            command=(sys.executable, "-c", ROBBED),
        )
        try:
            assert done.returncode == 0, done.stdout + done.stderr
            said = [json.loads(line) for line in done.stdout.splitlines()]
            steps = [each["text"] for each in said if each["event"] == "step"]
            [lost] = [step for step in steps if "is taken by" in step]
            assert re.match(
                r"port \d+ \(HAProxy's statistics\) is taken by python\S* \(process \d+\): starting again",
                lost,
            )
            assert "s3cret" not in done.stdout + done.stderr
            assert steps.count("starting Ray") == 2
            for url in (place.url, place.ingress_url):
                with urllib.request.urlopen(f"{url}/health/ready", timeout=10) as answer:
                    assert answer.status == 200
        finally:
            stopped = place.run("down", "--now")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
