"""Every GPU that node agents report: its readings, its health, and whether an operator took it out of use.

:meth:`GpuInventory.observe` takes in one agent's update and assesses that node's GPUs at once, so the work is
spread over time as updates arrive. A GPU without an update is not assessed: if a node's agent is silent, or
its driver does not respond, the health of its GPUs does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from controlplane.core.gpus import health as gpu_health
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.health import (
    LAST_RESORT,
    OUT_OF_USE,
    GpuHealth,
    GpuState,
    HealthAssessment,
    assess,
    has_open_findings,
    sample_changes_nothing,
)
from controlplane.core.gpus.node_view import placement_node
from controlplane.core.gpus.xid import XidSeverity
from controlplane.core.placement.topology import Node
from controlplane.core.telemetry.gpu import GpuSignals, GpuTelemetry
from controlplane.core.telemetry.node import NodeTelemetry
from controlplane.core.telemetry.samples import GpuCondition, GpuEvent, GpuSample, Missing, NodeSample
from controlplane.core.telemetry.series import DEFAULT_LIMITS, signal_of

_UNUSABLE = frozenset({GpuCondition.LOST, GpuCondition.RESET_REQUIRED})
MAX_REMEMBERED = 10_000
"""Maximum number of GPUs whose health is remembered after their node is gone."""


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """One GPU: where it is, and its health."""

    node_id: str
    health: GpuHealth
    must_leave: bool = False
    """Whether the replicas on it have to leave. If not, a GPU that is out of use only takes no new
    replicas."""

    @property
    def out_of_use(self) -> bool:
        """Whether it takes no new replicas."""
        return self.health.state in OUT_OF_USE


@dataclass(frozen=True, slots=True)
class NodeHold:
    """A node that an operator took out of use."""

    reason: str
    must_leave: bool = False
    """Whether the replicas on it have to leave."""


class GpuInventory:
    """The GPUs of all nodes. Not safe for use by several threads."""

    def __init__(self, rules: GpuRules | None = None) -> None:
        self.rules = rules or GpuRules()
        self._nodes: dict[str, NodeTelemetry] = {}
        self._records: dict[str, GpuRecord] = {}
        self._without_findings: dict[str, GpuHealth] = {}
        """UUID → health of the GPUs without open findings: nearly all GPUs, and quick to assess."""
        self._out_of_use: dict[str, str] = {}
        """UUID → node id of the GPUs that are out of use because of their own state."""
        self._eventful: dict[str, GpuRecord] = {}
        """By UUID: the GPUs that are not healthy, or have been cordoned before."""
        self._last_readable: dict[str, GpuSample] = {}
        """UUID → the last readable sample of a GPU whose newest one is not, or that is no longer listed."""
        self._has_reported_gpus = False
        self._by_node: dict[str, tuple[str, ...]] = {}
        """Node id → UUIDs of its GPUs, in the driver's order; vanished ones last."""
        self._holds: dict[str, NodeHold] = {}
        """By node id."""
        self._remembered: dict[str, tuple[GpuHealth, bool]] = {}
        """UUID → health and ``must_leave`` of GPUs that no node has reported since a restart or since their
        node was lost."""

    @property
    def records(self) -> Mapping[str, GpuRecord]:
        """By UUID."""
        return MappingProxyType(self._records)

    @property
    def has_reported_gpus(self) -> bool:
        """Whether any node has ever reported a GPU. If not, the GPU total of the cluster is unknown."""
        return self._has_reported_gpus

    @property
    def nodes(self) -> Mapping[str, NodeTelemetry]:
        """The nodes that have reported, by id."""
        return MappingProxyType(self._nodes)

    @property
    def holds(self) -> Mapping[str, NodeHold]:
        """The nodes that an operator took out of use, by id."""
        return MappingProxyType(self._holds)

    def gpus_of(self, node_id: str) -> tuple[str, ...]:
        """UUIDs of a node's GPUs, in the driver's order."""
        return self._by_node.get(node_id, ())

    def observe(
        self, node_id: str, sample: NodeSample | None, events: Sequence[GpuEvent], *, now_s: float
    ) -> tuple[HealthAssessment, ...]:
        """Takes in an update of a node's agent at ``now_s``; returns the GPUs whose state changed, and why.

        ``sample`` is None if the agent has not taken one yet.
        """
        telemetry = self._nodes.get(node_id)
        if telemetry is None:
            if sample is None:
                return ()
            telemetry = self._nodes[node_id] = NodeTelemetry()
        before = telemetry.latest.gpus if telemetry.latest is not None else ()
        events_of: dict[str, list[GpuEvent]] = {}
        for event in events:
            if event.gpu_uuid:
                events_of.setdefault(event.gpu_uuid, []).append(event)
        changed: list[HealthAssessment] = []
        if sample is not None and telemetry.observe(sample, now_s):
            listed, boot_id = telemetry.gpus.uuids, sample.boot_id
            if listed != self._by_node.get(node_id):
                for lost in self._update_list(node_id, listed, before, sample):
                    changed += self._assess(
                        node_id,
                        lost.info.uuid,
                        lost,
                        events_of.pop(lost.info.uuid, ()),
                        now_s=now_s,
                        boot_id=boot_id,
                    )
            rules, without_findings = self.rules, self._without_findings
            for gpu in sample.gpus:
                uuid = gpu.info.uuid
                health = without_findings.get(uuid)
                if (
                    health is not None
                    and uuid not in events_of
                    and sample_changes_nothing(health, gpu, boot_id, rules)
                ):
                    continue
                if uuid:
                    if not _readable(gpu):
                        self._save_readable(uuid, before)
                    changed += self._assess(
                        node_id, uuid, gpu, events_of.pop(uuid, ()), now_s=now_s, boot_id=boot_id
                    )
        for uuid, of_gpu in events_of.items():
            if uuid in self._records:
                changed += self._assess(node_id, uuid, None, of_gpu, now_s=now_s, boot_id="")
        return tuple(changed)

    def _update_list(
        self, node_id: str, listed: tuple[str, ...], before: Sequence[GpuSample], sample: NodeSample
    ) -> list[GpuSample]:
        """Stores which GPUs the node lists now; returns a sample for each that vanished from the list.

        ``before`` are the GPUs of the previous sample. A GPU counts as vanished only if the driver works and
        still lists others. The agent itself reports a vanished GPU as lost, unless the agent started after
        that.
        """
        for gpu in before:
            uuid = gpu.info.uuid
            if uuid and uuid not in listed and (_readable(gpu) or uuid not in self._last_readable):
                self._last_readable[uuid] = gpu
        vanished: tuple[str, ...] = ()
        if listed and not isinstance(sample.driver_version, Missing):
            vanished = tuple(
                uuid
                for uuid in self._by_node.get(node_id, ())
                if uuid not in listed and uuid in self._records and self._records[uuid].node_id == node_id
            )
        self._by_node[node_id] = (*listed, *vanished)
        lost = []
        for uuid in vanished:
            info = self._last_readable[uuid].info
            self._last_readable[uuid] = GpuSample(info, GpuCondition.LOST, "the driver no longer lists it")
            lost.append(self._last_readable[uuid])
        return lost

    def _save_readable(self, uuid: str, before: Sequence[GpuSample]) -> None:
        for gpu in before:
            if gpu.info.uuid == uuid and _readable(gpu):
                self._last_readable[uuid] = gpu

    def _assess(
        self,
        node_id: str,
        uuid: str,
        sample: GpuSample | None,
        events: Sequence[GpuEvent],
        *,
        now_s: float,
        boot_id: str,
    ) -> tuple[HealthAssessment, ...]:
        """Assesses one GPU and stores the result; returns it if the GPU's state changed."""
        record = self._records.get(uuid)
        if record is None:
            health, must_leave = self._remembered.pop(uuid, (GpuHealth(uuid, since_s=now_s), False))
            record = GpuRecord(node_id, health, must_leave)
        assessed = assess(record.health, sample, events, now_s=now_s, rules=self.rules, boot_id=boot_id)
        cordoned = assessed.decision.changed and assessed.decision.after is GpuState.CORDONED
        must_leave = assessed.health.state in OUT_OF_USE and (
            record.must_leave
            or cordoned
            or any(finding.severity is XidSeverity.FATAL for finding in assessed.findings)
        )
        self._put(uuid, GpuRecord(node_id, assessed.health, must_leave))
        return (assessed,) if assessed.decision.changed else ()

    def _put(self, uuid: str, record: GpuRecord) -> None:
        self._records[uuid] = record
        self._has_reported_gpus = True
        health = record.health
        if has_open_findings(health):
            self._without_findings.pop(uuid, None)
        else:
            self._without_findings[uuid] = health
        if record.out_of_use:
            self._out_of_use[uuid] = record.node_id
        else:
            self._out_of_use.pop(uuid, None)
        if health.state is not GpuState.HEALTHY or health.cordons_s:
            self._eventful[uuid] = record
        else:
            self._eventful.pop(uuid, None)

    def _drop(self, uuid: str) -> None:
        del self._records[uuid]
        self._last_readable.pop(uuid, None)
        self._without_findings.pop(uuid, None)
        self._out_of_use.pop(uuid, None)
        self._eventful.pop(uuid, None)

    def sample(self, uuid: str) -> GpuSample:
        """The GPU's last readable sample, or its newest one if none was readable. KeyError if unknown."""
        telemetry = self._nodes.get(self._records[uuid].node_id)
        latest = telemetry.gpus.sample(uuid) if telemetry is not None else None
        return self._last_readable[uuid] if latest is None else self._readable_or(latest)

    def _readable_or(self, latest: GpuSample) -> GpuSample:
        """The last readable sample of the GPU, or ``latest`` if there is none."""
        last = None if _readable(latest) else self._last_readable.get(latest.info.uuid)
        return latest if last is None or not _readable(last) else last

    def node(self, node_id: str, *, last_resort: bool = False) -> Node | None:
        """The node for the placement; None if it has not reported. Ray accounts for CPUs and memory.

        Suspect GPUs are unavailable unless ``last_resort``. A GPU whose driver does not respond is described
        by its last readable sample, and counts as suspect.
        """
        telemetry = self._nodes.get(node_id)
        if telemetry is None or telemetry.latest is None:
            return None
        gpus, unavailable = [], {}
        for gpu in telemetry.latest.gpus:
            record = self._records.get(gpu.info.uuid)
            if record is None:
                continue
            last = self._readable_or(gpu)
            gpus.append(last if _readable(last) else replace(last, condition=GpuCondition.OK))
            unavailable[gpu.info.uuid] = self._why_unavailable(record, _readable(gpu), last_resort)
        hold = self._holds.get(node_id)
        sample = replace(telemetry.latest, gpus=tuple(gpus))
        cordoned = f"cordoned: {hold.reason}" if hold else ""
        return placement_node(sample, unavailable=cordoned, unavailable_gpus=unavailable)

    def _why_unavailable(self, record: GpuRecord, readable: bool, last_resort: bool) -> str:
        health = record.health
        if health.state in OUT_OF_USE:
            return f"{health.state}: {health.reason}"
        if last_resort:
            return ""
        if health.state in LAST_RESORT:
            return f"suspect: {health.reason}"
        return "" if readable else "its driver does not respond"

    def signals(self, uuid: str, now_s: float) -> GpuSignals:
        """A GPU's signals at ``now_s``; all MISSING if it is not reported."""
        record = self._records.get(uuid)
        telemetry = self._nodes.get(record.node_id) if record else None
        return (telemetry.gpus if telemetry else GpuTelemetry()).signals(uuid, now_s)

    # --- GPUs and nodes out of use -------------------------------------------------------------------------

    def out_of_use(self) -> dict[str, str]:
        """UUID → node id of every GPU that takes no new replicas, because of its own health or its node."""
        found = dict(self._out_of_use)
        for node_id in self._holds:
            found |= dict.fromkeys(self.gpus_of(node_id), node_id)
        return found

    def leave_reason(self, uuid: str) -> str:
        """Why the replicas on the GPU have to leave; empty if they may stay."""
        record = self._records.get(uuid)
        if record is None:
            return ""
        if record.must_leave and record.out_of_use:
            return f"GPU {uuid}: {record.health.reason}"
        hold = self._holds.get(record.node_id)
        return f"node {record.node_id} is drained: {hold.reason}" if hold and hold.must_leave else ""

    def unusable_reason(self, uuid: str, now_s: float) -> str:
        """Why the GPU can't return to use, according to a fresh sample of its driver; empty if it can, or if
        there is no fresh sample. KeyError if unknown."""
        record, sample = self._records[uuid], self.sample(uuid)
        telemetry = self._nodes[record.node_id]
        fresh = signal_of(0.0, telemetry.latest_s, now_s, DEFAULT_LIMITS).fresh is not None
        if not record.out_of_use or not fresh or sample.condition not in _UNUSABLE:
            return ""
        detail = f" ({sample.detail})" if sample.detail else ""
        return f"its driver reports that it is {sample.condition.value.replace('_', ' ')}{detail}"

    def cordon_gpu(self, uuid: str, reason: str, *, must_leave: bool, now_s: float) -> bool:
        """An operator cordons the GPU; False if nothing changed. KeyError if unknown."""
        record = self._records[uuid]
        health = gpu_health.cordon(record.health, now_s=now_s, reason=reason, rules=self.rules)
        changed = replace(record, health=health, must_leave=record.must_leave or must_leave)
        self._put(uuid, changed)
        return changed != record

    def uncordon_gpu(self, uuid: str, reason: str, *, now_s: float) -> bool:
        """An operator uncordons the GPU; False if it was not out of use. KeyError if unknown."""
        record = self._records[uuid]
        if not record.out_of_use:
            return False
        health = gpu_health.uncordon(record.health, now_s=now_s, reason=reason, rules=self.rules)
        self._put(uuid, replace(record, health=health, must_leave=False))
        return True

    def advance(self, uuid: str, state: GpuState, *, now_s: float) -> bool:
        """The reconciler marks the GPU as draining or drained; False if nothing changed.

        Raises IllegalTransition. KeyError if unknown.
        """
        record = self._records[uuid]
        health = gpu_health.transition(
            record.health, state, now_s=now_s, rule="", reason="", rules=self.rules
        )
        self._put(uuid, replace(record, health=health))
        return health is not record.health

    def cordon_node(self, node_id: str, reason: str, *, must_leave: bool) -> bool:
        """An operator cordons the node; False if nothing changed."""
        hold = self._holds.get(node_id)
        if hold is not None and (hold.must_leave or not must_leave):
            return False
        self._holds[node_id] = NodeHold(reason, must_leave)
        return True

    def uncordon_node(self, node_id: str) -> bool:
        """An operator uncordons the node; False if it was not cordoned."""
        return self._holds.pop(node_id, None) is not None

    def remove_node(self, node_id: str) -> bool:
        """Drops a node that is gone for good, with its GPUs; False if it was not known.

        The health of its unhealthy GPUs is remembered, in case the machine comes back with another id.
        """
        if self._nodes.pop(node_id, None) is None:
            return False
        self._holds.pop(node_id, None)
        self._by_node.pop(node_id, None)
        for uuid, record in [item for item in self._records.items() if item[1].node_id == node_id]:
            self._drop(uuid)
            if record.health.state is not GpuState.HEALTHY:
                self._remembered[uuid] = (record.health, record.must_leave)
        while len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        return True

    # --- restarts of the controller -----------------------------------------------------------------------

    def state_to_store(self) -> tuple[dict[str, tuple[GpuHealth, bool]], dict[str, NodeHold]]:
        """The state that must survive a restart: UUID → health and ``must_leave`` of the GPUs that are not
        healthy or have been cordoned before, and node id → hold of the nodes that are out of use."""
        gpus = dict(self._remembered)
        for uuid, record in self._eventful.items():
            gpus[uuid] = (record.health, record.must_leave)
        return gpus, dict(self._holds)

    def restore(
        self,
        gpus: Iterable[tuple[GpuHealth, bool]],
        holds: Mapping[str, NodeHold],
        *,
        has_reported_gpus: bool = False,
    ) -> None:
        """Restores what :meth:`state_to_store` returned; it applies to each GPU once a node reports it."""
        self._has_reported_gpus = self._has_reported_gpus or has_reported_gpus
        self._remembered.update({health.uuid: (health, leave) for health, leave in gpus})
        self._holds.update(holds)


def _readable(sample: GpuSample) -> bool:
    return sample.condition is not GpuCondition.UNREADABLE
