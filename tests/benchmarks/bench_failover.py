"""What it takes to leave a GPU or a node behind: requests that fail, and how long each step takes.

A plane on Ray nodes with eight scripted GPUs each (tests/support/gpu_cluster.py), all of the first in use:
five simulated engines of tier ``fast`` with one GPU, one of tier ``pair`` with two, two of tier ``small``
with half a GPU. Streams and posts come at a steady rate to ``fast``; clients know the only right answer of
each request and do not try again.

* cordoned_s: until the controller has taken the GPU out of use.
* moved_s: until the replica that was there has ended and another one serves elsewhere.
* recovered_s: until every tier has as many replicas ready as configured, none of them on what was lost.
* started, ended: replicas that registered and that were deregistered or lost from the strike on: a move is
  one of each.

With --engine: instead, the time from kill -9 of an engine process until it serves again, beside the time in
which the same engine starts by itself, both in one run.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import click

from tests.benchmarks import engine_restart
from tests.benchmarks.load import Load, generate, half_streamed, p99_ms, session
from tests.support.gpu_cluster import GpuCluster, GpuNode, gpu_cluster
from tests.support.plane import TIERPLANE
from tests.support.waiting import until

TIER, PAIR, SMALL = "fast", "pair", "small"
REPLICAS = {TIER: 5, PAIR: 1, SMALL: 2}
GPUS = {TIER: 1.0, PAIR: 2.0, SMALL: 0.5}
"""Of one replica."""
TOKENS, NATURAL_TOKENS = 90, 110
ENGINE = {"ttft-ms": 20, "itl-ms": 5, "tokens": NATURAL_TOKENS}
RECOVERY_LIMIT_S = 60.0
HOT_S = 2.0
HOT_C = 89
"""Over the slowdown temperature of the scripted GPUs, under that at which they switch off."""
SILENT_S = 6.0
"""How long the driver does not answer."""


@click.command(name="failover")
@click.option("--scenarios", default="", help="Which, with commas; all by default.")
@click.option("--seconds", default=2.0, show_default=True, help="Load before each strike, and after its end.")
@click.option("--rate", default=10.0, show_default=True, help="Requests per second, half of them streams.")
@click.option(
    "--engine",
    type=click.Choice(["simulated", "vllm"]),
    help="Instead: kill -9 an engine of this kind, beside its own start.",
)
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def command(scenarios: str, seconds: float, rate: float, engine: str | None, as_json: bool) -> None:
    """What moving away from a lost GPU, node, driver or controller costs, step by step."""
    names = [name.strip() for name in scenarios.split(",") if name.strip()] or list(SCENARIOS)
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there is {', '.join(SCENARIOS)}")
    details: list[str] = []
    if engine:
        rows = engine_restart.measure(engine)
    else:
        with failover_cluster() as cluster, Timeline(cluster) as timeline:
            rows = []
            for name in names:
                row, lines = asyncio.run(measure(cluster, timeline, SCENARIOS[name], seconds, rate))
                rows.append(row)
                details += [f"{name}: {line}" for line in lines]
    if as_json:
        click.echo(json.dumps({"rows": rows, "details": details}))
        return
    click.echo("  ".join(f"{name:>{max(10, len(name))}}" for name in rows[0]))
    for row in rows:
        shown = ("" if value is None else value for value in row.values())
        click.echo(
            "  ".join(f"{value:>{max(10, len(name))}}" for name, value in zip(row, shown, strict=True))
        )
    for line in details:
        click.echo(line)


def plane_args() -> dict[str, Any]:
    """All eight GPUs of a node in use. Everything is looked at twice a second, to keep it short."""
    common = {"engine": "simulated", "concurrency_limit": 24, "drain_timeout_s": 5.0}
    return {
        "tiers": [
            {**common, "name": name, "replicas": count, "engine_args": {**ENGINE, "gpus": GPUS[name]}}
            for name, count in REPLICAS.items()
        ],
        "gateway": {"default_tier": TIER},
        "controller": {
            "heartbeat_s": 0.5,
            "tick_interval_s": 0.5,
            "sample_interval_s": 0.5,
            "overheat_after_s": HOT_S,
            "cordon_hold_s": 600.0,
        },
    }


def failover_cluster() -> Any:
    """The cluster of all scenarios."""
    return gpu_cluster(plane_args())


class Timeline:
    """What ``tierplane events --follow`` says while scenarios run."""

    def __init__(self, cluster: GpuCluster) -> None:
        self.events: list[dict[str, Any]] = []
        self._cluster = cluster

    def __enter__(self) -> Timeline:
        self._process = subprocess.Popen(
            [*TIERPLANE, "events", "--follow", "--json", "-n", "1"],
            env=self._cluster.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        until(lambda: self.events, 30, "the first event")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._thread.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def first_s(self, since_unix_s: float, holds: Callable[[dict[str, Any]], bool]) -> float | None:
        """How long after ``since_unix_s`` the first such event was; None if there was none."""
        for event in self.since(since_unix_s):
            if holds(event):
                return round(float(event["unix_s"]) - since_unix_s, 2)
        return None

    def since(self, unix_s: float) -> list[dict[str, Any]]:
        """The events from then on."""
        return [event for event in self.events if event["unix_s"] >= unix_s]


@dataclass
class Strike:
    """What was done, and what has to be true afterwards."""

    gpu: str = ""
    """The UUID of the GPU that has to be left."""
    lost: frozenset[str] = frozenset()
    """UUIDs that nothing may run on at the end."""
    leaves: frozenset[str] = frozenset()
    """Endpoints that end."""
    moves: bool = True
    """False: nothing may move."""
    over: Callable[[], bool] = field(default=lambda: True)


@dataclass(frozen=True)
class Scenario:
    """Something that goes wrong."""

    name: str
    about: str
    strike: Callable[[GpuCluster, Timeline], Strike]
    prepare: Callable[[GpuCluster], None] = lambda _: None


async def measure(
    cluster: GpuCluster, timeline: Timeline, scenario: Scenario, seconds: float, rate: float
) -> tuple[dict[str, Any], list[str]]:
    """A row, and the time line with everything that went wrong."""
    await asyncio.to_thread(scenario.prepare, cluster)
    await asyncio.to_thread(until, lambda: whole(cluster), RECOVERY_LIMIT_S, "a whole plane")
    end_s = [float("inf")]
    load = Load()
    ask = half_streamed(TIER, TOKENS, NATURAL_TOKENS)
    async with session() as http:
        task = asyncio.create_task(generate(load, http, cluster.plane.url, rate, ask, lambda: end_s[0]))
        await asyncio.sleep(seconds)
        before = {each["endpoint_id"] for each in cluster.plane.get("/status")["endpoints"]}
        struck_unix_s, struck_s = time.time(), monotonic()
        strike = await asyncio.to_thread(scenario.strike, cluster, timeline)
        recovered_s = await asyncio.to_thread(_recovered_s, cluster, strike, struck_s)
        await asyncio.sleep(seconds)
        end_s[0] = 0.0
        await task
    events = timeline.since(struck_unix_s)
    after = {each["endpoint_id"] for each in cluster.plane.get("/status")["endpoints"]}
    came = {e["subject"] for e in events if e["kind"] == "registered"} - before
    wrong = [each for each in load.outcomes if each.fate != "ok"]
    row = {
        "scenario": scenario.name,
        "requests": len(load.outcomes),
        "failed": len(wrong),
        "started": len(came),
        "ended": len({e["subject"] for e in events if e["kind"] in _ENDS and e["subject"] in before | came}),
        "kept": len(before & after),
        "cordoned_s": timeline.first_s(
            struck_unix_s, lambda e: e["subject"] == strike.gpu and "cordoned" in e["kind"]
        ),
        "moved_s": _moved_s(timeline, struck_unix_s, strike, before),
        "recovered_s": recovered_s,
        "p99_ms": p99_ms(load.outcomes),
    }
    lines = [
        f"{event['unix_s'] - struck_unix_s:+7.2f} s  {event['kind']}: {event['subject']}: {event['reason']}"
        for event in events
    ]
    lines += [
        f"{each.began_s - struck_s:+.2f} s to {each.ended_s - struck_s:+.2f} s {each.fate}: {each.detail}"
        for each in wrong
    ]
    return row, lines


def whole(cluster: GpuCluster) -> bool:
    """Every tier has its replicas ready, and no other ones."""
    endpoints = cluster.plane.get("/status")["endpoints"]
    counts = {tier: sum(each["tier"] == tier for each in endpoints) for tier in REPLICAS}
    return counts == REPLICAS and all(each["state"] == "ready" for each in endpoints)


def _recovered_s(cluster: GpuCluster, strike: Strike, struck_s: float) -> float | None:
    """Until the plane is whole without what was lost; None if it is not in time."""
    while monotonic() - struck_s < RECOVERY_LIMIT_S:
        endpoints = cluster.plane.get("/status")["endpoints"]
        here = {each["endpoint_id"] for each in endpoints}
        used = {uuid for each in endpoints for uuid in each["gpu_uuids"]}
        if strike.over() and not here & strike.leaves and not used & strike.lost and whole(cluster):
            return round(monotonic() - struck_s, 2)
        time.sleep(0.1)
    return None


def _moved_s(timeline: Timeline, unix_s: float, strike: Strike, before: set[str]) -> float | None:
    """Until all that left is gone and as many others are ready."""
    if not strike.moves:
        return None
    events = timeline.since(unix_s)
    gone = [e["unix_s"] for e in events if e["subject"] in strike.leaves and e["kind"] in _ENDS]
    came = [e["unix_s"] for e in events if e["kind"] == "ready" and e["subject"] not in before]
    if len(gone) < len(strike.leaves) or len(came) < len(strike.leaves):
        return None
    return round(float(max(*gone, *came[: len(strike.leaves)])) - unix_s, 2)


_ENDS = frozenset({"deregistered", "lost", "dropped"})


def _victim(cluster: GpuCluster, node: GpuNode) -> tuple[int, str, dict[str, Any]]:
    """Index and UUID of a GPU of the node with an endpoint of ``fast``, and the endpoint."""
    for index, uuid in enumerate(node.uuids()):
        for endpoint in cluster.plane.endpoints(TIER):
            if uuid in endpoint["gpu_uuids"]:
                return index, uuid, endpoint
    raise click.ClickException(f"tier {TIER} has no GPU on that node")


def _xid(cluster: GpuCluster, _: Timeline) -> Strike:
    index, uuid, endpoint = _victim(cluster, cluster.head)
    cluster.head.driver.xid(index, 79)
    cluster.head.driver.lose(index)
    return Strike(uuid, frozenset({uuid}), frozenset({endpoint["endpoint_id"]}))


def _hot(cluster: GpuCluster, _: Timeline) -> Strike:
    index, uuid, endpoint = _victim(cluster, cluster.head)
    cluster.head.driver.set(index, temperature=HOT_C)
    return Strike(uuid, frozenset({uuid}), frozenset({endpoint["endpoint_id"]}))


def _no_driver(cluster: GpuCluster, _: Timeline) -> Strike:
    cluster.head.driver.driver_fails()
    time.sleep(SILENT_S)
    cluster.head.driver.driver_fails(0)
    return Strike(moves=False)


def _controller(cluster: GpuCluster, timeline: Timeline) -> Strike:
    index, uuid, endpoint = _victim(cluster, cluster.head)
    name, since_unix_s = endpoint["endpoint_id"], time.time()
    cluster.head.driver.set(index, temperature=HOT_C)
    until(
        lambda: timeline.first_s(since_unix_s, lambda e: e["subject"] == name and "elsewhere" in e["kind"]),
        RECOVERY_LIMIT_S,
        "the begin of the move",
    )
    epoch = cluster.plane.get("/status")["snapshot"]["epoch"]
    for process in cluster.plane.processes("ray::ControllerActor"):
        process.kill()
    return Strike(
        uuid,
        frozenset({uuid}),
        frozenset({name}),
        over=lambda: cluster.plane.get("/status")["snapshot"]["epoch"] != epoch,
    )


def _mend(cluster: GpuCluster) -> None:
    """The first node's GPUs are good again, and an operator says so."""
    for index in range(len(cluster.head.uuids())):
        cluster.head.driver.find(index)
        cluster.head.driver.set(index, temperature=45)
    here = set(cluster.head.uuids())

    def seen_again() -> bool:
        """Until then it would be taken out of use again: the agent looks for lost GPUs now and then."""
        return all(gpu["condition"] == "ok" for gpu in cluster.gpus() if gpu["uuid"] in here)

    until(seen_again, RECOVERY_LIMIT_S, "that the driver has all GPUs again")
    for gpu in cluster.gpus():
        if gpu["cordoned"] and gpu["uuid"] in here:
            cluster.tierplane("uncordon", gpu["uuid"], "--reason", "the GPU was replaced")


def _node(cluster: GpuCluster, _: Timeline) -> Strike:
    node = cluster.nodes[-1]
    uuids = frozenset(node.uuids())
    endpoints = cluster.plane.get("/status")["endpoints"]
    leaves = frozenset(each["endpoint_id"] for each in endpoints if uuids & set(each["gpu_uuids"]))
    node.lose()
    return Strike("", uuids, leaves)


def _second_node(cluster: GpuCluster) -> None:
    if len(cluster.nodes) == 1:
        cluster.join()


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("xid", "a GPU falls off the bus (XID 79)", _xid, _second_node),
        Scenario("driver", f"NVML does not answer for {SILENT_S:g} s", _no_driver, _second_node),
        Scenario("hot", "a GPU is at its slowdown temperature", _hot, _second_node),
        Scenario("controller", "kill -9 the controller in the middle of a move", _controller, _second_node),
        Scenario("node", "a node is switched off", _node, _mend),
    )
}
"""By name, in the order of a run: each leaves what the next one needs."""


if __name__ == "__main__":
    command()
