"""A GPU's life: healthy → suspect → cordoned → draining → drained → returned → healthy.

:func:`assess` takes what is known of a GPU and what was seen of it, and answers with what is known now and
why. It cordons and lets return; draining is the reconciler's, by :func:`move`.

* What is missing decides nothing: without readings a GPU neither gets worse nor better.
* A GPU that was cordoned returns after a hold time of good readings, and only if what it was cordoned for
  can mend that way (:class:`~controlplane.core.gpus.xid.Recovery`). The hold time doubles with every
  cordoning within ``flap_memory_s``, so a GPU that comes and goes stays away longer each time.
* Overheating has a hysteresis: it begins at the GPU's own slowdown temperature (or when the hardware
  throttles for heat) and ends ``cool_margin_c`` below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from controlplane.core.gpus.findings import GpuFinding, GpuRules, Streak, findings_of, is_hot, nothing_found
from controlplane.core.gpus.xid import Recovery, XidSeverity
from controlplane.core.telemetry.samples import Absence, GpuCondition, GpuEvent, GpuSample, Missing, Reading
from controlplane.errors import IllegalTransition


class GpuState(StrEnum):
    """Where a GPU is in its life."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Keeps what runs on it; takes new work only if nothing better is left."""
    CORDONED = "cordoned"
    """Takes no new work; what runs on it has to leave."""
    DRAINING = "draining"
    """What runs on it is leaving."""
    DRAINED = "drained"
    """Nothing runs on it."""
    RETURNED = "returned"
    """Takes work again, on probation."""


_S = GpuState

MOVES: Mapping[GpuState, frozenset[GpuState]] = MappingProxyType(
    {
        _S.HEALTHY: frozenset({_S.SUSPECT, _S.CORDONED}),
        _S.SUSPECT: frozenset({_S.HEALTHY, _S.CORDONED}),
        _S.CORDONED: frozenset({_S.DRAINING, _S.DRAINED, _S.RETURNED}),
        _S.DRAINING: frozenset({_S.DRAINED, _S.RETURNED}),
        _S.DRAINED: frozenset({_S.RETURNED}),
        _S.RETURNED: frozenset({_S.HEALTHY, _S.SUSPECT, _S.CORDONED}),
    }
)
"""From each state, where a GPU may go. Staying is no move and always allowed."""

TAKES_NEW = frozenset({_S.HEALTHY, _S.RETURNED})
LAST_RESORT = frozenset({_S.SUSPECT})
OUT_OF_USE = frozenset({_S.CORDONED, _S.DRAINING, _S.DRAINED})

_RECOVERIES = (Recovery.CLEAR, Recovery.RESET, Recovery.OPERATOR)
_NEVER_THERE = frozenset({Absence.NOT_SUPPORTED, Absence.NO_FUNCTION})
_CORDONS_KEPT = 16
_OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What is known of one GPU. Times are the caller's monotonic clock."""

    uuid: str
    state: GpuState = GpuState.HEALTHY
    since_s: float = 0.0
    """When ``state`` was entered."""
    rule: str = ""
    """What put it there."""
    reason: str = ""
    recovery: Recovery = Recovery.CLEAR
    hold_s: float = 0.0
    """Good readings that it needs before it returns."""
    cordons_s: tuple[float, ...] = ()
    """When it was cordoned, inside the flap memory."""
    reset_seen: bool = False
    """Since it was cordoned, its counters started anew, its node rebooted, or it was lost and is back."""
    was_lost: bool = False
    """It was lost at the last look that said anything."""
    boot_id: str = ""
    ecc_uncorrected: int | None = None
    ecc_corrected: int | None = None
    """Counters at the last look; None before the first."""
    hot: Streak | None = None
    well: Streak | None = None
    """Readings without a finding, without a gap."""
    marks: tuple[tuple[float, str], ...] = ()
    """Passing findings of the watch window: when, and by which rule."""


@dataclass(frozen=True, slots=True)
class HealthDecision:
    """One decision about one GPU, «nothing to do» too."""

    uuid: str
    before: GpuState
    after: GpuState
    rule: str
    reason: str

    @property
    def moved(self) -> bool:
        """Whether it is more than an observation."""
        return self.before is not self.after


@dataclass(frozen=True, slots=True)
class HealthAssessment:
    """What is known now, and why."""

    health: GpuHealth
    verdict: HealthDecision
    findings: tuple[GpuFinding, ...] = ()


def check(current: GpuState, new: GpuState) -> None:
    """Raise IllegalTransition unless a GPU in ``current`` may become ``new``."""
    if new is not current and new not in MOVES[current]:
        raise IllegalTransition(f"a GPU that is {current} can't become {new}")


