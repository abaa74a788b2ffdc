"""A running plane as operators treat it: watched by Prometheus, and changed under load."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.monitoring.dashboards import DASHBOARDS, GPUS
from controlplane.monitoring.files import local_files
from controlplane.monitoring.rules import JOB
from controlplane.ray_cluster.ports import free_port
from tests.benchmarks.load import Load, generate, question, session
from tests.support.debian_tools import tool
from tests.support.plane import Plane, running
from tests.support.waiting import until, until_async

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TOKENS = 40
LIGHT, HEAVY = "lightweight", "balanced"


def tier(name: str, **more: Any) -> dict[str, Any]:
    values = {"name": name, "engine": "simulated", "engine_args": {"itl_ms": 10, "tokens": TOKENS}}
    return {**values, "drain_timeout_s": 10.0, **more}


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    # One tier has a replica that serves while the other changes; the other starts one more before it stops.
    tiers = [tier(LIGHT, replicas=2), tier(HEAVY, rollout_surge=1)]
    with running({"tiers": tiers, "controller": {"heartbeat_s": 0.5}}) as started:
        yield started


def record(plane: Plane) -> dict[str, Any]:
    found = json.loads((plane.folder / "run" / "up.json").read_text())
    assert isinstance(found, dict)
    return found


def deploy(plane: Plane, values: dict[str, Any]) -> None:
    """What an operator does: ``serve run`` once more, with a changed file."""
    path = plane.folder / "changed.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    known = record(plane)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{known['temp_dir']}/auth_token"}
    serve = Path(sys.executable).parent / "serve"
    command = [serve, "run", "--non-blocking", "--address", known["ray_address"], path]
    done = subprocess.run(command, env={**os.environ, **token}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def under_load(plane: Plane, change: Callable[[], None], over: Callable[[], bool]) -> Load:
    """A steady load on both tiers, from before ``change`` until after ``over``."""
    load, ends_s = Load(), [float("inf")]

    async def more(answers: int) -> None:
        wanted = len(load.outcomes) + answers
        await until_async(lambda: len(load.outcomes) >= wanted, 60.0, f"{answers} more answers")

    def ask(number: int) -> tuple[Any, dict[str, str]]:
        kind: Any = "stream" if number % 3 else "post"
        return question(number, kind, (LIGHT, HEAVY)[number % 2], 20, TOKENS), {}

    async with session() as http:
        task = asyncio.create_task(generate(load, http, plane.url, 25.0, ask, lambda: ends_s[0]))
        await more(25)
        await asyncio.to_thread(change)
        await asyncio.to_thread(until, over, 150.0, "the change to be over")
        await more(50)
        ends_s[0] = 0.0
        await task
    return load


class Webhook(BaseHTTPRequestHandler):
    """Keeps what Alertmanager posts."""

    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append(json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    received: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hook", (Webhook,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/alerts", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def program(name: str, folder: Path, *options: str) -> Iterator[None]:
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([tool(name), *options], stdout=log, stderr=log, cwd=folder)
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


def query(prometheus: str, expr: str) -> list[Any]:
    url = f"http://{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        response = json.load(answer)
    assert response["status"] == "success", (expr, response)
    result = response["data"]["result"]
    assert isinstance(result, list)
    return result


def hurried(files: dict[str, str]) -> dict[str, str]:
    """The same files for a test that can't wait: seconds instead of minutes."""
    prometheus, alerts = yaml.safe_load(files["prometheus.yml"]), yaml.safe_load(files["alertmanager.yml"])
    prometheus["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    rules = yaml.safe_load(files["rules.yml"])
    for group in rules["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    alerts["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    changed = {"prometheus.yml": prometheus, "alertmanager.yml": alerts, "rules.yml": rules}
    return files | {name: yaml.safe_dump(value) for name, value in changed.items()}


WITHOUT_FAULTS = {
    "Impossible token counts",
    "Failures by reason", "Queued requests", "Time in the queue", "Shed by reason", "Retries by reason",
    "Streams that lost their engine", "Hedged requests", "Failures at endpoints",
    "Requests served by another tier", "GPU time on the next tier", "Scaling alerts", "Firing alerts",
    "Open recommendations",
}  # fmt: skip
"""Panels that may be empty on a plane where nothing goes wrong, beside those of GPUs that aren't there."""


def test_prometheus_scrapes_every_panel_answers_and_an_alert_is_delivered(
    plane: Plane, tmp_path: Path
) -> None:
    asyncio.run(under_load(plane, lambda: None, lambda: True))  # something to show
    address, alertmanager = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    gateway, nobody = plane.url.removeprefix("http://"), f"127.0.0.1:{free_port()}"
    ray_targets = f"{record(plane)['temp_dir']}/prom_metrics_service_discovery.json"
    with webhook() as (hook, received):
        files = hurried(
            local_files([gateway, nobody], webhook=hook, alertmanager=alertmanager, ray_targets=ray_targets)
        )
        for name in ("prometheus.yml", "alertmanager.yml", "rules.yml"):
            (tmp_path / name).write_text(files[name])
        with (
            program(
                "prometheus-alertmanager",
                tmp_path,
                "--config.file=alertmanager.yml",
                f"--web.listen-address={alertmanager}",
                "--cluster.listen-address=",
                "--storage.path=alerts",
            ),
            program(
                "prometheus",
                tmp_path,
                "--config.file=prometheus.yml",
                f"--web.listen-address={address}",
                "--storage.tsdb.path=data",
            ),
        ):
            until(lambda: _scraped(address, gateway), 30, "Prometheus to scrape the gateway")
            asyncio.run(under_load(plane, lambda: None, lambda: True))  # between two scrapes: a rate
            until(
                lambda: query(address, 'rate(tierplane_requests_total{outcome="ok"}[5m]) > 0'), 20, "a rate"
            )
            until(lambda: query(address, "tier:tierplane_saturation:ratio"), 20, "the recording rules")
            _every_panel_answers(address)
            delivered = until(lambda: _alert(received, "TierplaneGatewayUnreachable"), 40, "the alert")
    assert delivered["labels"]["instance"] == nobody
    assert delivered["status"] == "firing"
    assert nobody in delivered["annotations"]["summary"]


def _scraped(address: str, gateway: str) -> bool:
    try:
        return bool(query(address, f'up{{job="{JOB}", instance="{gateway}"}} == 1'))
    except OSError:
        return False


def _every_panel_answers(address: str) -> None:
    empty = set()
    for board in DASHBOARDS:
        for panel in board.panels:
            found = [query(address, expr) for expr in panel.queries.values()]
            if not all(found) and board is not GPUS:
                empty.add(panel.title)
    assert empty <= WITHOUT_FAULTS


def _alert(received: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    alerts = [alert for message in list(received) for alert in message["alerts"]]
    return next((alert for alert in alerts if alert["labels"]["alertname"] == name), None)


def test_a_tiers_engine_arguments_change_under_load_and_no_request_fails(plane: Plane) -> None:
    values = yaml.safe_load((plane.folder / "plane.yaml").read_text())
    for each in values["applications"][0]["args"]["tiers"]:
        each["engine_args"]["itl_ms"] = 5
    before = {e["endpoint_id"] for e in plane.get("/status")["endpoints"]}
    gateways = {g["gateway_id"] for g in plane.get("/status")["gateways"]}

    def over() -> bool:
        status = plane.get("/status")
        now = {e["endpoint_id"] for e in status["endpoints"] if e["state"] == "ready"}
        others = {g["gateway_id"] for g in status["gateways"]}
        return len(now) == 3 and not now & before and len(others) == 1 and not others & gateways

    load = asyncio.run(under_load(plane, lambda: deploy(plane, values), over))
    fates = Counter(each.fate for each in load.outcomes)
    assert fates.keys() == {"ok"}, [each.detail for each in load.outcomes if each.fate != "ok"][:5]
    assert fates["ok"] > 100
