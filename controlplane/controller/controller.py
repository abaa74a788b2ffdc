"""The controller's state and decisions: the registry, the GPUs and their leases, and what is in progress.

Plain Python with two clocks. :mod:`controlplane.controller.actor` feeds it with reports and samples, calls
:meth:`Controller.tick`, and carries out what needs Ray. Nothing outside this class changes its state; other
modules read and act through its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from controlplane.controller.operator_actions import OperatorActions
from controlplane.controller.registry import MISSED_REPORTS, WARMING_REPORTS, Registry
from controlplane.controller.state import checkpoint
from controlplane.controller.state.assumed_gpus import AssumedGpus
from controlplane.controller.state.engine_readings import EngineReadings
from controlplane.controller.state.first_starts import FirstStarts, tier_notes
from controlplane.controller.state.migration_room import MigrationRoom
from controlplane.controller.state.out_of_use import out_of_use_now, usable_gpus
from controlplane.controller.state.target_table import TargetTable
from controlplane.core.alerts.signals import AlertSignals, LostNode, gpu_signals, node_signals
from controlplane.core.alerts.views import FiringAlert
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import SERVING, Endpoint, EndpointState
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.lease_allocator import LeaseAllocator
from controlplane.core.gpus.leases import GpuPart, LeaseOutcome, LeaseResponse
from controlplane.core.gpus.node_views import NodeView, node_views
from controlplane.core.gpus.views import GpuView, gpu_views
from controlplane.core.json_values import StoredState
from controlplane.core.placement.gangs import GangShape
from controlplane.core.reconcile.commands import ReportResponse, StartPermission
from controlplane.core.reconcile.in_progress import AppliedCommand, InProgress
from controlplane.core.reconcile.migrations import Activity, MigrationPhase
from controlplane.core.reconcile.reconcile import (
    BeginMigration,
    ClusterState,
    ReconcileRules,
    SetGpu,
    reconcile,
)
from controlplane.core.reconcile.replica_targets import TierTarget, tier_target
from controlplane.core.reports.sampler import SampledCluster
from controlplane.core.telemetry.gpu import GpuSignals
from controlplane.core.telemetry.samples import EngineSample, GpuEvent, GpuEventKind, NodeSample
from controlplane.core.telemetry.series import Signal, signal_of
from controlplane.core.telemetry.stalled_engine import StallRules
from controlplane.core.traffic.counters import TierFigures
from controlplane.core.traffic.demand import TierDemandTracker
from controlplane.errors import IllegalTransition, NotSettled

GC_THRESHOLDS: Final = (50_000, 20, 1000)
"""For :func:`gc.set_threshold` in the controller's process: it has next to no reference cycles, and a full
collection over the objects of a large fleet takes longer than a tick."""
TARGET_TTL_S: Final = 30.0
TARGET_TTL_REPORTS: Final = 10
"""A fetched target stays valid this long, or for this many report intervals if that is longer: the time in
which a killed controller restarts and receives every report."""
MAX_LOST_NODES: Final = 100
START_AGAIN_S: Final = 5.0
"""How long a replica of a held tier waits before it asks again whether it may start."""


@dataclass(frozen=True, slots=True)
class ControllerRules:
    """All rules of the control loop."""

    gpus: GpuRules = field(default_factory=GpuRules)
    reconcile: ReconcileRules = field(default_factory=ReconcileRules)
    stalls: StallRules = field(default_factory=StallRules)


class Controller:
    """Not safe for use by several threads; one event loop owns it.

    ``now_s`` is the monotonic clock, ``unix_s`` the wall clock. For ``settle_s`` after the start no lease is
    granted and nothing is decided, so that every holder can report first.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        heartbeat_s: float,
        now_s: Callable[[], float],
        unix_s: Callable[[], float],
        rules: ControllerRules | None = None,
        settle_s: float | None = None,
    ) -> None:
        self.now_s = now_s
        self.unix_s = unix_s
        self.shift_s: Final = unix_s() - now_s()
        """Wall clock less monotonic clock, taken once: stored times must not jump with the wall clock."""
        self.stopped = False
        """Whether the last gateway has deregistered: the plane was stopped on purpose."""
        self._heartbeat_s = heartbeat_s
        self._rules = rules or ControllerRules()
        self._registry = registry
        self._inventory = GpuInventory(self._rules.gpus)
        self._allocator = LeaseAllocator(self._inventory)
        self._leases = self._allocator.table
        self._in_progress = InProgress()
        self._engines = EngineReadings(self._rules.stalls)
        self._traffic = TierDemandTracker()
        self._targets = TargetTable(now_s, unix_s)
        self._room = MigrationRoom(self._inventory, self._leases)
        self._assumed_gpus = AssumedGpus()
        self._operator = OperatorActions(
            registry, self._inventory, self._leases, self._in_progress, now_s=now_s
        )
        self._checkpoint = checkpoint.CheckpointWriter(self.shift_s)
        self._settled_s = now_s() + (WARMING_REPORTS * heartbeat_s if settle_s is None else settle_s)
        self._ticked_s = now_s()
        self._shapes: dict[str, GangShape] = {}
        """Lease holder → the shape that it requested."""
        self._alive_nodes: set[str] = set()
        self._lost_nodes: dict[str, LostNode] = {}
        self._first_starts = FirstStarts()
        self._failed: dict[str, int] = {}
        """Endpoint id → the generation in which its replica gave up."""

        self.endpoints: Final = registry.endpoints
        """By id, with their secrets."""
        self.gateways: Final = registry.gateways
        """The last report of each gateway, by its id."""
        self.note: Final = registry.note
        self.publish_scaling: Final = registry.publish_scaling
        self.leases: Final = self._leases.leases
        """By holder, which is an endpoint id."""
        self.tier_holds: Final = MappingProxyType(self._in_progress.holds)
        """By name: the tiers in which no replica may start now."""
        self.lost_nodes: Final = MappingProxyType(self._lost_nodes)
        """The last nodes that were lost with replicas on them."""
        self.engine_telemetry: Final = self._engines.telemetry
        """By endpoint id: the engines whose metrics were read at least once."""
        self.traffic_counters: Final = self._traffic.ledger.reading
        self.published: Final = self._targets.published
        """The last published target of each tier."""
        self.publish: Final = self._targets.publish
        self.unpublish: Final = self._targets.unpublish
        self.cordon: Final = self._operator.cordon
        self.uncordon: Final = self._operator.uncordon
        self.drain: Final = self._operator.drain
        self.restart: Final = self._operator.restart

    @property
    def settled(self) -> bool:
        """Whether every lease holder has had the time to report its lease."""
        return self.now_s() >= self._settled_s

    @property
    def may_decide(self) -> bool:
        """Whether every process has had the time to report, and the configuration is known. Nothing is
        decided before that: without the configuration every tier would appear to need no replica, and a
        migrating replica would end before its replacement serves."""
        return self.settled and not self._registry.warming and self._registry.declared

    # --- the registry -------------------------------------------------------------------------------------

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """The configured tiers."""
        return self._registry.tiers

    def endpoints_of(self, tier: str) -> list[Endpoint]:
        """The tier's endpoints in any state."""
        return [endpoint for endpoint in self.endpoints.values() if endpoint.tier == tier]

    def publish_alerts(self, alerts: tuple[FiringAlert, ...]) -> None:
        """Set what snapshots say about firing alerts, and about the replicas that tiers should have."""
        self._registry.publish_alerts(alerts, tuple(sorted(self.due_replicas().items())))

    # --- reports and samples ------------------------------------------------------------------------------

    def declare(self, tiers: Sequence[TierSpec], heartbeat_s: float) -> None:
        """See :meth:`Registry.declare`."""
        self._heartbeat_s = heartbeat_s
        self._registry.declare(self._assumed_gpus.applied(tiers), heartbeat_s)

    def register(self, endpoint: Endpoint) -> None:
        """See :meth:`Registry.register`."""
        self._registry.register(endpoint)
        self._reported(endpoint)

    def report(self, endpoint: Endpoint) -> ReportResponse:
        """See :meth:`Registry.report`; the response carries the replica's commands."""
        if not self._registry.report(endpoint):
            return ReportResponse(False, lease_known=endpoint.endpoint_id in self._leases.leases)
        has_lease = self._reported(endpoint)
        commands = self._in_progress.commands_for(endpoint)
        return ReportResponse(True, commands, has_lease or not endpoint.gpu_uuids)

    def deregister(self, endpoint_id: str, reason: str) -> None:
        """See :meth:`Registry.deregister`; the endpoint's lease ends too."""
        self._registry.deregister(endpoint_id, reason)
        self.release_lease(endpoint_id)

    def gateway_report(self, info: GatewayInfo) -> bool:
        """See :meth:`Registry.gateway_report`. Traffic counters and logged requests
        stay here: no snapshot carries them."""
        self._traffic.observe(info.gateway_id, info.traffic, self.now_s())
        self.stopped = False
        return self._registry.gateway_report(replace(info, traffic=(), ended=None))

    def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """See :meth:`Registry.gateway_gone`."""
        self._traffic.ledger.forget(gateway_id)
        self._registry.gateway_gone(gateway_id, reason)
        self.stopped = not self.gateways

    def observe_node(self, node_id: str, sample: NodeSample | None, events: Sequence[GpuEvent]) -> None:
        """Process an update from a node's agent."""
        for event in events:
            if event.kind in (GpuEventKind.XID, GpuEventKind.UNCORRECTED_ECC, GpuEventKind.LOST) or (
                not event.gpu_uuid
            ):
                detail = f"XID {event.code}" if event.kind is GpuEventKind.XID else event.detail
                self.note(event.kind.value, event.gpu_uuid or node_id, detail or event.kind.value)
        for assessed in self._inventory.observe(node_id, sample, events, now_s=self.now_s()):
            decision = assessed.decision
            self.note(f"GPU {decision.after}", decision.uuid, f"{decision.rule}: {decision.reason}")

    def observe_nodes(self, alive: Collection[str]) -> None:
        """Process Ray's list of nodes. A node that was in it before and no longer is counts as lost; a node
        that was never in it may just have joined."""
        lost = self._alive_nodes - set(alive)
        self._alive_nodes = set(alive)
        for node_id in sorted(lost):
            self._remember_lost(node_id)
            self._inventory.remove_node(node_id)
            self.note("node lost", node_id, "Ray no longer has it")
            for endpoint in list(self.endpoints.values()):
                if endpoint.node_id == node_id:
                    self._registry.drop(endpoint.endpoint_id, "lost", f"its node {node_id} is lost")
            for holder, lease in list(self._leases.leases.items()):
                if lease.node_id == node_id:
                    self.release_lease(holder)

    def observe_processes(self, living: Collection[str]) -> None:
        """See :meth:`Registry.observe_processes`. Leases of replicas whose process has ended are released."""
        before = set(self.endpoints)
        self._registry.observe_processes(living)
        for endpoint_id in before - self.endpoints.keys():
            self.release_lease(endpoint_id)

    def observe_engine(self, sample: EngineSample) -> None:
        """Process an engine's metrics."""
        self._engines.observe(sample, self.now_s())

    def _reported(self, endpoint: Endpoint) -> bool:
        """Record that an endpoint has reported; returns whether it has a lease."""
        name, generation = endpoint.endpoint_id, endpoint.generation
        # Generation 0 means that no engine was started because it got no GPU, which is not a crash.
        if endpoint.state is EndpointState.FAILED and generation and self._failed.get(name) != generation:
            self._failed[name] = generation
            self._in_progress.record_failure(endpoint, self.now_s())
        return self._allocator.renew(name, self.now_s())

    def _remember_lost(self, node_id: str) -> None:
        """Remember a lost node, unless it had no replica or was cordoned or drained."""
        tiers = {endpoint.tier for endpoint in self.endpoints.values() if endpoint.node_id == node_id}
        if tiers and node_id not in self._inventory.holds:
            self._lost_nodes[node_id] = LostNode(self.now_s(), tuple(sorted(tiers)))
            while len(self._lost_nodes) > MAX_LOST_NODES:
                del self._lost_nodes[next(iter(self._lost_nodes))]

    # --- leases -------------------------------------------------------------------------------------------

    def lease_gpus(
        self, holder: str, generation: int, node_id: str, shape: GangShape, tier: str
    ) -> LeaseResponse:
        """Lease GPUs to a replica that Ray has put on a node; see :meth:`LeaseAllocator.acquire`."""
        wait = "" if self.settled else "the controller has just started: holders report their leases first"
        start = self.may_start(tier)
        if not start.allowed:
            return LeaseResponse(LeaseOutcome.WAIT, start.reason, retry_after_s=start.retry_after_s)
        response = self._allocator.acquire(holder, generation, node_id, shape, now_s=self.now_s(), wait=wait)
        if response.outcome is LeaseOutcome.GRANTED and response.lease is not None:
            self._shapes[holder] = shape
            gpus = ", ".join(response.lease.gpu_uuids)
            self.note("leased", holder, f"{gpus}: {response.reason}", tier)
        return response

    def restore_lease(
        self, holder: str, generation: int, node_id: str, parts: Iterable[GpuPart]
    ) -> LeaseResponse:
        """Record the lease that a running replica holds. If it conflicts with another lease, it is refused,
        and the replica has to leave."""
        response = self._allocator.restore(holder, generation, node_id, parts, self.now_s())
        if response.outcome is LeaseOutcome.REFUSED:
            self.note("lease refused", holder, response.reason)
            if self._in_progress.request_drain(holder, f"another replica holds its GPUs: {response.reason}"):
                self.note("drain", holder, "two replicas can't use one GPU")
        return response

    def release_lease(self, holder: str, generation: int | None = None) -> LeaseResponse:
        """See :meth:`LeaseTable.release`."""
        response = self._leases.release(holder, generation=generation)
        if response.outcome is LeaseOutcome.GRANTED:
            self._shapes.pop(holder, None)
            self.note("lease ended", holder, response.reason)
        return response

    def may_start(self, tier: str) -> StartPermission:
        """Whether an engine of the tier may be started now."""
        hold = self.tier_holds.get(tier)
        if hold is None:
            return StartPermission(True, "the tier is not held")
        return StartPermission(False, f"tier {tier} is held: {hold.reason}", START_AGAIN_S)

    # --- targets ------------------------------------------------------------------------------------------

    def configure_scaling(self, *, apply: bool, window_s: float) -> None:
        """Whether tiers follow scaling's targets, and how far back its traffic figures go."""
        self._targets.apply_scaling = apply
        self._traffic.set_window(window_s)

    def base_targets(self) -> dict[str, int]:
        """Tier → replicas when nothing migrates; see :meth:`TargetTable.base`."""
        return {spec.name: self._targets.base(spec, self.endpoints, self._in_progress) for spec in self.tiers}

    def due_replicas(self) -> dict[str, int]:
        """Tier → replicas that should run: as in :meth:`base_targets`, but 0 for a tier that is drained or
        starts for the first time."""
        drained = {tier for tier, hold in self.tier_holds.items() if hold.must_leave}
        none_due = drained | self._first_starts.starting(self.tiers, self.endpoints, self.now_s()).keys()
        return {tier: 0 if tier in none_due else count for tier, count in self.base_targets().items()}

    def _publish_notes(self, now_s: float) -> None:
        """Publish which tiers are drained, held, starting for the first time, or scaled to zero."""
        targets = self.base_targets()
        self._first_starts.observe(targets, self.endpoints, now_s)
        starting = self._first_starts.starting(self.tiers, self.endpoints, now_s)
        self._registry.publish_notes(
            tier_notes(
                self.tiers, targets, self.tier_holds, starting, self._first_starts.at_zero, self.shift_s
            )
        )

    def targets(self) -> dict[str, TierTarget]:
        """Tier → the target for Serve, which is the caller. Raises NotSettled while the controller may not
        know everything; the previous targets stay valid then."""
        if not self.may_decide:
            raise NotSettled("the controller has just started and may not know every replica and migration")
        self._targets.fetched()
        serving: dict[str, int] = {}
        for endpoint in self.endpoints.values():
            serving[endpoint.tier] = serving.get(endpoint.tier, 0) + (endpoint.state in SERVING)
        valid_s = max(TARGET_TTL_S, TARGET_TTL_REPORTS * self._heartbeat_s)
        return {
            tier: tier_target(
                tier,
                base,
                self._in_progress.migrations.values(),
                self.tier_holds.get(tier),
                serving=serving.get(tier, 0),
                valid_until_unix_s=self.unix_s() + valid_s,
            )
            for tier, base in self.base_targets().items()
        }

    # --- queries ------------------------------------------------------------------------------------------

    def forget_lost_node(self, node_id: str) -> None:
        """Drop a lost node from :attr:`lost_nodes`: everything that ran on it was replaced."""
        self._lost_nodes.pop(node_id, None)

    def activity(self) -> Activity:
        """Everything in progress."""
        return Activity(
            migrations=tuple(self._in_progress.migrations.values()),
            restarts=tuple(self._in_progress.restarts.values()),
            holds=tuple(self._in_progress.holds.items()),
            drains=tuple(self._in_progress.drains.items()),
            settled=self.may_decide,
            store_warning="",
            tick_s=0.0,
        )

    def gpus(self) -> tuple[GpuView, ...]:
        """Every GPU."""
        return gpu_views(self._inventory, self._leases, now_s=self.now_s(), unix_s=self.unix_s())

    def nodes(self) -> tuple[NodeView, ...]:
        """Every node whose agent has reported."""
        return node_views(self._inventory, now_s=self.now_s())

    def gpus_out_of_use(self) -> dict[str, str]:
        """UUID → node id of every GPU on which nothing may be started."""
        return self._inventory.out_of_use()

    def usable_gpus(self) -> float | None:
        """The GPUs that tiers may hold together: those in use, plus what is leased on others and may stay.
        None if no GPU was ever reported."""
        return usable_gpus(self._inventory, self._leases)

    def gpu_signals(self, uuid: str) -> GpuSignals | None:
        """A GPU's readings now; None for one that no agent has reported."""
        known = uuid in self._inventory.records
        return self._inventory.signals(uuid, self.now_s()) if known else None

    def alert_signals(self, missing: Mapping[str, int]) -> tuple[AlertSignals, AlertSignals]:
        """The values that alert rules about GPUs and about nodes compare; ``missing`` are the replicas that
        each tier lacks."""
        now_s = self.now_s()
        nodes = node_signals(self._inventory, self._lost_nodes, missing, now_s)
        return gpu_signals(self._inventory, now_s), nodes

    def sampled_cluster(self) -> SampledCluster:
        """The state that samples for reports are taken from."""
        return SampledCluster(
            endpoints=self.endpoints,
            desired=self.base_targets(),
            leases=self._leases,
            fleet=self._inventory,
            engines=self._engines.telemetry,
            demand=self._traffic,
            heartbeat_s=self._heartbeat_s,
        )

    # --- traffic ------------------------------------------------------------------------------------------

    def record_traffic(self, tiers: Collection[str]) -> None:
        """Take a reading of every tier's traffic for :meth:`traffic_figures`. Counters of other tiers, and of
        endpoints that are gone, are dropped."""
        self._traffic.sample(tiers, self.endpoints, self.now_s())

    def traffic_figures(self, span_s: float) -> dict[str, TierFigures]:
        """Every tier's traffic over the last ``span_s``, as of the last reading."""
        return self._traffic.figures(self.now_s(), self._heartbeat_s, span_s)

    def traffic_samples(self, span_s: float) -> dict[str, Signal]:
        """How many requests of each tier the ratios over the last ``span_s`` are made of; 0 if they did not
        come in several minutes."""
        return self._traffic.samples(self.now_s(), self._heartbeat_s, span_s)

    def traffic_signal(self, value: float) -> Signal:
        """A value from the counters with its freshness, which is that of the gateways' reports."""
        reported_s = self._traffic.ledger.oldest_report_s()
        why = "" if reported_s is not None else "no gateway has reported"
        limits = self._traffic.limits(self._heartbeat_s)
        return signal_of(value, reported_s, self.now_s(), limits, why)

    def requested(self, info: GatewayInfo) -> set[str]:
        """Names in a gateway's report that have requests waiting or running, or received requests since the
        gateway's previous report. Call this before :meth:`gateway_report`."""
        return {
            item.subject
            for item in info.traffic
            if item.waiting
            or item.in_flight
            or item.arrived > self._traffic.ledger.last_report(info.gateway_id, item.subject).arrived
        }

    # --- the tick -----------------------------------------------------------------------------------------

    def tick(self) -> tuple[AppliedCommand, ...]:
        """Expire what no longer reports, decide, and carry the commands out; returns those carried out."""
        now_s = self.now_s()
        self._expire(now_s)
        if not self.may_decide:
            return ()
        self._drop_replaced()
        self._update_assumed_gpus(now_s)
        self._in_progress.prune(self.endpoints, now_s, self._rules.reconcile.hold_max_s)
        self._engines.keep_only(self.endpoints)
        self._room.keep_only(self.endpoints)
        self._failed = {name: made for name, made in self._failed.items() if name in self.endpoints}
        done = []
        for command in reconcile(self._cluster_state(now_s), self._rules.reconcile):
            if (
                isinstance(command, BeginMigration)
                and command.phase is MigrationPhase.STARTING_ELSEWHERE
                and not self._room.still_there(command.endpoint_id)
            ):
                continue
            applied = self._apply_gpu(command, now_s) if isinstance(command, SetGpu) else None
            applied = applied or self._in_progress.apply(command, self.endpoints, now_s)
            if applied is not None:
                self.note(applied.kind, applied.subject, applied.reason, applied.tier)
                done.append(applied)
        self._publish_notes(now_s)
        return tuple(done)

    def _drop_replaced(self) -> None:
        """Drop failed endpoints whose replicas have ended, of tiers that have all their replicas again."""
        due = self.base_targets()
        for tier in {item.tier for item in self.endpoints.values() if item.state is EndpointState.FAILED}:
            serving = sum(item.state in SERVING for item in self.endpoints_of(tier))
            if serving and serving >= due.get(tier, 0):
                self._registry.drop_replaced(tier)

    def _expire(self, now_s: float) -> None:
        """Drop endpoints and gateways that no longer report, and their leases and traffic counters."""
        if now_s - self._ticked_s > 2 * self._heartbeat_s:
            # The controller was not running, so no report could arrive: that must not end a lease.
            for holder in self.leases:
                self._allocator.renew(holder, now_s)
        self._ticked_s = now_s
        self._registry.expire()
        self._traffic.ledger.retain_gateways(self.gateways.keys())
        for lease in self._leases.reap(now_s=now_s, ttl_s=MISSED_REPORTS * self._heartbeat_s):
            self._shapes.pop(lease.holder, None)
            self.note("lease ended", lease.holder, "its holder no longer reports")

    def _update_assumed_gpus(self, now_s: float) -> None:
        """Start the scaling of each tier from the speed of the GPUs that the cluster has."""
        changed = self._assumed_gpus.update(self.tiers, self.endpoints.values(), self._inventory, now_s)
        for tier, gpu in changed.items():
            if gpu:
                text = f"until its engines were measured, it is assumed to be as fast as a {gpu} allows"
                self.note("speed assumed", tier, text, tier)
        if changed:
            self.declare(self.tiers, self._heartbeat_s)

    def _cluster_state(self, now_s: float) -> ClusterState:
        endpoints, in_progress = self.endpoints, self._in_progress
        out_of_use, unusable = out_of_use_now(self._inventory, self._leases, endpoints)
        leaving = in_progress.leaving(endpoints, unusable, self._drained_tiers())
        return ClusterState(
            now_s,
            endpoints=endpoints,
            base_targets=self.base_targets(),
            leaving=leaving,
            room=self._room.find(
                leaving.keys() - in_progress.migrations.keys(), endpoints, self._shapes, now_s
            ),
            gpus=out_of_use,
            migrations=dict(in_progress.migrations),
            restarts=dict(in_progress.restarts),
            holds=dict(in_progress.holds),
            stalled=self._engines.stalled(endpoints, now_s),
            stall_restarts=dict(in_progress.stall_restarts),
            failures=dict(in_progress.failures),
            hold_counts={tier: count for tier, (count, _) in in_progress.hold_history.items()},
        )

    def _drained_tiers(self) -> dict[str, str]:
        """Tier → why all its replicas leave. Serve has to act on the new target first: it would replace a
        replica that ends before that, even if Serve itself was killed and restarted."""
        return {
            tier: hold.reason
            for tier, hold in self.tier_holds.items()
            if hold.must_leave and self._targets.serve_follows(hold.since_s)
        }

    def _apply_gpu(self, command: SetGpu, now_s: float) -> AppliedCommand | None:
        try:
            changed = self._inventory.advance(command.uuid, command.state, now_s=now_s)
        except (IllegalTransition, KeyError):
            return None
        return AppliedCommand(f"GPU {command.state}", command.uuid, command.reason) if changed else None

    # --- over a restart -----------------------------------------------------------------------------------

    def checkpoint(self) -> dict[str, Any]:
        """What has to survive this process, as JSON values by key."""
        values = self._checkpoint.values(self._inventory, self._leases, self._in_progress)
        return values | self._first_starts.checkpoint()

    def restore_gpus(self, stored: StoredState) -> None:
        """Restore the health of GPUs from a checkpoint; it is valid on any cluster that has these GPUs."""
        checkpoint.restore_gpus(stored, self._inventory, self.shift_s)

    def restore(self, stored: StoredState) -> None:
        """Restore leases, cordons and what is in progress from a checkpoint of the plane that still runs.
        After that, leases are granted without waiting for every holder to report first."""
        self.restore_orders(stored)
        self._settled_s = self.now_s()
        self.note("remembers", "controller", "leases, cordons and migrations from before the restart")

    def restore_orders(self, stored: StoredState) -> None:
        """Restore the same from a checkpoint that has only what operators ordered, while the plane runs."""
        self._first_starts.restore(stored)
        checkpoint.restore_plane(
            stored, self._inventory, self._leases, self._in_progress, now_s=self.now_s(), shift_s=self.shift_s
        )
