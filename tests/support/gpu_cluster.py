"""A plane on several Ray nodes of one machine, each with eight GPUs of a scripted driver of its own.

The driver (tests/support/nvml_driver) is read by Ray's own detection and by the node agents through the real
NVML binding; engines are simulated and lease GPUs without computing there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from controlplane.errors import SetupError
from controlplane.paths import RUN_DIR_VARIABLE
from tests.support.nvml_driver.driver import STATE_VARIABLE, FakeDriver
from tests.support.plane import TIERPLANE, Plane, running
from tests.support.waiting import until

GPUS = 8
JOIN_LIMIT_S = 60.0
QUICK_NODE_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray takes a node that does not answer for lost after about 2 s instead of 15 s."""


@dataclass(frozen=True, slots=True)
class GpuNode:
    """One node with its driver."""

    driver: FakeDriver

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on it."""
        mark = f"{STATE_VARIABLE}={self.driver.state_path}".encode()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found.append(process)
        return found

    def uuids(self) -> list[str]:
        """Of its GPUs, in the driver's order."""
        return [self.driver.uuid(index) for index in range(GPUS)]

    def lose(self) -> None:
        """All of it ends at once, as when a machine is switched off."""
        for _ in range(5):
            found = self.processes()
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not found:
                return
            psutil.wait_procs(found, timeout=1.0)


class GpuCluster:
    """A plane, its first node, and nodes that join it."""

    def __init__(self, plane: Plane, head: GpuNode, folder: Path) -> None:
        self.plane = plane
        self.head = head
        self.nodes = [head]
        self._folder = folder
        self._address = json.loads((plane.folder / "run" / "up.json").read_text())["ray_address"]

    def join(self) -> GpuNode:
        """Another node with eight GPUs. Raises SetupError if Ray does not take it."""
        folder = self._folder / f"node-{len(self.nodes)}"
        folder.mkdir()
        node = GpuNode(FakeDriver(folder, devices=GPUS))
        # As the first node's, but for the driver.
        env = dict(self.plane.processes("raylet/raylet")[0].environ()) | node.driver.env()
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--address", self._address),
            *("--node-ip-address", "127.0.0.1", "--num-cpus", "2", "--object-store-memory", "80000000"),
            *("--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"),
            *("--disable-usage-stats", "--include-log-monitor", "false"),
        ]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=JOIN_LIMIT_S, check=False
        )
        if done.returncode != 0:
            raise SetupError(f"no second node:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        self.nodes.append(node)
        until(lambda: {gpu["uuid"] for gpu in self.gpus()} >= set(node.uuids()), JOIN_LIMIT_S, "its GPUs")
        return node

    def environment(self) -> dict[str, str]:
        """For commands of ours that ask this plane."""
        env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        return {**env, RUN_DIR_VARIABLE: str(self.plane.folder / "run")}

    def tierplane(self, *arguments: str) -> str:
        """What a command of ours prints. Raises SetupError if it fails."""
        env = self.environment()
        done = subprocess.run(
            [*TIERPLANE, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode not in {0, 3}:
            raise SetupError(f"tierplane {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def gpus(self) -> list[dict[str, Any]]:
        """`tierplane gpus --json`."""
        found: list[dict[str, Any]] = json.loads(self.tierplane("gpus", "--json"))["gpus"]
        return found

    def events(self, lines: int = 400) -> list[dict[str, Any]]:
        """`tierplane events --json`, oldest first."""
        return [
            json.loads(line) for line in self.tierplane("events", "--json", "-n", str(lines)).splitlines()
        ]


@contextmanager
def gpu_cluster(args: Mapping[str, Any]) -> Iterator[GpuCluster]:
    """A plane of ``args`` on one node with eight GPUs; more nodes join. Stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="gpus-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "node-0").mkdir()
        head = GpuNode(FakeDriver(folder / "node-0", devices=GPUS))
        with running(args, {**head.driver.env(), **QUICK_NODE_DEATH}) as plane:
            yield GpuCluster(plane, head, folder)
