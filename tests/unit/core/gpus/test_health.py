from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from controlplane.core.gpus.findings import GpuRules, Streak
from controlplane.core.gpus.health import (
    LAST_RESORT,
    OUT_OF_USE,
    TRANSITIONS,
    GpuHealth,
    GpuState,
    HealthDecision,
    assess,
    check_transition,
    cordon,
    transition,
    uncordon,
)
from controlplane.core.gpus.xid import Recovery, XidSeverity, classify
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
from controlplane.errors import IllegalTransition

RULES = GpuRules()
S = GpuState
GONE = Missing(Absence.NO_DRIVER, "the driver is gone")
INFO = GpuInfo("GPU-a", 0, slowdown_c=87, shutdown_c=92, recovery_action=RecoveryAction.NONE)


def sample(info: GpuInfo = INFO, **readings: Any) -> GpuSample:
    healthy = GpuSample(
        info,
        GpuCondition.OK,
        memory_free_bytes=10,
        temperature_c=60,
        throttle=(),
        ecc_corrected=0,
        ecc_uncorrected=0,
    )
    return replace(healthy, **readings)


def unreadable() -> GpuSample:
    return GpuSample(INFO, GpuCondition.UNREADABLE, "the driver is gone", temperature_c=GONE)


def event(kind: GpuEventKind = GpuEventKind.XID, code: int = 0) -> GpuEvent:
    return GpuEvent("n", "e", 1, 0.0, kind, "GPU-a", code)


class Life:
    """A GPU that is assessed repeatedly; records every change of state."""

    def __init__(self, rules: GpuRules = RULES) -> None:
        self.rules = rules
        self.now_s = 0.0
        self.health = GpuHealth("GPU-a")
        self.changes: list[HealthDecision] = []

    def observe(
        self, seen: GpuSample | None, *events: GpuEvent, boot_id: str = "boot-1", wait_s: float = 1.0
    ) -> HealthDecision:
        self.now_s += wait_s
        done = assess(self.health, seen, events, now_s=self.now_s, rules=self.rules, boot_id=boot_id)
        self.health = done.health
        if done.decision.changed:
            self.changes.append(done.decision)
        assert done.decision.after is done.health.state
        assert done.decision.reason
        return done.decision

    def repeat(self, seen: GpuSample, for_s: float, *, boot_id: str = "boot-1", step_s: float = 1.0) -> None:
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.observe(seen, boot_id=boot_id, wait_s=step_s)

    @property
    def state(self) -> GpuState:
        return self.health.state


def test_every_transition_is_allowed_or_raises_and_changes_nothing() -> None:
    assert set(TRANSITIONS) == set(GpuState)
    assert set(GpuState) == {S.HEALTHY, S.RETURNED} | LAST_RESORT | OUT_OF_USE
    for current, new in product(GpuState, GpuState):
        health = GpuHealth("GPU-a", state=current, since_s=1.0, reason="before")
        if new is current:
            assert transition(health, new, now_s=9, rule="r", reason="x", rules=RULES) is health
        elif new in TRANSITIONS[current]:
            after = transition(health, new, now_s=9, rule="r", reason="x", rules=RULES)
            assert (after.state, after.since_s) == (new, 9)
        else:
            with pytest.raises(IllegalTransition, match=f"{current} can't become {new}"):
                transition(health, new, now_s=9, rule="r", reason="x", rules=RULES)
            with pytest.raises(IllegalTransition):
                check_transition(current, new)
            assert health == GpuHealth("GPU-a", state=current, since_s=1.0, reason="before")


@pytest.mark.parametrize(
    ("code", "severity"),
    [
        *[(code, XidSeverity.NOTE) for code in (8, 13, 31, 32, 43, 45, 68, 69, 137)],
        *[(code, XidSeverity.WATCH) for code in (63, 74, 92, 94, 109, 154, 9999)],
        *[(code, XidSeverity.FATAL) for code in (46, 48, 62, 64, 79, 95, 110, 119, 120, 136, 140, 143)],
    ],
)
def test_xids(code: int, severity: XidSeverity) -> None:
    assert classify(code).severity is severity
    life = Life()
    life.observe(sample())
    decision = life.observe(sample(), event(code=code))
    expected = {XidSeverity.NOTE: S.HEALTHY, XidSeverity.WATCH: S.SUSPECT, XidSeverity.FATAL: S.CORDONED}[
        severity
    ]
    assert life.state is expected
    assert decision.reason.startswith(f"XID {code}: ") is (severity is not XidSeverity.NOTE)