def move(
    health: GpuHealth,
    state: GpuState,
    *,
    now_s: float,
    rule: str,
    reason: str,
    rules: GpuRules,
    recovery: Recovery = Recovery.CLEAR,
) -> GpuHealth:
    """The GPU in ``state``, entered at ``now_s``; staying changes nothing. Raises IllegalTransition.

    Cordoning starts the hold time, longer for every cordoning that is still remembered.
    """
    check(health.state, state)
    if state is health.state:
        return health
    moved = replace(health, state=state, since_s=now_s, rule=rule, reason=reason)
    if state is GpuState.CORDONED:
        oldest_s = now_s - rules.flap_memory_s
        cordons_s = (*(at_s for at_s in health.cordons_s if at_s > oldest_s), now_s)[-_CORDONS_KEPT:]
        hold_s = min(rules.hold_max_s, rules.hold_initial_s * 2 ** (len(cordons_s) - 1))
        return replace(
            moved, recovery=recovery, hold_s=hold_s, cordons_s=cordons_s, reset_seen=False, well=None
        )
    if state is GpuState.RETURNED:
        return replace(moved, recovery=Recovery.CLEAR, reset_seen=False, well=None, hot=None, marks=())
    if state in (GpuState.DRAINING, GpuState.DRAINED):
        return replace(moved, rule=health.rule, reason=health.reason)  # what it was cordoned for stays
    return moved


def cordon(health: GpuHealth, *, now_s: float, reason: str, rules: GpuRules) -> GpuHealth:
    """As an operator asks: it stays away until an operator lets it return."""
    if health.state in OUT_OF_USE:
        return replace(health, recovery=Recovery.OPERATOR)
    return move(
        health,
        GpuState.CORDONED,
        now_s=now_s,
        rule=_OPERATOR,
        reason=reason,
        rules=rules,
        recovery=Recovery.OPERATOR,
    )


def uncordon(health: GpuHealth, *, now_s: float, reason: str, rules: GpuRules) -> GpuHealth:
    """As an operator asks: it takes work again, on probation, and its past cordonings are forgotten.

    Raises IllegalTransition if it is not out of use.
    """
    returned = move(health, GpuState.RETURNED, now_s=now_s, rule=_OPERATOR, reason=reason, rules=rules)
    if returned is health:
        return health
    return replace(returned, cordons_s=())


def unremarkable(health: GpuHealth, sample: GpuSample, boot_id: str, rules: GpuRules) -> bool:
    """Whether :func:`assess` would leave the GPU as it is: healthy before, and nothing in this sample.

    The usual case, thousands of times a second; it may say False where assessing changes nothing either, but
    never True where it would. Both halves can be asked apart: the first changes only with the health.
    """
    return calm(health) and nothing_new(health, sample, boot_id, rules)


def calm(health: GpuHealth) -> bool:
    """Whether the GPU is healthy, and nothing of its past is still watched."""
    return (
        health.state is GpuState.HEALTHY and not health.was_lost and health.hot is None and not health.marks
    )


def nothing_new(health: GpuHealth, sample: GpuSample, boot_id: str, rules: GpuRules) -> bool:
    """Whether the sample says what is known of a GPU that is :func:`calm`, and gives no finding."""
    if sample.condition is not GpuCondition.OK or (boot_id != health.boot_id and boot_id):
        return False
    uncorrected, corrected, temperature_c = sample.ecc_uncorrected, sample.ecc_corrected, sample.temperature_c
    return (
        (uncorrected == health.ecc_uncorrected or isinstance(uncorrected, Missing))
        and (corrected == health.ecc_corrected or isinstance(corrected, Missing))
        and nothing_found(sample.info)
        and (isinstance(temperature_c, Missing) or not is_hot(sample, temperature_c, rules))
    )


def assess(
    health: GpuHealth,
    sample: GpuSample | None,
    events: Sequence[GpuEvent],
    *,
    now_s: float,
    rules: GpuRules,
    boot_id: str = "",
) -> HealthAssessment:
    """What a new sample and new events of a GPU change.

    ``sample`` is None where there is none that was not assessed before; ``boot_id`` is its node's.
    """
    readable = sample is not None and sample.condition is not GpuCondition.UNREADABLE
    findings, hot, marks = findings_of(
        sample if readable else None,
        events,
        ecc_uncorrected=health.ecc_uncorrected,
        ecc_corrected=health.ecc_corrected,
        hot=health.hot,
        marks=health.marks,
        now_s=now_s,
        rules=rules,
    )
    known = health if hot is health.hot and marks == health.marks else replace(health, hot=hot, marks=marks)
    if readable and sample is not None:
        known = _remember(known, sample, boot_id)
    worst = max(findings, key=lambda finding: finding.level, default=None)
    if worst is not None and worst.level is not XidSeverity.NOTE:
        return _worse(replace(known, well=None), worst, findings, now_s, rules)
    if not readable or sample is None:
        why = sample.detail if sample is not None else "no new sample"
        return _stays(known, "no telemetry", f"nothing new is known of it: {why}", findings)
    gap = _gap(sample)
    if gap:
        return _stays(known, "incomplete telemetry", f"too little is known of it: {gap}", findings)
    if known.state is GpuState.HEALTHY:
        return _stays(known, "healthy", "no finding", findings)
    well = Streak.extend(known.well, now_s, rules.evidence_gap_s)
    return _better(replace(known, well=well), well.lasted_s, findings, now_s, rules)


