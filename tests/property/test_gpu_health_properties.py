"""Whatever is observed of a GPU, in whatever order: its state follows the table and the evidence."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.health import (
    OUT_OF_USE,
    TRANSITIONS,
    GpuHealth,
    GpuState,
    assess,
    has_open_findings,
    sample_changes_nothing,
)
from controlplane.core.gpus.xid import XIDS, XidSeverity
from controlplane.core.telemetry.samples import (
    Absence,
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    GpuInfo,
    GpuSample,
    Missing,
    RecoveryAction,
    RowRemaps,
)

RULES = GpuRules(hold_initial_s=5, hot_for_s=3, suspect_for_s=5, probation_s=5, evidence_gap_s=4)
missing = st.builds(Missing, st.sampled_from(Absence), st.just("for a reason"))
infos = st.builds(
    GpuInfo,
    uuid=st.just("GPU-a"),
    index=st.just(0),
    slowdown_c=missing | st.integers(0, 100),
    shutdown_c=missing | st.integers(0, 110),
    recovery_action=missing | st.sampled_from(RecoveryAction),
    row_remaps=missing | st.builds(RowRemaps, st.just(1), st.just(1), st.booleans(), st.booleans()),
)
samples = st.builds(
    GpuSample,
    info=infos | st.just(GpuInfo("GPU-a", 0)),
    condition=st.sampled_from(GpuCondition),
    detail=st.just("because"),
    memory_free_bytes=missing | st.integers(0, 100),
    temperature_c=missing | st.integers(0, 120),
    throttle=missing | st.sampled_from([(), ("hw_thermal",), ("idle",)]),
    ecc_corrected=missing | st.integers(0, 5000),
    ecc_uncorrected=missing | st.integers(0, 3),
)
events = st.builds(
    GpuEvent,
    node_id=st.just("n"),
    epoch=st.just("e"),
    seq=st.just(1),
    unix_s=st.just(0.0),
    kind=st.sampled_from(GpuEventKind),
    gpu_uuid=st.just("GPU-a"),
    code=st.sampled_from([*XIDS, 0, 12345]),
)
observations = st.tuples(
    st.none() | samples,
    st.lists(events, max_size=2),
    st.floats(0.1, 6),
    st.sampled_from(["", "boot-1", "boot-2"]),
)


def all_missing(sample: GpuSample) -> GpuSample:
    """The same GPU when nothing of it can be read; the driver still lists it."""
    nothing = Missing(Absence.ERROR, "nothing")
    readings: dict[str, Any] = {
        field.name: nothing
        for field in fields(GpuSample)
        if field.name not in ("info", "condition", "detail")
    }
    blank = GpuInfo(sample.info.uuid, sample.info.index)
    return replace(sample, info=blank, condition=GpuCondition.OK, **readings)


@settings(max_examples=300)
@given(st.lists(observations, max_size=40))
def test_every_life_keeps_to_the_table_and_to_the_evidence(
    seen: list[tuple[GpuSample | None, list[GpuEvent], float, str]],
) -> None:
    health, now_s = GpuHealth("GPU-a"), 0.0
    for sample, happened, wait_s, boot_id in seen:
        now_s += wait_s
        done = assess(health, sample, happened, now_s=now_s, rules=RULES, boot_id=boot_id)
        before, after = health.state, done.health.state
        assert (done.decision.before, done.decision.after) == (before, after)
        assert done.decision.reason
        assert after is before or after in TRANSITIONS[before]
        if after is not before and after in (GpuState.CORDONED, GpuState.SUSPECT):
            assert max(finding.severity for finding in done.findings) >= XidSeverity.WATCH
        if after is GpuState.CORDONED and before is not after:
            assert any(finding.severity is XidSeverity.FATAL for finding in done.findings)
            assert RULES.hold_initial_s <= done.health.hold_s <= RULES.hold_max_s
        if after is GpuState.RETURNED and before is not after:
            assert now_s - health.since_s >= health.hold_s
        assert len(done.health.recent_events) <= 64
        assert len(done.health.cordons_s) <= 16
        health = done.health


@given(st.lists(observations, max_size=15), st.lists(samples, min_size=1, max_size=30))
def test_missing_readings_change_nothing(
    seen: list[tuple[GpuSample | None, list[GpuEvent], float, str]], blind: list[GpuSample]
) -> None:
    """However long nothing can be read, a GPU gets neither worse nor better."""
    health, now_s = GpuHealth("GPU-a"), 0.0
    for sample, happened, wait_s, boot_id in seen:
        now_s += wait_s
        health = assess(health, sample, happened, now_s=now_s, rules=RULES, boot_id=boot_id).health
    for number, sample in enumerate(blind):
        now_s += 3
        unread = replace(all_missing(sample), condition=GpuCondition.UNREADABLE)
        nothing = [None, unread, all_missing(sample)][number % 3]
        done = assess(health, nothing, (), now_s=now_s, rules=RULES, boot_id="boot-1")
        assert not done.decision.changed
        assert done.findings == ()
        health = done.health


@given(st.lists(observations, min_size=1, max_size=15))
def test_a_repaired_gpu_is_used_again_unless_an_operator_has_to_decide(
    seen: list[tuple[GpuSample | None, list[GpuEvent], float, str]],
) -> None:
    """With good readings, a GPU ends up healthy or waiting for an operator."""
    health, now_s = GpuHealth("GPU-a"), 0.0
    for sample, happened, wait_s, boot_id in seen:
        now_s += wait_s
        health = assess(health, sample, happened, now_s=now_s, rules=RULES, boot_id=boot_id).health
    good = GpuSample(
        GpuInfo("GPU-a", 0, slowdown_c=87),
        GpuCondition.OK,
        memory_free_bytes=1,
        temperature_c=50,
        throttle=(),
        ecc_corrected=0,
        ecc_uncorrected=0,
    )
    lasting = RULES.hold_max_s if health.state in OUT_OF_USE else 30
    for number in range(int(lasting // 3) + 20):
        now_s += 3
        boot_id = "boot-3" if number else "boot-4"
        health = assess(health, good, (), now_s=now_s, rules=RULES, boot_id=boot_id).health
        if health.state is GpuState.HEALTHY:
            break
    assert health.state is GpuState.HEALTHY or health.recovery == "operator"


@settings(max_examples=150)
@given(st.lists(observations, max_size=10), samples, st.sampled_from(["", "boot-1", "boot-2"]))
def test_a_sample_that_need_not_be_assessed_changes_nothing(
    before: list[tuple[GpuSample | None, list[GpuEvent], float, str]], sample: GpuSample, boot_id: str
) -> None:
    health, now_s = GpuHealth("GPU-a"), 0.0
    for seen, reported, passed_s, boot in before:
        now_s += passed_s
        health = assess(health, seen, reported, now_s=now_s, rules=RULES, boot_id=boot).health
    if not has_open_findings(health) and sample_changes_nothing(health, sample, boot_id, RULES):
        assessment = assess(health, sample, [], now_s=now_s + 1, rules=RULES, boot_id=boot_id)
        assert assessment.health == health
        assert not assessment.decision.changed
        assert not assessment.findings