@pytest.mark.parametrize(
    ("seen", "state", "reason"),
    [
        (sample(), S.HEALTHY, "no finding"),
        (
            sample(condition=GpuCondition.LOST, detail="GPU is lost"),
            S.CORDONED,
            "the GPU is lost: GPU is lost",
        ),
        (sample(condition=GpuCondition.RESET_REQUIRED), S.CORDONED, "the GPU needs a reset: "),
        (sample(ecc_uncorrected=3), S.CORDONED, "3 new uncorrectable memory errors, 3 since the last reset"),
        (sample(ecc_corrected=5000), S.SUSPECT, "5000 new corrected memory errors"),
        (sample(ecc_corrected=999), S.HEALTHY, "no finding"),
        (sample(temperature_c=87), S.SUSPECT, "87 °C for 0 s, slowdown at 87 °C"),
        (sample(temperature_c=92), S.CORDONED, "92 °C for 0 s, slowdown at 87 °C, shutdown at 92 °C"),
        (sample(throttle=("hw_thermal",)), S.SUSPECT, "60 °C for 0 s, slowdown at 87 °C"),
        (sample(throttle=("sw_power_cap", "sw_thermal")), S.HEALTHY, "no finding"),
        (sample(replace(INFO, slowdown_c=GONE), temperature_c=89), S.HEALTHY, "no finding"),
        (
            sample(replace(INFO, slowdown_c=GONE), temperature_c=90),
            S.SUSPECT,
            "90 °C for 0 s, slowdown at 90 °C",
        ),
        (
            sample(replace(INFO, recovery_action=RecoveryAction.NODE_REBOOT)),
            S.CORDONED,
            "the driver asks for node_reboot",
        ),
        (
            sample(replace(INFO, recovery_action=RecoveryAction.DRAIN_P2P)),
            S.SUSPECT,
            "the driver asks for drain_p2p",
        ),
        (
            sample(replace(INFO, row_remaps=RowRemaps(4, 1, pending=False, failed=True))),
            S.CORDONED,
            "no spare memory row is left after 5 remaps",
        ),
        (
            sample(replace(INFO, row_remaps=RowRemaps(0, 1, pending=True, failed=False))),
            S.SUSPECT,
            "a memory row will be remapped at the next reset",
        ),
        (
            sample(replace(INFO, page_retirement_pending=True)),
            S.SUSPECT,
            "a memory page will be retired at the next reset",
        ),
        (unreadable(), S.HEALTHY, "nothing new is known about it: the driver is gone"),
        (None, S.HEALTHY, "nothing new is known about it: no new sample"),
        (sample(temperature_c=GONE), S.HEALTHY, "too little is known about it: the driver is gone"),
    ],
)
def test_what_one_sample_leads_to(seen: GpuSample | None, state: GpuState, reason: str) -> None:
    life = Life()
    life.observe(sample())
    assert life.observe(seen).reason == reason
    assert life.state is state


def test_errors_from_before_the_first_sample_are_not_new() -> None:
    life = Life()
    life.observe(sample(ecc_uncorrected=7, ecc_corrected=10**6))
    life.observe(sample(ecc_uncorrected=7, ecc_corrected=10**6))
    assert life.state is S.HEALTHY
    life.observe(sample(ecc_uncorrected=GONE))
    life.observe(sample(ecc_uncorrected=8, ecc_corrected=10**6))
    assert life.state is S.CORDONED


def test_ecc_events_and_loss_events_cordon_without_a_sample() -> None:
    for kind in (GpuEventKind.UNCORRECTED_ECC, GpuEventKind.LOST):
        life = Life()
        life.observe(None, event(kind))
        assert life.state is S.CORDONED


def test_heat_cordons_only_if_it_lasts() -> None:
    life = Life()
    life.observe(sample(temperature_c=88))
    life.repeat(sample(temperature_c=88), 29)
    assert life.state is S.SUSPECT
    life.observe(sample(temperature_c=88))
    assert life.state is S.CORDONED
    assert life.changes[-1].reason == "88 °C for 30 s, slowdown at 87 °C"


def test_missing_readings_do_not_make_heat_last() -> None:
    life = Life()
    life.observe(sample(temperature_c=88))
    life.repeat(sample(temperature_c=GONE), 60)
    assert life.state is S.SUSPECT
    life.observe(sample(temperature_c=88))
    assert life.state is S.SUSPECT, "what happened in between is unknown"
    assert life.health.hot == Streak(life.now_s, life.now_s)


def test_heat_has_a_hysteresis() -> None:
    life = Life()
    life.observe(sample(temperature_c=86))
    assert life.state is S.HEALTHY
    for _ in range(40):
        life.observe(sample(temperature_c=87))
        life.observe(sample(temperature_c=85))
    assert life.state is S.CORDONED, "a temperature that hovers around the limit is too hot"
    life.observe(sample(temperature_c=84))
    assert life.health.hot is None


def test_a_suspect_recovers_by_good_readings_only() -> None:
    life = Life()
    life.observe(sample(), event(code=94))
    assert life.state is S.SUSPECT
    for _ in range(400):
        life.observe(None)
        life.observe(unreadable())
    assert life.state is S.SUSPECT
    life.repeat(sample(), RULES.suspect_for_s - 5)
    assert life.state is S.SUSPECT
    life.repeat(sample(), 10)
    assert life.state is S.HEALTHY
    assert life.changes[-1].reason == "good readings for 300 s after: XID 94: contained memory error"


def test_repeated_events_of_severity_watch_cordon() -> None:
    life = Life()
    life.observe(sample(), event(code=74))
    life.observe(sample(), event(code=74))
    assert life.state is S.SUSPECT
    life.observe(sample(), event(code=94))
    assert life.state is S.CORDONED
    assert life.changes[-1].reason == "3 errors in 600 s: XID 74, XID 94"


