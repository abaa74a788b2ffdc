"""What one tick of the controller costs, by the size of the fleet, and whether its memory stays flat.

Every tick takes in a new sample of every node (readings that change, a lost GPU now and then), judges all
GPUs, looks at every lease, endpoint and move, and decides; then the state that has to survive is gathered.
It is the production code without Ray: a real tick waits for answers besides. Six GPUs of eight are held by
replicas that report every two seconds and obey.

``cpu_ms`` is the tick's time on the CPU, which other programs on the machine change less; ``decide_ms`` is
the part after taking the samples in. ``unpack_ms`` comes before, on the CPU: from the bytes of all agents'
answers to samples. The growth of the memory is from the second tenth of the ticks to the
last.
"""

from __future__ import annotations

import gc
import json
import pickle
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import click
import psutil

from controlplane.controller.controller import GC_THRESHOLDS, Controller, ControllerRules
from controlplane.controller.registry import Registry
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.leases import GpuPart, LeaseOutcome
from controlplane.core.placement.gangs import GangShape
from controlplane.core.reconcile.commands import ReplicaCommandKind
from controlplane.core.telemetry.node_updates import GpuInfoCache, NodeUpdate, node_update, whole_sample
from controlplane.core.telemetry.samples import (
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    GpuInfo,
    GpuSample,
    NodeSample,
    NvLink,
)

GIB = 1024**3
MIB = 1024**2
GPUS = 8
HEARTBEAT_TICKS = 2
SIZES = (1, 10, 100, 1000)
WIDTH = 13
LEASED_OF_8 = 6
"""The other two are room to move to."""
TIERS = 10
UNPACK_TICKS = 10
"""How often answers are packed and unpacked."""
LEVELS = 5
"""Different readings that each GPU goes through."""
TROUBLE_EVERY = 50
"""A GPU gets an XID every so many ticks, while others return."""