def _worse(
    health: GpuHealth, worst: GpuFinding, findings: tuple[GpuFinding, ...], now_s: float, rules: GpuRules
) -> HealthAssessment:
    if health.state in OUT_OF_USE:
        if worst.level is XidSeverity.FATAL and _RECOVERIES.index(worst.recovery) > _RECOVERIES.index(
            health.recovery
        ):
            health = replace(health, recovery=worst.recovery, rule=worst.rule, reason=worst.reason)
        return _stays(health, worst.rule, worst.reason, findings)
    state = GpuState.CORDONED if worst.level is XidSeverity.FATAL else GpuState.SUSPECT
    if state is health.state:
        return _stays(
            replace(health, reason=worst.reason, rule=worst.rule), worst.rule, worst.reason, findings
        )
    after = move(
        health, state, now_s=now_s, rule=worst.rule, reason=worst.reason, rules=rules, recovery=worst.recovery
    )
    return HealthAssessment(
        after, HealthDecision(health.uuid, health.state, state, worst.rule, worst.reason), findings
    )


def _better(
    health: GpuHealth, well_s: float, findings: tuple[GpuFinding, ...], now_s: float, rules: GpuRules
) -> HealthAssessment:
    """Good readings for ``well_s``: how far do they take it?"""
    if health.state in OUT_OF_USE:
        if health.recovery is Recovery.OPERATOR:
            return _stays(health, "waits for an operator", health.reason, findings)
        if health.recovery is Recovery.RESET and not health.reset_seen:
            return _stays(health, "waits for a reset", health.reason, findings)
        needed_s, state, rule = health.hold_s, GpuState.RETURNED, "held long enough"
    elif health.state is GpuState.RETURNED:
        needed_s, state, rule = rules.probation_s, GpuState.HEALTHY, "probation over"
    else:
        needed_s, state, rule = rules.suspect_for_s, GpuState.HEALTHY, "no longer suspect"
    if well_s < needed_s:
        return _stays(health, "recovering", f"good readings for {well_s:.0f} of {needed_s:.0f} s", findings)
    reason = f"good readings for {well_s:.0f} s after: {health.reason}"
    after = move(health, state, now_s=now_s, rule=rule, reason=reason, rules=rules)
    return HealthAssessment(after, HealthDecision(health.uuid, health.state, state, rule, reason), findings)


def _stays(health: GpuHealth, rule: str, reason: str, findings: tuple[GpuFinding, ...]) -> HealthAssessment:
    return HealthAssessment(
        health, HealthDecision(health.uuid, health.state, health.state, rule, reason), findings
    )


def _remember(health: GpuHealth, sample: GpuSample, boot_id: str) -> GpuHealth:
    """Keeps the counters, and sees a reset in one that fell, in a new boot of the node, or in a GPU that
    fell off the bus and answers again."""
    lost = sample.condition is GpuCondition.LOST
    uncorrected = _count(sample.ecc_uncorrected, health.ecc_uncorrected)
    corrected = _count(sample.ecc_corrected, health.ecc_corrected)
    unchanged = uncorrected == health.ecc_uncorrected and corrected == health.ecc_corrected
    if unchanged and lost is health.was_lost and boot_id in ("", health.boot_id):
        return health  # the usual case, thousands of times a second
    reset = (
        _fell(health.ecc_uncorrected, uncorrected)
        or _fell(health.ecc_corrected, corrected)
        or bool(boot_id and health.boot_id and boot_id != health.boot_id)
        or (health.was_lost and sample.condition is GpuCondition.OK)
    )
    return replace(
        health,
        ecc_uncorrected=uncorrected,
        ecc_corrected=corrected,
        boot_id=boot_id or health.boot_id,
        was_lost=lost,
        reset_seen=health.reset_seen or (reset and health.state in OUT_OF_USE),
    )


def _gap(sample: GpuSample) -> str:
    """What a reading lacks to speak for the GPU; a figure that the GPU never has is no lack."""
    for reading in (sample.memory_free_bytes, sample.temperature_c):
        if isinstance(reading, Missing) and reading.absence not in _NEVER_THERE:
            return reading.reason
    return ""


def _count(reading: Reading[int], before: int | None) -> int | None:
    return before if isinstance(reading, Missing) else reading


def _fell(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now < before
