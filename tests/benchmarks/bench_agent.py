"""What watching a node costs: time per sample, memory, and how fast an XID event arrives.

A child process runs the production node agent through the real nvidia-ml-py against the scripted driver
(``tests/support/nvml_driver``), so the figures are the agent's and the binding's; a real driver's calls come
on top. Waiting for an event costs CPU here that a real driver does not: the scripted one looks every 2 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from tests.support.nvml_driver.driver import FakeDriver

_CHILD = """
import json, pickle, resource, sys, time
import psutil
from controlplane.node_agent.local import local_agent

samples = int(sys.argv[1])
agent = local_agent("bench", interval_s=3600, slow_interval_s=1e9)
first_s = agent.sample().cost_s
costs = sorted(agent.sample().cost_s for _ in range(samples))
slow = local_agent("bench", interval_s=3600, slow_interval_s=0)
slow_costs = sorted(slow.sample().cost_s for _ in range(samples // 10))
before, began = psutil.Process().cpu_times(), time.monotonic()
steady = local_agent("bench", interval_s=1.0)
with steady:
    time.sleep(10)
after = psutil.Process().cpu_times()
cpu_s = after.user + after.system - before.user - before.system
print(json.dumps({
    "sample_ms_p50": costs[len(costs) // 2] * 1e3,
    "sample_ms_p99": costs[int(len(costs) * 0.99)] * 1e3,
    "slow_sample_ms_p50": slow_costs[len(slow_costs) // 2] * 1e3,
    "cpu_percent": 100 * cpu_s / (time.monotonic() - began),
    "sample_kb": len(pickle.dumps(agent.latest())) / 1e3,
    "rss_mb": psutil.Process().memory_info().rss / 1e6,
}))
"""
_WATCH = """
import sys, time
from controlplane.node_agent.local import local_agent
with local_agent("bench") as agent:
    while not isinstance(agent.latest() and agent.latest().xid_watched_gpus, int):
        time.sleep(0.01)
    print("ready", flush=True)
    for seq in range(int(sys.argv[1])):
        while not agent.events(seq):
            time.sleep(0.0005)
        print(agent.events(seq)[0].unix_s, flush=True)
"""


@click.command(name="agent")
@click.option("--samples", default=2000, show_default=True, help="Samples per case.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def command(samples: int, as_json: bool) -> None:
    """Cost of the node agent: time per sample, CPU, memory, delay of an XID event."""
    rows = [measure(gpus, samples) for gpus in (0, 1, 8, 16)]
    if as_json:
        click.echo(json.dumps({"rows": rows}, indent=1))
        return
    names = list(rows[0])
    click.echo("  ".join(f"{name:>18}" for name in names))
    for row in rows:
        click.echo(
            "  ".join(f"{row[name]:>18.3f}" if row[name] is not None else f"{'':>18}" for name in names)
        )


def measure(gpus: int, samples: int) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        driver = FakeDriver(Path(folder), devices=gpus)
        for gpu in range(gpus):
            driver.links(gpu, [None] * 18)
        env = {**os.environ, **driver.env()}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(samples)],
            env=env,
            check=True,
            stdout=subprocess.PIPE,
            timeout=300,
        )
        delays = _delays(driver, env) if gpus else [None]
    return {"gpus": gpus, **json.loads(done.stdout), "xid_delay_ms_p50": delays[len(delays) // 2]}


def _delays(driver: FakeDriver, env: dict[str, str], events: int = 51) -> list[float]:
    delays = []
    with subprocess.Popen(
        [sys.executable, "-c", _WATCH, str(events)], env=env, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        for event in range(events):
            began = time.time()
            driver.xid(0, event)
            delays.append((float(child.stdout.readline()) - began) * 1e3)
    return sorted(delays)
