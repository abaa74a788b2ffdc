"""The controller's whole mind: the registry, the GPUs, who holds them, what operators asked for, what is
under way.

It is plain Python with two clocks: :mod:`controlplane.controller.actor` feeds it with reports and
samples, calls :meth:`Controller.tick`, and carries out what needs Ray. What has to survive a restart goes in
and out by :mod:`controlplane.controller.checkpoint`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from controlplane.config.gpu_models import table_name
from controlplane.controller.registry import MISSED_REPORTS, WARMING_REPORTS, Registry
from controlplane.core.alerts.signals import LostNode
from controlplane.core.cluster.assumed_gpu import assumed_gpu, assuming_gpu
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint, EndpointState
from controlplane.core.gpus.allocation import find_room, shape_of, still_room
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.lease_allocator import LeaseAllocator
from controlplane.core.gpus.leases import GpuPart, LeaseOutcome, LeaseResponse
from controlplane.core.gpus.views import GpuView, gpu_views
from controlplane.core.placement.gangs import GangShape, Placement
from controlplane.core.reconcile.commands import ReportResponse, StartPermission
from controlplane.core.reconcile.in_progress import AppliedCommand, InProgress
from controlplane.core.reconcile.migrations import Activity, MigrationPhase
from controlplane.core.reconcile.reconcile import (
    BeginMigration,
    ClusterState,
    GpuOutOfUse,
    ReconcileRules,
    SetGpu,
    reconcile,
)
from controlplane.core.reconcile.replica_targets import TierTarget, tier_target
from controlplane.core.telemetry.engine import EngineTelemetry
from controlplane.core.telemetry.samples import EngineSample, GpuEvent, GpuEventKind, Missing, NodeSample
from controlplane.core.telemetry.series import FreshnessLimits
from controlplane.core.telemetry.stalled_engine import StalledEngine, StallRules, stall_reason
from controlplane.core.traffic.demand import TierDemandTracker
from controlplane.errors import IllegalTransition, TierplaneError

GC_THRESHOLDS = (50_000, 20, 1000)
"""For :func:`gc.set_threshold` in the controller's process: next to nothing here refers to itself, and a look
through all objects of a large fleet takes longer than a tick."""
TARGET_TTL_S = 30.0
TARGET_TTL_REPORTS = 10
"""A target holds for so long, or for so many intervals between reports, after the controller was last asked:
a controller that was killed must have the time to come back and hear everybody."""
TARGETS_SEEN_S = 5.0
"""Serve that has not asked for targets for so long is away: drained replicas hear it from us alone."""
ROOM_AGAIN_S = 15.0
"""Whether there is room elsewhere is looked at anew after so long."""
ENGINE_LIMITS = FreshnessLimits(stale_after_s=15.0, missing_after_s=60.0)
"""Engines are read every few seconds."""
STUCK_MEMORY_S = 30.0
"""An engine that has not been seen to make nothing for so long no longer counts as such."""
LOST_NODES_KEPT = 100
ASSUME_AGAIN_S = 10.0
"""How often it is looked which GPU models there are."""
START_AGAIN_S = 5.0
"""When a replica of a held tier asks again."""


class NotSettled(TierplaneError):
    """The controller has just started; it is asked again later, and until then nothing changes."""


@dataclass(frozen=True, slots=True)
class ControllerRules:
    """All rules of the control loop."""

    gpus: GpuRules = field(default_factory=GpuRules)
    reconcile: ReconcileRules = field(default_factory=ReconcileRules)
    hangs: StallRules = field(default_factory=StallRules)


class Controller:
    """Not safe for use by several threads; one event loop owns it."""

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
        self.registry = registry
        self.rules = rules or ControllerRules()
        self.fleet = GpuInventory(self.rules.gpus)
        self.desk = LeaseAllocator(self.fleet)
        self.work = InProgress()
        self.engines: dict[str, EngineTelemetry] = {}
        self.demand = TierDemandTracker()
        self.now_s = now_s
        self.unix_s = unix_s
        self._heartbeat_s = heartbeat_s
        self._settled_s = now_s() + (WARMING_REPORTS * heartbeat_s if settle_s is None else settle_s)
        self._shapes: dict[str, GangShape] = {}
        """Holder → what it asked for."""
        self._published: dict[str, TierTarget] = {}
        self._asked_s = self._asked_before_s = -math.inf
        """When Serve asked for targets last, and the time before."""
        self.applies = False
        """Tiers whose configuration lets them scale do so, and keep what they have until they are told."""
        self._looked_s = now_s()
        self._room_asked: dict[str, tuple[float, Placement | None]] = {}
        self._stuck: dict[str, StalledEngine] = {}
        self._alive: set[str] = set()
        self.lost_nodes: dict[str, LostNode] = {}
        """Nodes that went with replicas of ours, the last ones."""
        self.left = False
        """The last gateway said that it leaves: nothing is wanted any more."""
        self._gpu_assumed: dict[str, str] = {}
        """Tier → GPU model that its engines are assumed to run on; empty: none is known yet."""
        self._assumed_s = -ASSUME_AGAIN_S
        self._failed: dict[str, int] = {}
        """Endpoint id → the generation that it gave up."""

    @property
    def settled(self) -> bool:
        """Whether everybody has had the time to say again what they hold."""
        return self.now_s() >= self._settled_s

    @property
    def knows_all(self) -> bool:
        """Whether everybody was heard and the configuration is known. Nothing is decided before: without it
        every tier would seem to want no replica, and one that moves would end before another one serves."""
        return self.settled and not self.registry.warming and self.registry.declared

    def settle(self) -> None:
        """What was stored before vouches for everything: nobody has to be waited for."""
        self._settled_s = self.now_s()

    def declare(self, tiers: Sequence[TierSpec], heartbeat_s: float) -> None:
        """See :meth:`Registry.declare`."""
        self._heartbeat_s = heartbeat_s
        self._gpu_assumed = {spec.name: self._gpu_assumed.get(spec.name, "") for spec in tiers}
        self.registry.declare(
            [assuming_gpu(spec, self._gpu_assumed[spec.name]) for spec in tiers], heartbeat_s
        )

    # --- what comes in ------------------------------------------------------------------------------------

    def register(self, endpoint: Endpoint) -> None:
        """See :meth:`Registry.register`."""
        self.registry.register(endpoint)
        self._seen(endpoint)

    def report(self, endpoint: Endpoint) -> ReportResponse:
        """See :meth:`Registry.report`; the answer carries what the replica is to do."""
        known = self.registry.report(endpoint)
        if not known:
            return ReportResponse(False, lease_known=endpoint.endpoint_id in self.desk.table.leases)
        held = self._seen(endpoint)
        return ReportResponse(True, self.work.commands_for(endpoint), held or not endpoint.gpu_uuids)

    def deregister(self, endpoint_id: str, reason: str) -> None:
        """See :meth:`Registry.deregister`; its lease ends too."""
        self.registry.deregister(endpoint_id, reason)
        self.release_lease(endpoint_id)

    def gateway_report(self, info: GatewayInfo) -> bool:
        """See :meth:`Registry.gateway_report`; what it counted goes no further than here."""
        self.demand.observe(info.gateway_id, info.traffic, self.now_s())
        self.left = False
        return self.registry.gateway_report(replace(info, traffic=()))

    def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """See :meth:`Registry.gateway_gone`."""
        self.demand.ledger.forget(gateway_id)
        self.registry.gateway_gone(gateway_id, reason)
        self.left = not self.registry.gateways

    def observe_node(self, node_id: str, sample: NodeSample | None, events: Sequence[GpuEvent]) -> None:
        """What a node's agent sent."""
        for event in events:
            if event.kind in (GpuEventKind.XID, GpuEventKind.UNCORRECTED_ECC, GpuEventKind.LOST) or (
                not event.gpu_uuid
            ):
                detail = f"XID {event.code}" if event.kind is GpuEventKind.XID else event.detail
                self.registry.note(event.kind.value, event.gpu_uuid or node_id, detail or event.kind.value)
        for assessed in self.fleet.observe(node_id, sample, events, now_s=self.now_s()):
            decision = assessed.decision
            self.registry.note(f"GPU {decision.after}", decision.uuid, f"{decision.rule}: {decision.reason}")

    def observe_engine(self, sample: EngineSample) -> None:
        """What an engine said of itself."""
        name, now_s = sample.endpoint_id, self.now_s()
        telemetry = self.engines.setdefault(name, EngineTelemetry(ENGINE_LIMITS))
        telemetry.observe(sample, now_s)
        why = stall_reason(telemetry.load(now_s))
        if not why:
            self._stuck.pop(name, None)
            return
        known = self._stuck.get(name)
        self._stuck[name] = StalledEngine(known.since_s if known else now_s, now_s, why)

    def observe_nodes(self, alive: Collection[str]) -> None:
        """Which nodes Ray has; those that it had before and has no more are lost. A node that was never
        among them may just have come."""
        lost = self._alive - set(alive)
        self._alive = set(alive)
        for node_id in sorted(lost):
            self._lost(node_id)
            self.fleet.remove_node(node_id)
            self.registry.note("node lost", node_id, "Ray no longer has it")
            for endpoint in list(self.registry.endpoints.values()):
                if endpoint.node_id == node_id:
                    self.registry.lost(endpoint.endpoint_id, f"its node {node_id} is lost")
            for holder, lease in list(self.desk.table.leases.items()):
                if lease.node_id == node_id:
                    self.release_lease(holder)

    def _lost(self, node_id: str) -> None:
        """Remember it, unless it was empty or an operator had taken it out of use."""
        tiers = {item.tier for item in self.registry.endpoints.values() if item.node_id == node_id}
        if tiers and node_id not in self.fleet.holds:
            self.lost_nodes[node_id] = LostNode(self.now_s(), tuple(sorted(tiers)))
            while len(self.lost_nodes) > LOST_NODES_KEPT:
                del self.lost_nodes[next(iter(self.lost_nodes))]

    # --- leases -------------------------------------------------------------------------------------------

    def lease_gpus(
        self, holder: str, generation: int, node_id: str, shape: GangShape, tier: str
    ) -> LeaseResponse:
        """GPUs for a replica that Ray has put on a node; see :meth:`LeaseAllocator.acquire`."""
        wait = "" if self.settled else "the controller has just started: holders say again what they have"
        start = self.may_start(holder, tier)
        if not start.allowed:
            return LeaseResponse(LeaseOutcome.WAIT, start.reason, retry_after_s=start.retry_after_s)
        answer = self.desk.acquire(holder, generation, node_id, shape, now_s=self.now_s(), wait=wait)
        if answer.outcome is LeaseOutcome.GRANTED and answer.lease is not None:
            self._shapes[holder] = shape
            gpus = ", ".join(answer.lease.gpu_uuids)
            self.registry.note("leased", holder, f"{gpus}: {answer.reason}", tier)
        return answer

    def restore_lease(
        self, holder: str, generation: int, node_id: str, parts: Iterable[GpuPart]
    ) -> LeaseResponse:
        """What a running holder says it has; a conflict is refused, and the holder has to end."""
        answer = self.desk.restore(holder, generation, node_id, parts, self.now_s())
        if answer.outcome is LeaseOutcome.REFUSED:
            self.registry.note("lease refused", holder, answer.reason)
            if self.work.request_drain(holder, f"its GPUs are somebody else's: {answer.reason}"):
                self.registry.note("drain", holder, "two replicas can't use one GPU")
        return answer

    def release_lease(self, holder: str, generation: int | None = None) -> LeaseResponse:
        """See :meth:`LeaseTable.release`."""
        answer = self.desk.table.release(holder, generation=generation)
        if answer.outcome is LeaseOutcome.GRANTED:
            self._shapes.pop(holder, None)
            self.registry.note("lease ended", holder, answer.reason)
        return answer

    def may_start(self, holder: str, tier: str) -> StartPermission:
        """Whether an engine of the tier may be started now."""
        hold = self.work.holds.get(tier)
        if hold is None:
            return StartPermission(True, "nothing holds the tier")
        return StartPermission(False, f"tier {tier} is held: {hold.reason}", START_AGAIN_S)

    # --- what goes out ------------------------------------------------------------------------------------

    def gpus(self) -> tuple[GpuView, ...]:
        """The inventory."""
        return gpu_views(self.fleet, self.desk.table, now_s=self.now_s(), unix_s=self.unix_s())

    @property
    def heartbeat_s(self) -> float:
        """How often replicas and gateways report."""
        return self._heartbeat_s

    @property
    def published(self) -> Mapping[str, TierTarget]:
        """What was published last, by tier."""
        return MappingProxyType(self._published)

    def publish(self, targets: Mapping[str, TierTarget]) -> None:
        """How many replicas the tiers are to have, as the scaling recommends; moves and holds go on top."""
        self._published.update(targets)

    def unpublish(self, tiers: Iterable[str]) -> None:
        """These have the configuration's number again, or keep what they have, if they scale."""
        for tier in tiers:
            self._published.pop(tier, None)

    def base_targets(self) -> dict[str, int]:
        """Tier → replicas when nothing moves: what was published last and still holds, or the
        configuration's number. One that scales never shrinks for want of a target."""
        unix_s = self.unix_s()
        found = {}
        for spec in self.registry.tiers:
            published = self._published.get(spec.name)
            scales = self.applies and spec.scaling is not None and spec.scaling.autoscaled
            if published is not None and (scales or published.valid_until_unix_s > unix_s):
                found[spec.name] = published.replicas
            elif scales:
                living = sum(
                    endpoint.tier == spec.name and endpoint.state not in ENDED
                    for endpoint in self.registry.endpoints.values()
                )
                found[spec.name] = max(spec.replicas, living - self.work.leaving_count(spec.name))
            else:
                found[spec.name] = spec.replicas
        return found

    def targets(self) -> dict[str, TierTarget]:
        """Tier → how many replicas Serve is to keep. Raises NotSettled while it may not know everything: the
        last answer holds on then."""
        if not self.knows_all:
            raise NotSettled("the controller has just started and may not know every replica and move yet")
        self._asked_before_s, self._asked_s = self._asked_s, self.now_s()
        unix_s = self.unix_s()
        serving: dict[str, int] = {}
        for endpoint in self.registry.endpoints.values():
            serving[endpoint.tier] = serving.get(endpoint.tier, 0) + (endpoint.state in SERVING)
        return {
            tier: tier_target(
                *(tier, base, self.work.migrations.values(), self.work.holds.get(tier)),
                serving=serving.get(tier, 0),
                valid_until_unix_s=unix_s + max(TARGET_TTL_S, TARGET_TTL_REPORTS * self._heartbeat_s),
            )
            for tier, base in self.base_targets().items()
        }

    def activity(self) -> Activity:
        """What is under way."""
        work = self.work
        return Activity(
            tuple(work.migrations.values()),
            tuple(work.restarts.values()),
            tuple(work.holds.items()),
            tuple(work.drains.items()),
            self.knows_all,
            "",
            0.0,
        )

    # --- the tick -----------------------------------------------------------------------------------------

    def tick(self) -> tuple[AppliedCommand, ...]:
        """One look at everything, and what was done about it."""
        now_s = self.now_s()
        if now_s - self._looked_s > 2 * self._heartbeat_s:
            # nobody could be heard in the meantime: that is nobody's fault
            for holder in self.desk.table.leases:
                self.desk.renew(holder, now_s)
        self._looked_s = now_s
        self.registry.expire()
        self.demand.ledger.retain_gateways({gateway.gateway_id for gateway in self.registry.gateways})
        for lease in self.desk.table.reap(now_s=now_s, ttl_s=MISSED_REPORTS * self._heartbeat_s):
            self._shapes.pop(lease.holder, None)
            self.registry.note("lease ended", lease.holder, "its holder was not heard of")
        endpoints = self.registry.endpoints
        if not self.knows_all:
            return ()
        if now_s - self._assumed_s >= ASSUME_AGAIN_S:
            self._assumed_s = now_s
            self._assume_gpus()
        self.work.prune(endpoints, now_s, self.rules.reconcile.hold_max_s)
        for kept in (self.engines, self._room_asked, self._failed):
            for gone in [name for name in kept if name not in endpoints]:
                del kept[gone]
        done = []
        for command in reconcile(self._observe(now_s), self.rules.reconcile):
            if isinstance(command, BeginMigration) and not self._still_room(command):
                continue
            applied = self._apply_gpu(command, now_s) if isinstance(command, SetGpu) else None
            applied = applied or self.work.apply(command, endpoints, now_s)
            if applied is not None:
                self.registry.note(applied.kind, applied.subject, applied.reason, applied.tier)
                done.append(applied)
        return tuple(done)

    def _assume_gpus(self) -> None:
        """Have each tier's scaling begin with the speed of the GPUs that are there."""
        tiers = self.registry.tiers
        if not any(spec.scaling is not None and spec.scaling.gpu_priors for spec in tiers):
            return
        names = {uuid: self._gpu_model(uuid) for uuid in self.fleet.records}
        there = Counter(names.values())
        assumed = {}
        for spec in tiers:
            mine = [item for item in self.registry.endpoints.values() if item.tier == spec.name]
            own = Counter(names.get(uuid, "") for item in mine for uuid in item.gpu_uuids)
            before = self._gpu_assumed.get(spec.name, "")
            gpu = assumed[spec.name] = assumed_gpu(spec, before, own, there)
            if gpu and gpu != before:
                text = f"until its engines were watched, it is assumed to be as fast as a {gpu} allows"
                self.registry.note("speed assumed", spec.name, text, spec.name)
        if assumed != self._gpu_assumed:
            self._gpu_assumed = assumed
            self.declare(tiers, self._heartbeat_s)

    def _gpu_model(self, uuid: str) -> str:
        """The GPU's name in the table, or the driver's; empty: not known."""
        name = self.fleet.sample(uuid).info.name
        return "" if isinstance(name, Missing) else table_name(name)

    def _observe(self, now_s: float) -> ClusterState:
        endpoints = self.registry.endpoints
        book = self.desk.table
        out_of_use, places = {}, {}
        for uuid in self.fleet.out_of_use():
            record = self.fleet.records[uuid]
            why = self.fleet.leave_reason(uuid)
            holders = book.holders(uuid)
            if record.out_of_use:
                out_of_use[uuid] = GpuOutOfUse(record.health.state, holders, bool(why), record.health.reason)
            if why:
                places.update(dict.fromkeys(holders, why))
        for node_id, hold in self.fleet.holds.items():
            if hold.must_leave:
                for endpoint in endpoints.values():
                    if endpoint.node_id == node_id:
                        places.setdefault(endpoint.endpoint_id, f"node {node_id} is drained: {hold.reason}")
        leaving = self.work.leaving(endpoints, places, self._drained(now_s))
        return ClusterState(
            now_s,
            endpoints=endpoints,
            base_targets=self.base_targets(),
            leaving=leaving,
            room=self._room(leaving, endpoints, now_s),
            gpus=out_of_use,
            migrations=dict(self.work.migrations),
            restarts=dict(self.work.restarts),
            holds=dict(self.work.holds),
            stalled=self._stalled(endpoints, now_s),
            stall_restarts=dict(self.work.stall_restarts),
            failures=dict(self.work.failures),
            hold_counts={tier: count for tier, (count, _) in self.work.hold_history.items()},
        )

    def _drained(self, now_s: float) -> dict[str, str]:
        """Tier → why all its replicas leave. Serve hears that first, and has gone by it when it asks again: a
        replica that ended before would be replaced, also by a Serve that was killed and comes back."""
        away = now_s - self._asked_s > TARGETS_SEEN_S
        return {
            tier: hold.reason
            for tier, hold in self.work.holds.items()
            if hold.must_leave
            if self._asked_before_s > hold.since_s or (away and now_s - hold.since_s > TARGETS_SEEN_S)
        }

    def _room(
        self, leaving: Mapping[str, str], endpoints: Mapping[str, Endpoint], now_s: float
    ) -> dict[str, str]:
        """Endpoint id → where another one like it would go. Looking costs: one at a time, and each again
        only after a while."""
        book = self.desk.table
        looked = False
        found = {}
        for endpoint_id in sorted(leaving.keys() - self.work.migrations.keys()):
            endpoint = endpoints[endpoint_id]
            lease = book.leases.get(endpoint_id)
            if endpoint.state not in SERVING:
                continue
            if lease is None:
                found[endpoint_id] = "where Ray finds a place"
                continue
            asked = self._room_asked.get(endpoint_id)
            if asked is None or now_s - asked[0] >= ROOM_AGAIN_S:
                if looked:
                    continue
                looked = True
                shape = self._shapes.get(endpoint_id) or shape_of(lease)
                asked = (now_s, find_room(self.fleet, book, shape, endpoint.tier, endpoints))
                self._room_asked[endpoint_id] = asked
            found[endpoint_id] = f"on {', '.join(asked[1].node_ids)}" if asked[1] else ""
        return found

    def _still_room(self, command: BeginMigration) -> bool:
        """Whether the place that a move counts on is still there; if not, it is looked for anew."""
        asked = self._room_asked.get(command.endpoint_id)
        if command.phase is not MigrationPhase.STARTING_ELSEWHERE or asked is None or asked[1] is None:
            return True
        if still_room(self.fleet, self.desk.table, asked[1]):
            return True
        del self._room_asked[command.endpoint_id]
        return False

    def _stalled(self, endpoints: Mapping[str, Endpoint], now_s: float) -> dict[str, str]:
        found = {}
        for name, stuck in list(self._stuck.items()):
            endpoint = endpoints.get(name)
            if endpoint is None or endpoint.state not in SERVING or now_s - stuck.seen_s > STUCK_MEMORY_S:
                del self._stuck[name]
                continue
            lasted_s = stuck.seen_s - stuck.since_s
            if lasted_s >= self.rules.hangs.after_s:
                found[name] = f"{stuck.reason} for {lasted_s:.0f} s"
        return found

    def _apply_gpu(self, command: SetGpu, now_s: float) -> AppliedCommand | None:
        try:
            changed = self.fleet.advance(command.uuid, command.state, now_s=now_s)
        except (IllegalTransition, KeyError):
            return None
        return AppliedCommand(f"GPU {command.state}", command.uuid, command.reason) if changed else None

    def _seen(self, endpoint: Endpoint) -> bool:
        """The endpoint was heard of; False if it has no lease."""
        name, generation = endpoint.endpoint_id, endpoint.generation
        # Without a generation no engine was ever started, for want of a GPU: that is no crash.
        if endpoint.state is EndpointState.FAILED and generation and self._failed.get(name) != generation:
            self._failed[name] = generation
            self.work.record_failure(endpoint, self.now_s())
        return self.desk.renew(name, self.now_s())