@dataclass
class Fleet:
    """Nodes whose samples change, and replicas that obey."""

    nodes: int
    now_s: float = 1000.0
    seq: int = 0
    born: int = 0
    infos: dict[str, tuple[GpuInfo, ...]] = field(default_factory=dict)
    readings: dict[str, list[tuple[GpuSample, ...]]] = field(default_factory=dict)
    replicas: dict[str, Endpoint] = field(default_factory=dict)
    known: dict[str, GpuInfoCache] = field(default_factory=dict)
    """The last figures of each node's GPUs that the controller has."""
    registry: Registry = field(init=False)
    controller: Controller = field(init=False)

    def __post_init__(self) -> None:
        self.registry = Registry(epoch="bench", heartbeat_s=2.0, now_s=self.clock, unix_s=self.clock)
        self.controller = Controller(
            self.registry,
            heartbeat_s=2.0,
            now_s=self.clock,
            unix_s=self.clock,
            rules=ControllerRules(),
            settle_s=0.0,
        )
        for i in range(self.nodes):
            uuids = [f"GPU-{i:05d}-{j}" for j in range(GPUS)]
            self.infos[f"node-{i:05d}"] = tuple(
                GpuInfo(
                    uuid,
                    j,
                    "NVIDIA H100 80GB HBM3",
                    slowdown_c=90,
                    shutdown_c=95,
                    numa_node=j // 4,
                    nvlinks=tuple(NvLink(True, peer, to_switch=False) for peer in uuids if peer != uuid),
                )
                for j, uuid in enumerate(uuids)
            )
        self.known = {node_id: GpuInfoCache("a", 1, infos) for node_id, infos in self.infos.items()}
        self.readings = {
            node_id: [tuple(reading(info, level) for info in infos) for level in range(LEVELS)]
            for node_id, infos in self.infos.items()
        }

    def clock(self) -> float:
        return self.now_s

    def samples(self) -> Iterator[NodeSample]:
        """A sample of every node, other than the one before."""
        self.seq += 1
        for i, node_id in enumerate(self.infos):
            level = (self.seq + i) % LEVELS
            yield NodeSample(
                node_id=node_id,
                epoch="a",
                seq=self.seq,
                unix_s=self.now_s,
                boot_id="boot",
                cpu_count=96,
                cpu_ratio=level / 40,
                memory_total_bytes=1024 * GIB,
                memory_available_bytes=512 * GIB + level,
                disk_free_bytes=1024 * GIB,
                driver_version="580.65",
                gpus=self.readings[node_id][level],
            )

    def answers(self) -> list[bytes]:
        """What the agents of all nodes send to a controller that they have answered before."""
        answers = []
        for sample in self.samples():
            infos = GpuInfoCache("a", 1, self.infos[sample.node_id])
            answers.append(pickle.dumps(node_update(sample, infos, (), infos.key), protocol=5))
        return answers

    def unpack(self, answers: Iterable[bytes]) -> list[NodeSample | None]:
        """The samples, as the controller has them of those answers."""
        found = []
        for answer in answers:
            update: NodeUpdate = pickle.loads(answer)
            assert update.sample is not None
            found.append(whole_sample(update, self.known[update.sample.node_id]))
        return found

    def trouble(self) -> dict[str, GpuEvent]:
        """Node → what its driver reports now."""
        if self.seq % TROUBLE_EVERY:
            return {}
        place = self.seq // TROUBLE_EVERY
        node_id = f"node-{place * 7 % self.nodes:05d}"
        uuid = self.infos[node_id][place % GPUS].uuid
        return {node_id: GpuEvent(node_id, "a", self.seq, self.now_s, GpuEventKind.XID, uuid, 79)}

    def fill(self) -> None:
        """Leases most GPUs, one to a replica."""
        wanted = LEASED_OF_8 * self.nodes
        share = max(1, wanted // TIERS)
        names = [f"tier-{i}" for i in range(TIERS)]
        specs = [TierSpec(name, "m", "simulated", share, 10) for name in names]
        self.controller.declare(specs, 2.0)
        for number in range(wanted):
            # claimed, as running holders do after a restart: leasing one by one takes a while
            node_id = f"node-{number % self.nodes:05d}"
            self.born += 1
            name = f"{names[number % TIERS]}-{self.born}"
            part = GpuPart(self.infos[node_id][number // self.nodes].uuid)
            self.controller.restore_lease(name, 1, node_id, (part,))
            self.join(name, names[number % TIERS], node_id, (part.gpu_uuid,))

    def start(self, tier: str, node_id: str) -> bool:
        """A new replica; False if there is no GPU for it on the node."""
        self.born += 1
        name = f"{tier}-{self.born}"
        answer = self.controller.lease_gpus(name, 1, node_id, GangShape(), tier)
        if answer.outcome is not LeaseOutcome.GRANTED or answer.lease is None:
            return False
        self.join(name, tier, node_id, answer.lease.gpu_uuids)
        return True

    def join(self, name: str, tier: str, node_id: str, uuids: tuple[str, ...]) -> None:
        """The replica serves."""
        self.replicas[name] = Endpoint(
            *(name, tier, "m", "simulated", "http://127.0.0.1:1", EndpointState.READY, 10),
            generation=1,
            node_id=node_id,
            gpu_uuids=uuids,
        )
        self.controller.register(self.replicas[name])

    def report(self) -> None:
        """Every replica reports; one that gets the command to retire leaves, and another one starts."""
        for name, endpoint in list(self.replicas.items()):
            answer = self.controller.report(endpoint)
            for order in answer.commands:
                if order.kind is ReplicaCommandKind.RETIRE:
                    self.replicas[name] = replace(endpoint, state=EndpointState.DRAINING)
                    self.controller.report(self.replicas[name])
                    del self.replicas[name]
                    self.controller.deregister(name, "drained")
        missing = LEASED_OF_8 * self.nodes - len(self.replicas)
        missing += sum(1 for migration in self.controller.activity().migrations if migration.surged)
        for number in range(min(missing, 5)):
            self.start(f"tier-{number % TIERS}", f"node-{(self.seq + number) % self.nodes:05d}")

    def return_some(self) -> None:
        """An operator lets GPUs return, or all would be gone after a while."""
        for uuid in list(self.controller.gpus_out_of_use())[
            : max(0, len(self.controller.gpus_out_of_use()) - 3)
        ]:
            self.controller.uncordon(uuid, "mended")


def reading(info: GpuInfo, level: int) -> GpuSample:
    """A healthy GPU under a load of ``level``."""
    return GpuSample(
        info,
        GpuCondition.OK,
        memory_total_bytes=80 * GIB,
        memory_used_bytes=(40 + level) * GIB,
        memory_free_bytes=(40 - level) * GIB,
        gpu_ratio=level / 20,
        temperature_c=50 + level,
        power_w=300.0 + level,
        sm_clock_mhz=1980,
        throttle=(),
        ecc_corrected=0,
        ecc_uncorrected=0,
    )


def percentile(values: list[float], ratio: float) -> float:
    """The value that ``ratio`` of the values are not above."""
    return sorted(values)[min(len(values) - 1, int(ratio * len(values)))]


def measure(nodes: int, ticks: int) -> dict[str, float]:
    """One row: ``ticks`` ticks of a fleet of ``nodes``."""
    gc.set_threshold(*GC_THRESHOLDS)
    fleet = Fleet(nodes)
    for sample in fleet.samples():
        fleet.controller.observe_node(sample.node_id, sample, [])
    fleet.fill()
    fleet.controller.observe_nodes(fleet.infos.keys())
    process = psutil.Process()
    spent_ms: list[float] = []
    decide_ms: list[float] = []
    cpu_ms: list[float] = []
    unpack_ms: list[float] = []
    rss_mb: list[float] = []
    moves = 0
    for tick in range(ticks + 20):
        fleet.now_s += 1.0
        if tick % HEARTBEAT_TICKS == 0:
            fleet.report()
        samples, trouble = list(fleet.samples()), fleet.trouble()
        alive = fleet.infos.keys()
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        for sample in samples:
            event = trouble.get(sample.node_id)
            fleet.controller.observe_node(sample.node_id, sample, [event] if event else [])
        seen_s = time.perf_counter()
        fleet.controller.observe_nodes(alive)
        done = fleet.controller.tick()
        if fleet.registry.take_events():
            fleet.controller.checkpoint()
        ended_s, ended_cpu_s = time.perf_counter(), time.thread_time()
        moves += sum(item.kind == "settling" for item in done)
        if tick >= 20:
            spent_ms.append((ended_s - began_s) * 1e3)
            decide_ms.append((ended_s - seen_s) * 1e3)
            cpu_ms.append((ended_cpu_s - began_cpu_s) * 1e3)
        if tick % UNPACK_TICKS == 0:
            answers = fleet.answers()
            began_cpu_s = time.thread_time()
            fleet.unpack(answers)
            unpack_ms.append((time.thread_time() - began_cpu_s) * 1e3)
        if tick % 20 == 0:
            rss_mb.append(process.memory_info().rss / MIB)
            fleet.return_some()
    tenth = max(1, len(rss_mb) // 10)
    return {
        "nodes": nodes,
        "gpus": nodes * GPUS,
        "ticks": ticks,
        "tick_ms_p50": round(percentile(spent_ms, 0.5), 2),
        "tick_ms_p99": round(percentile(spent_ms, 0.99), 2),
        "cpu_ms_p50": round(percentile(cpu_ms, 0.5), 2),
        "cpu_ms_p99": round(percentile(cpu_ms, 0.99), 2),
        "decide_ms_p50": round(percentile(decide_ms, 0.5), 2),
        "decide_ms_p99": round(percentile(decide_ms, 0.99), 2),
        "unpack_ms_p50": round(percentile(unpack_ms, 0.5), 2),
        "us_per_gpu": round(percentile(spent_ms, 0.5) * 1e3 / (nodes * GPUS), 2),
        "rss_mb": round(rss_mb[-1], 1),
        "rss_mb_growth": round(sum(rss_mb[-tenth:]) / tenth - sum(rss_mb[tenth : 2 * tenth]) / tenth, 1),
        "moves": moves,
    }


@click.command()
@click.option("--nodes", multiple=True, type=int, help="Sizes, of 8 GPUs a node; by default 1 to 1000.")
@click.option("--ticks", default=200, show_default=True, help="Ticks of each size.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(nodes: tuple[int, ...], ticks: int, as_json: bool) -> None:
    """One tick of the controller: taking in every node's sample, judging every GPU, deciding."""
    rows = []
    for size in nodes or SIZES:
        if not as_json:
            click.echo(f"{size} nodes, {ticks} ticks …", err=True)
        rows.append(measure(size, ticks))
    if as_json:
        click.echo(json.dumps({"rows": rows}))
        return
    names = list(rows[0])
    click.echo("  ".join(f"{name:>{WIDTH}}" for name in names))
    for row in rows:
        click.echo("  ".join(f"{row[name]:>{WIDTH}}" for name in names))


if __name__ == "__main__":
    command()
