"""The inventory assesses only GPUs about which something changed, with the same result as assessing all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.gpus import health as gpu_health
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.health import OUT_OF_USE, GpuHealth, GpuState, HealthAssessment, assess
from controlplane.core.gpus.inventory import GpuInventory, GpuRecord
from controlplane.core.gpus.xid import XidSeverity
from controlplane.core.telemetry.gpu import GpuSignals
from controlplane.core.telemetry.samples import (
    Absence,
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    GpuSample,
    Missing,
    NodeSample,
    Reading,
)
from controlplane.core.telemetry.series import DEFAULT_LIMITS, Freshness, Signal, signal_of
from tests.support.samples import gpu_sample, node_sample

RULES = GpuRules(hold_initial_s=4, hot_for_s=3, suspect_for_s=4, probation_s=4, evidence_gap_s=6)
NODES = {"n1": ("g0", "g1", "g2"), "n2": ("g3", "")}
UUIDS = ("g0", "g1", "g2", "g3")
LIMITS = DEFAULT_LIMITS


@dataclass
class PlainSeries:
    """One GPU's readings, as they are defined: each by itself."""

    sample: GpuSample
    at_s: float
    last: dict[str, tuple[float, float]] = field(default_factory=dict)
    average: float = 0.0
    ratio_s: float = -math.inf

    def observe(self, sample: GpuSample, at_s: float) -> None:
        self.sample, self.at_s = sample, at_s
        for name, value in readings_of(sample).items():
            if not isinstance(value, Missing):
                self.last[name] = (at_s, value)
        ratio = sample.gpu_ratio
        if not isinstance(ratio, Missing):
            gap_s = at_s - self.ratio_s
            keep = 0.0 if gap_s > LIMITS.missing_after_s else math.exp2(-gap_s / LIMITS.half_life_s)
            self.average = keep * self.average + (1 - keep) * ratio
            self.ratio_s = at_s

    def signals(self, now_s: float) -> GpuSignals:
        found: dict[str, Signal] = {}
        for name, value in readings_of(self.sample).items():
            at_s, last = self.last.get(name, (None, None))
            why = value.reason if isinstance(value, Missing) else ""
            found[name] = signal_of(last, at_s, now_s, LIMITS, why)
        known = self.ratio_s > -math.inf
        ratio = self.sample.gpu_ratio
        why = ratio.reason if isinstance(ratio, Missing) else ""
        average = signal_of(
            self.average if known else None, self.ratio_s if known else None, now_s, LIMITS, why
        )
        return GpuSignals(gpu_ratio=average, **found)


def readings_of(sample: GpuSample) -> dict[str, Reading[float]]:
    used, total = sample.memory_used_bytes, sample.memory_total_bytes
    share: Reading[float]
    if isinstance(used, Missing):
        share = used
    elif isinstance(total, Missing):
        share = total
    else:
        share = used / total
    return {
        "memory_used_ratio": share,
        "temperature_c": sample.temperature_c,
        "power_w": sample.power_w,
    }


@dataclass
class PlainInventory:
    """Assesses every GPU at every sample, and computes every result from all GPUs."""

    records: dict[str, GpuRecord] = field(default_factory=dict)
    series: dict[str, dict[str, PlainSeries]] = field(default_factory=dict)
    readable: dict[str, GpuSample] = field(default_factory=dict)
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remembered: dict[str, tuple[GpuHealth, bool]] = field(default_factory=dict)

    def observe(self, sample: NodeSample, events: Sequence[GpuEvent], now_s: float) -> list[HealthAssessment]:
        node_id, changed = sample.node_id, []
        gpus = {gpu.info.uuid: gpu for gpu in sample.gpus if gpu.info.uuid}
        known = self.series.get(node_id, {})
        here = self.series[node_id] = {
            uuid: known.get(uuid, PlainSeries(gpu, now_s)) for uuid, gpu in gpus.items()
        }
        for uuid, gpu in gpus.items():
            here[uuid].observe(gpu, now_s)
        observations: list[tuple[str, GpuSample | None, str]] = []
        if tuple(gpus) != self.listed.get(node_id):
            gone: tuple[str, ...] = ()
            if gpus and not isinstance(sample.driver_version, Missing):
                gone = tuple(uuid for uuid in self.listed.get(node_id, ()) if uuid not in gpus)
            for uuid in gone:
                lost = GpuSample(self.readable[uuid].info, GpuCondition.LOST, "the driver no longer lists it")
                observations.append((uuid, lost, sample.boot_id))
            self.listed[node_id] = (*gpus, *gone)
        observations += [(uuid, gpu, sample.boot_id) for uuid, gpu in gpus.items()]
        for event in events:
            if event.gpu_uuid not in [uuid for uuid, _, _ in observations] and event.gpu_uuid in self.records:
                observations.append((event.gpu_uuid, None, ""))
        for uuid, gpu_or_none, boot_id in observations:
            mine = [event for event in events if event.gpu_uuid == uuid]
            changed += self.assess(node_id, uuid, gpu_or_none, mine, now_s, boot_id)
        return changed

    def assess(
        self,
        node_id: str,
        uuid: str,
        sample: GpuSample | None,
        events: list[GpuEvent],
        now_s: float,
        boot: str,
    ) -> list[HealthAssessment]:
        record = self.records.get(uuid)
        if record is None:
            health, leave = self.remembered.pop(uuid, (GpuHealth(uuid, since_s=now_s), False))
            record = GpuRecord(node_id, health, leave)
        seen = assess(record.health, sample, events, now_s=now_s, rules=RULES, boot_id=boot)
        if sample is not None and (
            sample.condition is not GpuCondition.UNREADABLE
            or self.readable.get(uuid, sample).condition is GpuCondition.UNREADABLE
        ):
            self.readable[uuid] = sample
        leave = seen.health.state in OUT_OF_USE and (
            record.must_leave
            or (seen.decision.changed and seen.decision.after is GpuState.CORDONED)
            or any(finding.severity is XidSeverity.FATAL for finding in seen.findings)
        )
        self.records[uuid] = GpuRecord(node_id, seen.health, leave)
        return [seen] if seen.decision.changed else []

    def remove_node(self, node_id: str) -> None:
        self.series.pop(node_id, None)
        self.listed.pop(node_id, None)
        for uuid, record in list(self.records.items()):
            if record.node_id != node_id:
                continue
            del self.records[uuid], self.readable[uuid]
            if record.health.state is not GpuState.HEALTHY:
                self.remembered[uuid] = (record.health, record.must_leave)