def test_events_outside_the_watch_window_do_not_count() -> None:
    life = Life()
    for _ in range(5):
        life.observe(sample(), event(code=74), wait_s=301)
    assert life.state is S.SUSPECT


def test_many_application_errors_make_a_gpu_suspect_and_no_worse() -> None:
    life = Life()
    for _ in range(9):
        life.observe(sample(), event(code=31))
    assert life.state is S.HEALTHY
    for _ in range(90):
        life.observe(sample(), event(code=13))
    assert life.state is S.SUSPECT
    assert life.changes[-1].reason == "10 application errors in 600 s"


def test_a_lost_gpu_returns_after_its_hold_and_probation() -> None:
    life = Life()
    lost = sample(condition=GpuCondition.LOST, temperature_c=GONE, ecc_uncorrected=GONE)
    life.observe(lost)
    life.health = transition(life.health, S.DRAINING, now_s=life.now_s, rule="drain", reason="", rules=RULES)
    life.repeat(lost, 1000)
    life.health = transition(life.health, S.DRAINED, now_s=life.now_s, rule="drain", reason="", rules=RULES)
    assert life.health.reason == "the GPU is lost: no reason given"
    life.repeat(sample(), 100)
    assert life.observe(sample()).rule == "recovering"
    life.repeat(sample(), 30)
    assert life.state is S.RETURNED
    life.repeat(sample(), RULES.probation_s + 5)
    assert life.state is S.HEALTHY


@pytest.mark.parametrize("evidence", ["boot", "counter", "found"])
def test_a_fatal_xid_waits_for_a_reset(evidence: str) -> None:
    life = Life()
    life.observe(sample(ecc_corrected=5))
    life.observe(sample(ecc_corrected=5), event(code=79))
    life.repeat(sample(ecc_corrected=5), 5000, step_s=10)
    assert life.state is S.CORDONED
    assert life.observe(sample(ecc_corrected=5)).rule == "waits for a reset"
    if evidence == "found":
        life.observe(sample(condition=GpuCondition.LOST, temperature_c=GONE, ecc_corrected=GONE))
    after = sample(ecc_corrected=0 if evidence == "counter" else 5)
    life.repeat(after, RULES.hold_initial_s + 5, boot_id="boot-2" if evidence == "boot" else "boot-1")
    assert life.state is S.RETURNED


def test_a_worn_out_gpu_waits_for_an_operator() -> None:
    life = Life()
    life.observe(sample(replace(INFO, row_remaps=RowRemaps(4, 1, pending=False, failed=True))))
    life.repeat(sample(), 50_000, boot_id="boot-2", step_s=10)
    assert life.state is S.CORDONED
    life.health = uncordon(life.health, now_s=life.now_s, reason="replaced", rules=RULES)
    assert (life.state, life.health.cordons_s) == (S.RETURNED, ())


def test_the_worse_fault_decides_how_a_gpu_returns() -> None:
    life = Life()
    life.observe(sample(condition=GpuCondition.LOST))
    assert life.health.recovery is Recovery.CLEAR
    life.observe(sample(condition=GpuCondition.LOST), event(code=79))
    assert (life.health.recovery, life.health.reason) == (
        Recovery.RESET,
        "XID 79: GPU has fallen off the bus",
    )
    life.observe(sample(condition=GpuCondition.LOST))
    assert life.health.recovery is Recovery.RESET


def test_each_cordoning_lasts_longer() -> None:
    rules = replace(RULES, hold_initial_s=100, hold_max_s=1000)
    life = Life(rules)
    lost = sample(condition=GpuCondition.LOST)
    held: list[float] = []
    for _ in range(6):
        life.observe(lost)
        began_s = life.now_s
        while life.state in OUT_OF_USE:
            life.observe(sample())
        held.append(life.now_s - began_s)
    assert held == [101, 201, 401, 801, 1001, 1001]
    life.repeat(sample(), rules.flap_memory_s, step_s=10)
    life.observe(lost)
    assert life.health.hold_s == 100, "cordonings longer ago than flap_memory_s don't count"


def test_an_operator_decides() -> None:
    life = Life()
    life.health = cordon(life.health, now_s=5, reason="fan noise", rules=RULES)
    assert (life.state, life.health.reason, life.health.recovery) == (
        S.CORDONED,
        "fan noise",
        Recovery.OPERATOR,
    )
    assert cordon(life.health, now_s=6, reason="again", rules=RULES) == life.health
    life.repeat(sample(), 20_000, boot_id="boot-9", step_s=10)
    assert life.state is S.CORDONED
    life.health = uncordon(life.health, now_s=life.now_s, reason="fan replaced", rules=RULES)
    assert life.state is S.RETURNED
    with pytest.raises(IllegalTransition):
        uncordon(GpuHealth("GPU-b"), now_s=0, reason="", rules=RULES)
    life.observe(sample(condition=GpuCondition.LOST))
    life.health = cordon(life.health, now_s=life.now_s, reason="keep it out", rules=RULES)
    life.repeat(sample(), 5000)
    assert life.state is S.CORDONED
