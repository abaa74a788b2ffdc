"""A controller without Ray: nodes with GPUs, replicas that obey commands, and a clock that tests advance."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from controlplane.controller.controller import Controller, ControllerRules
from controlplane.controller.registry import Registry
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.leases import GpuLease, LeaseOutcome
from controlplane.core.gpus.views import GpuView
from controlplane.core.json_values import StoredState
from controlplane.core.placement.gangs import GangShape
from controlplane.core.reconcile.commands import ReplicaCommandKind
from controlplane.core.reconcile.migrations import Migration
from controlplane.core.reconcile.replica_targets import TierTarget, desired_replicas
from controlplane.core.telemetry.samples import Absence, GpuEvent, GpuEventKind, Missing, Reading
from controlplane.errors import NotSettled
from tests.support.samples import gpu_sample, node_sample

HEARTBEAT_S = 2.0


class Clock:
    def __init__(self, s: float = 1000.0) -> None:
        self.s = s

    def __call__(self) -> float:
        return self.s


def xid(node_id: str, uuid: str, code: int, seq: int = 1) -> GpuEvent:
    return GpuEvent(node_id, "a", seq, 0.0, GpuEventKind.XID, uuid, code)


@dataclass
class Replica:
    """A replica as Serve and the tier's deployment run it: it leases, reports and carries out commands."""

    endpoint: Endpoint
    shape: GangShape
    lease: GpuLease | None = None
    obeys: bool = True
    starts_in: int = 2
    """Reports until it is ready."""
    drains_in: int = 2


