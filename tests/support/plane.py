"""A whole plane, started by ``tierplane up`` on free ports, with a run directory of its own.

Nothing of it is reached in a way that a user could not: faults go to its processes and to the simulated
engines' own interface.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from controlplane.engines.simulated.engine import KEY_ENV
from controlplane.errors import SetupError
from controlplane.paths import RUN_DIR_VARIABLE
from controlplane.ray_cluster.ports import free_port
from controlplane.ray_cluster.session import PLANE_ID_VARIABLE, processes
from tests.support.config_file import write_config
from tests.support.processes import await_line

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
HTTP_TIMEOUT_S = 10.0
TIERPLANE = (sys.executable, "-c", "from controlplane.cli import main; main()")


@dataclass(frozen=True, slots=True)
class Plane:
    """A running plane."""

    url: str
    """The gateway's own port."""
    ingress_url: str
    """The same through Serve."""
    plane_id: str
    folder: Path

    def get(self, path: str) -> Any:
        """A JSON page of the gateway; an unhealthy ``/health`` is a page like any other."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=HTTP_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)

    def text(self, path: str) -> str:
        """A page of the gateway as text."""
        with urllib.request.urlopen(self.url + path, timeout=HTTP_TIMEOUT_S) as answer:
            return str(answer.read().decode())

    def resumes(self) -> float:
        """Streams that went on elsewhere so far, of all gateway replicas together."""
        return self.total("tierplane_resumes_total", method={"continue", "replay", "finish"})

    def total(self, counter: str, **labels: Collection[str]) -> float:
        """The counter's series whose ``labels`` have one of these values, of all gateways together."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.text("/metrics"))
            for sample in family.samples
            if sample.name == counter and all(sample.labels.get(key) in labels[key] for key in labels)
        )

    def endpoints(self, tier: str) -> list[dict[str, Any]]:
        """The endpoints of a tier, as ``/status`` tells."""
        return [each for each in self.get("/status")["endpoints"] if each["tier"] == tier]

    def ready(self, tier: str) -> list[dict[str, Any]]:
        """Those of them that are ready."""
        return [endpoint for endpoint in self.endpoints(tier) if endpoint["state"] == "ready"]

    def processes(self, *title: str) -> list[psutil.Process]:
        """The plane's processes whose command line has all of ``title``."""
        return titled(self.plane_id, *title)

    def replica_actor(self, endpoint: Mapping[str, Any]) -> psutil.Process:
        """The process of the actor that supervises an endpoint's engine."""
        for parent in psutil.Process(endpoint["pid"]).parents():
            if "ray::" in command(parent):
                return parent
        raise SetupError(f"no actor stands over process {endpoint['pid']}")

    def knobs(self, endpoint: Mapping[str, Any], **values: Any) -> None:
        """Change a simulated engine's settings, at its own port with its own secret."""
        request = urllib.request.Request(
            f"{endpoint['base_url']}/simulated/knobs",
            json.dumps(values).encode(),
            {"authorization": f"Bearer {_variable(endpoint['pid'], KEY_ENV)}"},
        )
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S):
            pass


@contextmanager
def running(
    args: Mapping[str, Any], extra_env: Mapping[str, str] | None = None, *, dashboard: bool = False
) -> Iterator[Plane]:
    """A plane of ``args`` (as in a config file; the gateway's port is chosen here), stopped at the end.
    ``extra_env`` is what its processes find in their environment beside this one's; ``dashboard``: with
    Ray's.

    Raises SetupError if it does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    port, ingress_port = free_port(), free_port()
    plane_args = {**args, "gateway": {**args.get("gateway", {}), "host": "127.0.0.1", "port": port}}
    http = {"host": "127.0.0.1", "port": ingress_port}
    path = write_config(folder, plane_args, name="bench", proxy_location="EveryNode", http_options=http)
    env = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", PLANE_ID_VARIABLE}}
    env |= {**(extra_env or {}), RUN_DIR_VARIABLE: str(folder / "run")}
    up = subprocess.Popen(
        [
            *(*TIERPLANE, "up", str(path), "--json", "--timeout", str(START_TIMEOUT_S)),
            *(("--dashboard",) if dashboard else ()),
        ],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    before = _end_in_order_on_sigterm()
    try:
        await_line(up, '"event": "ready"', START_TIMEOUT_S + 30.0, "the plane")
        record = json.loads((folder / "run" / "up.json").read_text())
        yield Plane(
            f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ingress_port}", record["plane_id"], folder
        )
    finally:
        _stop(up, env)
        shutil.rmtree(folder, ignore_errors=True)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end_in_order_on_sigterm() -> Any:
    """Let SIGTERM (`timeout`, a cancelled job) unwind like Ctrl-C, so that no plane stays behind; gives the
    handler before, or None in a thread, where none can be set."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, leave)


def _stop(up: subprocess.Popen[str], env: Mapping[str, str]) -> None:
    """Ctrl-C, once more for hurry, and ``tierplane down`` for what is left."""
    for _ in range(2):
        if up.poll() is None:
            up.send_signal(signal.SIGINT)
            try:
                up.wait(STOP_TIMEOUT_S / 3)
            except subprocess.TimeoutExpired:
                continue
    if up.poll() is None:
        up.kill()
        up.wait()
    if up.stdout is not None:
        up.stdout.close()
    if (Path(env[RUN_DIR_VARIABLE]) / "up.json").exists():
        subprocess.run(
            [*TIERPLANE, "down"], env=env, capture_output=True, timeout=STOP_TIMEOUT_S, check=False
        )


def titled(plane_id: str, *title: str) -> list[psutil.Process]:
    """The processes of a plane whose command line has all of ``title``; what ends meanwhile is none."""
    return [each for each in processes(plane_id) if all(part in command(each) for part in title)]


def command(process: psutil.Process) -> str:
    """Its command line, none if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _variable(pid: int, name: str) -> str:
    for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        key, _, value = item.partition(b"=")
        if key == name.encode():
            return value.decode()
    return ""
