"""Every GPU that node agents report: its readings, its health, and who has taken it out of use.

:meth:`GpuFleet.observe` takes in what an agent sent and judges the node's GPUs at once, so the work is
spread over the time in which samples arrive. What nobody reports is not judged: a node whose agent is silent,
or whose driver does not answer, keeps the health it had.
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
    calm,
    nothing_new,
)
from controlplane.core.gpus.node_view import node_of
from controlplane.core.gpus.xid import XidSeverity
from controlplane.core.placement.topology import Node
from controlplane.core.telemetry.gpu import GpuSignals, GpuTelemetry
from controlplane.core.telemetry.node import NodeTelemetry
from controlplane.core.telemetry.samples import GpuCondition, GpuEvent, GpuSample, Missing, NodeSample
from controlplane.core.telemetry.series import DEFAULT_LIMITS, signal_of

_AWAY = frozenset({GpuCondition.LOST, GpuCondition.RESET_REQUIRED})
REMEMBERED = 10_000
"""GPUs that are gone and were not healthy: so many are remembered, the last ones."""


@dataclass(frozen=True, slots=True)
class GpuRecord:
    """One GPU: where it is, and its health."""

    node_id: str
    health: GpuHealth
    must_leave: bool = False
    """What runs on it has to leave, and not only nothing new to come."""

    @property
    def out_of_use(self) -> bool:
        """Whether nothing new may come."""
        return self.health.state in OUT_OF_USE


@dataclass(frozen=True, slots=True)
class NodeHold:
    """A node that an operator took out of use."""

    reason: str
    must_leave: bool = False


class GpuInventory:
    """The GPUs of all nodes. Not safe for use by several threads."""

    def __init__(self, rules: GpuRules | None = None) -> None:
        self.rules = rules or GpuRules()
        self._nodes: dict[str, NodeTelemetry] = {}
        self._records: dict[str, GpuRecord] = {}
        self._calm: dict[str, GpuHealth] = {}
        self._out_of_use: dict[str, str] = {}
        self._eventful: dict[str, GpuRecord] = {}
        """Of the records, by UUID: the health of those that are calm, the node of those out of use, and those
        that are not simply healthy. Nearly all are calm, so nobody has to look at all of them."""
        self._aside: dict[str, GpuSample] = {}
        """UUID → the last sample that could be read, where the newest can't or the GPU is listed no more."""
        self._counted = False
        """Some node has reported a GPU."""
        self._by_node: dict[str, tuple[str, ...]] = {}
        self._holds: dict[str, NodeHold] = {}
        self._waiting: dict[str, tuple[GpuHealth, bool]] = {}
        """Health from before a restart of GPUs that have not been seen since."""

    @property
    def records(self) -> Mapping[str, GpuRecord]:
        """By UUID."""
        return MappingProxyType(self._records)

    @property
    def counted(self) -> bool:
        """Whether a GPU was ever reported: where none was, nobody counts them."""
        return self._counted

    @property
    def nodes(self) -> Mapping[str, NodeTelemetry]:
        """By node id: those that have reported."""
        return MappingProxyType(self._nodes)

    @property
    def holds(self) -> Mapping[str, NodeHold]:
        """Nodes that are out of use, by id."""
        return MappingProxyType(self._holds)

    def gpus_of(self, node_id: str) -> tuple[str, ...]:
        """UUIDs of a node's GPUs, in the driver's order."""
        return self._by_node.get(node_id, ())

    def observe(
        self, node_id: str, sample: NodeSample | None, events: Sequence[GpuEvent], *, now_s: float
    ) -> tuple[HealthAssessment, ...]:
        """Takes in what a node's agent sent at ``now_s``; answers with what moved."""
        telemetry = self._nodes.get(node_id)
        if telemetry is None:
            if sample is None:
                return ()
            telemetry = self._nodes[node_id] = NodeTelemetry()
        before = telemetry.latest
        latest = sample if sample is not None and telemetry.observe(sample, now_s) else None
        by_gpu: dict[str, list[GpuEvent]] = {}
        for event in events:
            if event.gpu_uuid:
                by_gpu.setdefault(event.gpu_uuid, []).append(event)
        moved: list[HealthAssessment] = []
        if latest is not None:
            listed = telemetry.gpus.uuids
            if listed != self._by_node.get(node_id):
                for gpu in before.gpus if before is not None else ():
                    uuid = gpu.info.uuid
                    if uuid and uuid not in listed and (_readable(gpu) or uuid not in self._aside):
                        self._aside[uuid] = gpu
                vanished = self._vanished(node_id, listed, latest)
                for uuid in vanished:
                    lost = GpuSample(self._aside[uuid].info, GpuCondition.LOST, "the driver lists it no more")
                    self._aside[uuid] = lost
                    moved += self._look(node_id, lost, by_gpu.pop(uuid, ()), now_s, latest.boot_id)
                self._by_node[node_id] = (*listed, *vanished)
            boot_id, rules, known = latest.boot_id, self.rules, self._calm
            for gpu in latest.gpus:
                uuid = gpu.info.uuid
                health = known.get(uuid)
                if health is not None and uuid not in by_gpu and nothing_new(health, gpu, boot_id, rules):
                    continue
                if uuid:
                    if before is not None and not _readable(gpu):
                        for last in before.gpus:
                            if last.info.uuid == uuid and _readable(last):
                                self._aside[uuid] = last
                    moved += self._look(node_id, gpu, by_gpu.pop(uuid, ()), now_s, boot_id)
        for uuid, of_gpu in by_gpu.items():
            if uuid in self._records:
                moved += self._look(node_id, None, of_gpu, now_s, "", uuid)
        return tuple(moved)

    def _vanished(self, node_id: str, listed: tuple[str, ...], latest: NodeSample) -> tuple[str, ...]:
        """GPUs that were there and that a working driver lists no more: a new agent never saw them."""
        if isinstance(latest.driver_version, Missing) or not listed:
            return ()
        return tuple(
            uuid
            for uuid in self._by_node.get(node_id, ())
            if uuid not in listed and uuid in self._records and self._records[uuid].node_id == node_id
        )

    def _look(
        self,
        node_id: str,
        sample: GpuSample | None,
        events: Sequence[GpuEvent],
        now_s: float,
        boot_id: str,
        uuid: str = "",
    ) -> tuple[HealthAssessment, ...]:
        uuid = sample.info.uuid if sample is not None else uuid
        record = self._records.get(uuid)
        if record is None:
            assert sample is not None
            health, must_leave = self._waiting.pop(uuid, (GpuHealth(uuid, since_s=now_s), False))
            record = GpuRecord(node_id, health, must_leave)
        seen = assess(record.health, sample, events, now_s=now_s, rules=self.rules, boot_id=boot_id)
        must_leave = seen.health.state in OUT_OF_USE and (
            record.must_leave
            or (seen.verdict.moved and seen.verdict.after is GpuState.CORDONED)
            or any(finding.level is XidSeverity.FATAL for finding in seen.findings)
        )
        self._put(uuid, GpuRecord(node_id, seen.health, must_leave))
        return (seen,) if seen.verdict.moved else ()

    def _put(self, uuid: str, record: GpuRecord) -> None:
        self._records[uuid] = record
        self._counted = True
        health = record.health
        if calm(health):
            self._calm[uuid] = health
        else:
            self._calm.pop(uuid, None)
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
        self._aside.pop(uuid, None)
        self._calm.pop(uuid, None)
        self._out_of_use.pop(uuid, None)
        self._eventful.pop(uuid, None)

    def sample(self, uuid: str) -> GpuSample:
        """The GPU's last sample that could be read; the very last if none could. KeyError if unknown."""
        telemetry = self._nodes.get(self._records[uuid].node_id)
        latest = telemetry.gpus.sample(uuid) if telemetry is not None else None
        return self._aside[uuid] if latest is None else self._last_readable(latest)

    def _last_readable(self, latest: GpuSample) -> GpuSample:
        aside = None if _readable(latest) else self._aside.get(latest.info.uuid)
        return latest if aside is None or not _readable(aside) else aside

    def node(self, node_id: str, *, last_resort: bool = False) -> Node | None:
        """The node as the placement sees it; None if it has not reported. CPUs and memory are Ray's.

        Suspect GPUs are left out unless ``last_resort``. A GPU whose driver does not answer is judged by what
        was known of it before, and counts as suspect.
        """
        telemetry = self._nodes.get(node_id)
        if telemetry is None or telemetry.latest is None:
            return None
        gpus, refused = [], {}
        for gpu in telemetry.latest.gpus:
            record = self._records.get(gpu.info.uuid)
            if record is None:
                continue
            last = self._last_readable(gpu)
            gpus.append(last if _readable(last) else replace(last, condition=GpuCondition.OK))
            refused[gpu.info.uuid] = self._refusal(record, not _readable(gpu), last_resort)
        hold = self._holds.get(node_id)
        sample = replace(telemetry.latest, gpus=tuple(gpus))
        unavailable = f"cordoned: {hold.reason}" if hold else ""
        return node_of(sample, cpu_milli=0, memory_bytes=0, unavailable=unavailable, cordoned=refused)

    def _refusal(self, record: GpuRecord, unreadable: bool, last_resort: bool) -> str:
        health = record.health
        if health.state in OUT_OF_USE:
            return f"{health.state}: {health.reason}"
        if last_resort:
            return ""
        if health.state in LAST_RESORT:
            return f"suspect: {health.reason}"
        return "its driver does not answer" if unreadable else ""

    def signals(self, uuid: str, now_s: float) -> GpuSignals:
        """A GPU's readings at ``now_s``; all MISSING for one that is not reported."""
        record = self._records.get(uuid)
        telemetry = self._nodes.get(record.node_id) if record else None
        return (telemetry.gpus if telemetry else GpuTelemetry()).signals(uuid, now_s)

    # --- what is out of use ------------------------------------------------------------------------------

    def out_of_use(self) -> dict[str, str]:
        """UUID → node id of every GPU that nothing new may come to, by its own health or with its node."""
        found = dict(self._out_of_use)
        for node_id in self._holds:
            found |= dict.fromkeys(self.gpus_of(node_id), node_id)
        return found

    def why_leave(self, uuid: str) -> str:
        """Why what runs on the GPU has to leave; empty: it need not."""
        record = self._records.get(uuid)
        if record is None:
            return ""
        if record.must_leave and record.out_of_use:
            return f"GPU {uuid}: {record.health.reason}"
        hold = self._holds.get(record.node_id)
        return f"node {record.node_id} is drained: {hold.reason}" if hold and hold.must_leave else ""

    def away(self, uuid: str, now_s: float) -> str:
        """Why the GPU can't be used whatever anybody wants, by what its driver said just now; empty: it can,
        or nothing new is known of it. KeyError for an unknown GPU."""
        record, sample = self._records[uuid], self.sample(uuid)
        telemetry = self._nodes[record.node_id]
        fresh = signal_of(0.0, telemetry.latest_s, now_s, DEFAULT_LIMITS).fresh is not None
        if not record.out_of_use or not fresh or sample.condition not in _AWAY:
            return ""
        detail = f" ({sample.detail})" if sample.detail else ""
        return f"its driver says that it is {sample.condition.value.replace('_', ' ')}{detail}"

    def cordon_gpu(self, uuid: str, reason: str, *, must_leave: bool, now_s: float) -> bool:
        """As an operator asks; False if it was so already. KeyError for an unknown GPU."""
        record = self._records[uuid]
        health = gpu_health.cordon(record.health, now_s=now_s, reason=reason, rules=self.rules)
        changed = replace(record, health=health, must_leave=record.must_leave or must_leave)
        self._put(uuid, changed)
        return changed != record

    def uncordon_gpu(self, uuid: str, reason: str, *, now_s: float) -> bool:
        """As an operator asks; False if it was not out of use. KeyError for an unknown GPU."""
        record = self._records[uuid]
        if not record.out_of_use:
            return False
        health = gpu_health.uncordon(record.health, now_s=now_s, reason=reason, rules=self.rules)
        self._put(uuid, replace(record, health=health, must_leave=False))
        return True

    def advance(self, uuid: str, state: GpuState, *, now_s: float) -> bool:
        """Draining and drained, as the reconciler sees them. Raises IllegalTransition; False if unchanged."""
        record = self._records[uuid]
        health = gpu_health.move(record.health, state, now_s=now_s, rule="", reason="", rules=self.rules)
        self._put(uuid, replace(record, health=health))
        return health is not record.health

    def cordon_node(self, node_id: str, reason: str, *, must_leave: bool) -> bool:
        """As an operator asks; False if it was so already."""
        held = self._holds.get(node_id)
        if held is not None and (held.must_leave or not must_leave):
            return False
        self._holds[node_id] = NodeHold(reason, must_leave)
        return True

    def uncordon_node(self, node_id: str) -> bool:
        """As an operator asks; False if it was in use."""
        return self._holds.pop(node_id, None) is not None

    def forget_node(self, node_id: str) -> bool:
        """The node is gone for good: its GPUs are no longer there. Their health is kept, for the case that
        the machine comes back under another id. False if it was not known."""
        if self._nodes.pop(node_id, None) is None:
            return False
        self._holds.pop(node_id, None)
        self._by_node.pop(node_id, None)
        for uuid, record in [item for item in self._records.items() if item[1].node_id == node_id]:
            self._drop(uuid)
            if record.health.state is not GpuState.HEALTHY:
                self._waiting[uuid] = (record.health, record.must_leave)
        while len(self._waiting) > REMEMBERED:
            del self._waiting[next(iter(self._waiting))]
        return True

    # --- over a restart ----------------------------------------------------------------------------------

    def kept(self) -> tuple[dict[str, tuple[GpuHealth, bool]], dict[str, NodeHold]]:
        """What has to survive a restart: GPUs that are not simply healthy, and nodes out of use."""
        gpus = dict(self._waiting)
        for uuid, record in self._eventful.items():
            gpus[uuid] = (record.health, record.must_leave)
        return gpus, dict(self._holds)

    def restore(
        self,
        gpus: Iterable[tuple[GpuHealth, bool]],
        holds: Mapping[str, NodeHold],
        *,
        counted: bool = False,
    ) -> None:
        """What :meth:`kept` said before; it applies to each GPU when it is seen. ``counted``: some GPU
        was reported before."""
        self._counted = self._counted or counted
        self._waiting.update({health.uuid: (health, leave) for health, leave in gpus})
        self._holds.update(holds)


def _readable(sample: GpuSample) -> bool:
    return sample.condition is not GpuCondition.UNREADABLE