@dataclass
class World:
    """Ray, Serve and the nodes, as the controller sees them. One step is one second."""

    nodes: dict[str, list[str]]
    tiers: dict[str, int]
    shape: GangShape = field(default_factory=GangShape)
    clock: Clock = field(default_factory=Clock)
    replicas: dict[str, Replica] = field(default_factory=dict)
    samples: dict[str, dict[str, dict[str, object]]] = field(default_factory=dict)
    """Node → GPU → its unusual readings."""
    silent: set[str] = field(default_factory=set)
    """Nodes whose agent sends nothing."""
    events: list[GpuEvent] = field(default_factory=list)
    retry_s: dict[str, float] = field(default_factory=dict)
    """Tier → when Serve tries again to start a replica that got no GPU."""
    scaled: set[str] = field(default_factory=set)
    """Tiers that scale: without a target Serve leaves them as they are."""
    targets: dict[str, TierTarget] = field(default_factory=dict)
    """What Serve has fetched last."""
    serve_counts: dict[str, int] = field(default_factory=dict)
    """Tier → the number of replicas that Serve runs."""
    shift_s: float = 0.0
    """Wall clock less monotonic clock, for the next controller that is started."""
    started: int = 0
    seq: int = 0
    registry: Registry = field(init=False)
    controller: Controller = field(init=False)

    def __post_init__(self) -> None:
        self.start_controller()

    def start_controller(self, epoch: str = "e1", settle_s: float = 0.0, *, declared: bool = True) -> None:
        rules = ControllerRules(
            gpus=GpuRules(hold_initial_s=30.0, hot_for_s=5.0, probation_s=5.0, suspect_for_s=10.0)
        )
        self.registry = Registry(epoch=epoch, heartbeat_s=HEARTBEAT_S, now_s=self.clock, unix_s=self.unix_s)
        self.controller = Controller(
            self.registry,
            heartbeat_s=HEARTBEAT_S,
            now_s=self.clock,
            unix_s=self.unix_s,
            rules=rules,
            settle_s=settle_s,
        )
        if declared:
            self.declare()

    def restart_controller(self, *, same_cluster: bool, declared: bool = True) -> dict[str, Any]:
        """The controller's process dies, and the next one restores what was stored: all of it if
        ``same_cluster``, else only the health of GPUs. Returns what was stored."""
        values = self.controller.checkpoint()
        stored = StoredState(values)
        self.start_controller("e2", settle_s=6.0, declared=declared)
        self.controller.restore_gpus(stored)
        if same_cluster:
            self.controller.restore(stored)
        return values

    def unix_s(self) -> float:
        """The wall clock."""
        return self.clock.s + self.shift_s

    def declare(self) -> None:
        """Declare the tiers, as a gateway does."""
        specs = [TierSpec(tier, "m", "simulated", count, 10) for tier, count in self.tiers.items()]
        self.controller.declare(specs, HEARTBEAT_S)

    # --- what the rest of the plane does ---------------------------------------------------------------

    def observe(self) -> None:
        """Every agent sends a sample."""
        self.seq += 1
        for node_id, uuids in self.nodes.items():
            if node_id in self.silent:
                continue
            changed = self.samples.get(node_id, {})
            gpus = [gpu_sample(uuid, i, **changed.get(uuid, {})) for i, uuid in enumerate(uuids)]
            driver: Reading[str] = "580" if uuids else Missing(Absence.NO_DRIVER, "there is no driver")
            events = [event for event in self.events if event.node_id == node_id]
            sample = node_sample(node_id, self.seq, self.clock.s, gpus, driver)
            self.controller.observe_node(node_id, sample, events)
        self.events.clear()
        self.controller.observe_nodes(self.nodes.keys())

    def serve(self) -> None:
        """Serve's part: as many replicas as the last targets say, on nodes with free GPUs."""
        with suppress(NotSettled):
            self.targets = self.controller.targets()
        for tier, configured in self.tiers.items():
            mine = [name for name, replica in self.replicas.items() if replica.endpoint.tier == tier]
            present = self.serve_counts.setdefault(tier, configured) if tier in self.scaled else None
            target = self.targets.get(tier)
            wanted = desired_replicas(
                target, self.unix_s(), configured=configured, running=mine, present=present
            ).replicas
            self.serve_counts[tier] = wanted
            if wanted > len(mine) and self.clock.s >= self.retry_s.get(tier, 0.0):
                started = [self.start(tier) for _ in range(wanted - len(mine))]
                if None in started:
                    self.retry_s[tier] = self.clock.s + 5.0
            if len(mine) > wanted:
                starting = [
                    name for name in mine if self.replicas[name].endpoint.state is not EndpointState.READY
                ]
                for name in [*starting, *mine][: len(mine) - wanted]:
                    self.end(name)

    def start(self, tier: str) -> Replica | None:
        """Start a replica on the first node where the controller leases it GPUs; None if there is none."""
        self.started += 1
        name = f"{tier}-{self.started}"
        for node_id in self.nodes:
            response = self.controller.lease_gpus(name, 1, node_id, self.shape, tier)
            if response.outcome is LeaseOutcome.GRANTED:
                assert response.lease is not None
                endpoint = Endpoint(
                    endpoint_id=name,
                    tier=tier,
                    model="m",
                    engine="simulated",
                    base_url="http://127.0.0.1:1",
                    state=EndpointState.STARTING,
                    concurrency_limit=10,
                    generation=1,
                    node_id=node_id,
                    gpu_uuids=response.lease.gpu_uuids,
                )
                replica = self.replicas[name] = Replica(endpoint, self.shape, response.lease)
                return replica
        return None

    def end(self, name: str) -> None:
        del self.replicas[name]
        self.controller.deregister(name, "ended")

    def report(self) -> None:
        """Every replica advances its life cycle, reports, and carries out its commands."""
        for name, replica in list(self.replicas.items()):
            if replica.endpoint.node_id not in self.nodes:
                del self.replicas[name]
                continue
            self._live(replica)
            response = self.controller.report(replica.endpoint)
            if not response.known:
                self.controller.register(replica.endpoint)
            lease = replica.lease
            if lease is not None and not (response.known and response.lease_known):
                self.controller.restore_lease(lease.holder, lease.generation, lease.node_id, lease.parts)
            for command in response.commands if replica.obeys else ():
                self._obey(replica, command.kind, command.generation)
            if replica.endpoint.state is EndpointState.DRAINING:
                replica.drains_in -= 1
                if replica.drains_in < 0:
                    self.end(name)

    def _live(self, replica: Replica) -> None:
        if replica.endpoint.state in (EndpointState.STARTING, EndpointState.RESTARTING):
            replica.starts_in -= 1
            if replica.starts_in < 0:
                replica.endpoint = replace(replica.endpoint, state=EndpointState.READY)

    def _obey(self, replica: Replica, kind: ReplicaCommandKind, generation: int) -> None:
        endpoint = replica.endpoint
        if kind is ReplicaCommandKind.RETIRE:
            replica.endpoint = replace(endpoint, state=EndpointState.DRAINING)
        elif endpoint.generation <= generation:
            replica.starts_in = 2
            replica.endpoint = replace(
                endpoint, state=EndpointState.RESTARTING, generation=endpoint.generation + 1
            )

    def step(self, count: int = 1) -> None:
        """Let seconds pass."""
        for _ in range(count):
            self.clock.s += 1.0
            self.observe()
            self.report()
            self.controller.tick()
            self.serve()

    def settle(self) -> None:
        """Wait until all replicas run and the controller knows them."""
        self.step(12)
        assert not self.registry.warming

    # --- what tests check ------------------------------------------------------------------------------

    def ready(self, tier: str) -> int:
        return sum(item.state is EndpointState.READY for item in self.controller.endpoints_of(tier))

    def holder_of(self, uuid: str) -> tuple[str, ...]:
        leases = self.controller.leases.values()
        return tuple(lease.holder for lease in leases if uuid in lease.gpu_uuids)

    def gpu(self, uuid: str) -> GpuView:
        [view] = [view for view in self.controller.gpus() if view.uuid == uuid]
        return view

    @property
    def migrations(self) -> dict[str, Migration]:
        """By endpoint id."""
        return {item.endpoint_id: item for item in self.controller.activity().migrations}

    def kinds(self, subject: str = "") -> list[str]:
        return [event.kind for event in self.registry.events if not subject or event.subject == subject]