lost_reading = st.just(Missing(Absence.ERROR, "not now"))
changes = st.fixed_dictionaries(
    {},
    optional={
        "condition": st.sampled_from(GpuCondition),
        "gpu_ratio": lost_reading | st.floats(0, 1),
        "memory_used_bytes": lost_reading | st.integers(1, 9),
        "memory_free_bytes": lost_reading,
        "temperature_c": lost_reading | st.sampled_from([30, 89, 91]),
        "power_w": lost_reading | st.floats(0, 700),
        "ecc_corrected": lost_reading | st.sampled_from([0, 1, 2000]),
        "ecc_uncorrected": lost_reading | st.sampled_from([0, 1]),
    },
)
samples = st.tuples(
    st.just("sample"),
    st.sampled_from(list(NODES)),
    st.dictionaries(st.sampled_from(UUIDS), changes, max_size=2),
    st.lists(st.sampled_from([13, 48, 63, 79]), max_size=1),
    st.sets(st.sampled_from([*UUIDS, "all"]), max_size=1),
    st.sampled_from(["580", "580", "580", Missing(Absence.NO_DRIVER, "gone")]),
)
actions = st.tuples(
    st.sampled_from(["cordon", "uncordon", "draining", "drained", "remove"]), st.sampled_from(UUIDS)
)
histories = st.lists(st.tuples(st.floats(0.5, 8), st.one_of(samples, samples, samples, actions)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(histories)
def test_the_inventory_knows_what_assessing_every_gpu_would_show(
    steps: list[tuple[float, tuple[Any, ...]]],
) -> None:
    inventory, plain, now_s = GpuInventory(RULES), PlainInventory(), 0.0
    for seq, (passed_s, step) in enumerate(steps, start=1):
        now_s += passed_s
        if step[0] == "sample":
            sample, events = sample_of(step, seq, now_s)
            changed = inventory.observe(sample.node_id, sample, events, now_s=now_s)
            assert list(changed) == plain.observe(sample, events, now_s)
        else:
            act(inventory, plain, step, now_s)
        compare(inventory, plain, now_s)
        compare(inventory, plain, now_s + 10)


def sample_of(step: tuple[Any, ...], seq: int, now_s: float) -> tuple[NodeSample, list[GpuEvent]]:
    _, node_id, changed, codes, left_out, driver = step
    gpus = [
        gpu_sample(uuid, index, **changed.get(uuid, {}))
        for index, uuid in enumerate(NODES[node_id])
        if not left_out & {uuid, "all"}
    ]
    uuid = NODES[node_id][0]
    events = [GpuEvent(node_id, "a", seq, now_s, GpuEventKind.XID, uuid, code) for code in codes]
    return node_sample(node_id, seq, now_s, gpus, driver), events


def act(inventory: GpuInventory, plain: PlainInventory, step: tuple[Any, ...], now_s: float) -> None:
    kind, uuid = str(step[0]), str(step[1])
    if kind == "remove":
        node_id = next(node_id for node_id, uuids in NODES.items() if uuid in uuids)
        inventory.remove_node(node_id)
        plain.remove_node(node_id)
        return
    record = plain.records.get(uuid)
    if record is None:
        return
    health, leave = record.health, record.must_leave
    if kind == "cordon":
        inventory.cordon_gpu(uuid, "loud fan", must_leave=True, now_s=now_s)
        health, leave = gpu_health.cordon(health, now_s=now_s, reason="loud fan", rules=RULES), True
    elif kind == "uncordon" and record.out_of_use:
        inventory.uncordon_gpu(uuid, "loud fan", now_s=now_s)
        health, leave = gpu_health.uncordon(health, now_s=now_s, reason="loud fan", rules=RULES), False
    elif kind in gpu_health.TRANSITIONS[health.state]:
        state = GpuState(kind)
        inventory.advance(uuid, state, now_s=now_s)
        health = gpu_health.transition(health, state, now_s=now_s, rule="", reason="", rules=RULES)
    plain.records[uuid] = GpuRecord(record.node_id, health, leave)


def compare(inventory: GpuInventory, plain: PlainInventory, now_s: float) -> None:
    assert dict(inventory.records) == plain.records
    assert inventory.out_of_use() == {
        uuid: record.node_id for uuid, record in plain.records.items() if record.out_of_use
    }
    stored, _ = inventory.state_to_store()
    assert stored == plain.remembered | {
        uuid: (record.health, record.must_leave)
        for uuid, record in plain.records.items()
        if record.health.state is not GpuState.HEALTHY or record.health.cordons_s
    }
    for uuid, record in plain.records.items():
        assert inventory.sample(uuid) == plain.readable[uuid]
        series = plain.series[record.node_id].get(uuid)
        signals = inventory.signals(uuid, now_s)
        if series is None:
            assert signals.power_w.freshness is Freshness.MISSING
        else:
            assert signals == series.signals(now_s)
