"""A GPU's life cycle: healthy → suspect → cordoned → draining → drained → returned → healthy.

:func:`assess` takes a GPU's health and what was observed since, and returns its new health with the reason.
It cordons GPUs and lets them return; the reconciler drains them, through :func:`transition`.

* Without readings, a GPU's state gets neither worse nor better.
* A cordoned GPU returns after a hold time of good readings, if its fault can be recovered from in that way
  (:class:`~controlplane.core.gpus.xid.Recovery`). The hold time doubles with every cordoning within
  ``flap_memory_s``, so a GPU that fails repeatedly stays away longer each time.
* Overheating has hysteresis: it begins at the GPU's own slowdown temperature (or when the hardware throttles
  because of heat) and ends ``cool_margin_c`` below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from controlplane.core.gpus.findings import (
    GpuFinding,
    GpuRules,
    RecentEvents,
    Streak,
    findings_of,
    info_is_clear,
    is_hot,
)
from controlplane.core.gpus.xid import Recovery, XidSeverity
from controlplane.core.telemetry.samples import Absence, GpuCondition, GpuEvent, GpuSample, Missing, Reading
from controlplane.errors import IllegalTransition


class GpuState(StrEnum):
    """A GPU's state; the legal transitions are in :data:`TRANSITIONS`."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """What runs on it stays; takes new replicas only if there is no better GPU."""
    CORDONED = "cordoned"
    """Takes no new replicas; what runs on it has to leave."""
    DRAINING = "draining"
    """What runs on it is leaving."""
    DRAINED = "drained"
    """Nothing runs on it."""
    RETURNED = "returned"
    """Takes new replicas again, on probation."""


_S = GpuState

TRANSITIONS: Mapping[GpuState, frozenset[GpuState]] = MappingProxyType(
    {
        _S.HEALTHY: frozenset({_S.SUSPECT, _S.CORDONED}),
        _S.SUSPECT: frozenset({_S.HEALTHY, _S.CORDONED}),
        _S.CORDONED: frozenset({_S.DRAINING, _S.DRAINED, _S.RETURNED}),
        _S.DRAINING: frozenset({_S.DRAINED, _S.RETURNED}),
        _S.DRAINED: frozenset({_S.RETURNED}),
        _S.RETURNED: frozenset({_S.HEALTHY, _S.SUSPECT, _S.CORDONED}),
    }
)
"""From each state, the states that a GPU may enter next. Staying is always allowed."""

LAST_RESORT = frozenset({_S.SUSPECT})
"""States in which a GPU takes new replicas only if there is no better GPU."""
OUT_OF_USE = frozenset({_S.CORDONED, _S.DRAINING, _S.DRAINED})
"""States in which a GPU takes no new replicas."""

_RECOVERIES = (Recovery.CLEAR, Recovery.RESET, Recovery.OPERATOR)
"""From the easiest to the hardest."""
_NEVER_AVAILABLE = frozenset({Absence.NOT_SUPPORTED, Absence.NO_FUNCTION})
_MAX_CORDONS = 16
_OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """The health of one GPU, with its history. Times are the caller's monotonic clock."""

    uuid: str
    state: GpuState = GpuState.HEALTHY
    since_s: float = 0.0
    """When ``state`` was entered."""
    rule: str = ""
    """The rule that led to ``state``."""
    reason: str = ""
    recovery: Recovery = Recovery.CLEAR
    hold_s: float = 0.0
    """How long its readings must be good before it returns."""
    cordons_s: tuple[float, ...] = ()
    """When it was cordoned, within ``flap_memory_s``."""
    reset_seen: bool = False
    """Whether there was a reset since it was cordoned: its counters restarted, its node rebooted, or it was
    lost and came back."""
    was_lost: bool = False
    """Whether the last readable sample reported it as lost."""
    boot_id: str = ""
    """The boot id of its node, at the last sample."""
    ecc_uncorrected: int | None = None
    ecc_corrected: int | None = None
    """Error counters at the last sample; None before the first."""
    hot: Streak | None = None
    """Streak of readings that are too hot."""
    good: Streak | None = None
    """Streak of readings without a finding."""
    recent_events: RecentEvents = ()


@dataclass(frozen=True, slots=True)
class HealthDecision:
    """One decision about one GPU, including the decision to change nothing."""

    uuid: str
    before: GpuState
    after: GpuState
    rule: str
    reason: str

    @property
    def changed(self) -> bool:
        """Whether the GPU's state changed."""
        return self.before is not self.after


@dataclass(frozen=True, slots=True)
class HealthAssessment:
    """A GPU's health now, and why."""

    health: GpuHealth
    decision: HealthDecision
    findings: tuple[GpuFinding, ...] = ()


def check_transition(current: GpuState, new: GpuState) -> None:
    """Raises IllegalTransition unless a GPU in ``current`` may enter ``new``."""
    if new is not current and new not in TRANSITIONS[current]:
        raise IllegalTransition(f"a GPU that is {current} can't become {new}")


def transition(
    health: GpuHealth,
    state: GpuState,
    *,
    now_s: float,
    rule: str,
    reason: str,
    rules: GpuRules,
    recovery: Recovery = Recovery.CLEAR,
) -> GpuHealth:
    """The GPU in ``state``, entered at ``now_s``; unchanged if it is in that state already.

    Cordoning starts the hold time, which is longer for every cordoning within ``flap_memory_s``. Raises
    IllegalTransition.
    """
    check_transition(health.state, state)
    if state is health.state:
        return health
    after = replace(health, state=state, since_s=now_s, rule=rule, reason=reason)
    if state is GpuState.CORDONED:
        oldest_s = now_s - rules.flap_memory_s
        cordons_s = (*(at_s for at_s in health.cordons_s if at_s > oldest_s), now_s)[-_MAX_CORDONS:]
        hold_s = min(rules.hold_max_s, rules.hold_initial_s * 2 ** (len(cordons_s) - 1))
        return replace(
            after, recovery=recovery, hold_s=hold_s, cordons_s=cordons_s, reset_seen=False, good=None
        )
    if state is GpuState.RETURNED:
        return replace(
            after, recovery=Recovery.CLEAR, reset_seen=False, good=None, hot=None, recent_events=()
        )
    if state in (GpuState.DRAINING, GpuState.DRAINED):
        return replace(after, rule=health.rule, reason=health.reason)  # Still why it was cordoned.
    return after


def cordon(health: GpuHealth, *, now_s: float, reason: str, rules: GpuRules) -> GpuHealth:
    """An operator cordons the GPU: it returns only when an operator uncordons it."""
    if health.state in OUT_OF_USE:
        return replace(health, recovery=Recovery.OPERATOR)
    return transition(
        health,
        GpuState.CORDONED,
        now_s=now_s,
        rule=_OPERATOR,
        reason=reason,
        rules=rules,
        recovery=Recovery.OPERATOR,
    )


def uncordon(health: GpuHealth, *, now_s: float, reason: str, rules: GpuRules) -> GpuHealth:
    """An operator uncordons the GPU: it returns, on probation, and its past cordonings no longer count.

    Raises IllegalTransition if it is not out of use.
    """
    returned = transition(health, GpuState.RETURNED, now_s=now_s, rule=_OPERATOR, reason=reason, rules=rules)
    if returned is health:
        return health
    return replace(returned, cordons_s=())


def has_open_findings(health: GpuHealth) -> bool:
    """Whether the GPU is not healthy, or something observed earlier may still matter.

    With :func:`sample_changes_nothing`, it identifies GPUs for which :func:`assess` need not be called. That
    is the usual case, thousands of times a second. This part depends on the health alone, so callers can
    store its result.
    """
    return (
        health.state is not GpuState.HEALTHY
        or health.was_lost
        or health.hot is not None
        or bool(health.recent_events)
    )


def sample_changes_nothing(health: GpuHealth, sample: GpuSample, boot_id: str, rules: GpuRules) -> bool:
    """Whether :func:`assess` would certainly change nothing about a GPU without open findings.

    May be False even if :func:`assess` would change nothing.
    """
    if sample.condition is not GpuCondition.OK or (boot_id != health.boot_id and boot_id):
        return False
    uncorrected, corrected, temperature_c = sample.ecc_uncorrected, sample.ecc_corrected, sample.temperature_c
    return (
        (uncorrected == health.ecc_uncorrected or isinstance(uncorrected, Missing))
        and (corrected == health.ecc_corrected or isinstance(corrected, Missing))
        and info_is_clear(sample.info)
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
    """What a new sample and new events change about a GPU.

    ``sample`` is None if there is no new one. ``boot_id`` is that of the GPU's node.
    """
    readable = sample is not None and sample.condition is not GpuCondition.UNREADABLE
    findings, hot, recent_events = findings_of(
        sample if readable else None,
        events,
        ecc_uncorrected=health.ecc_uncorrected,
        ecc_corrected=health.ecc_corrected,
        hot=health.hot,
        recent_events=health.recent_events,
        now_s=now_s,
        rules=rules,
    )
    known = health
    if hot is not health.hot or recent_events != health.recent_events:
        known = replace(health, hot=hot, recent_events=recent_events)
    if readable and sample is not None:
        known = _with_counters(known, sample, boot_id)
    worst = max(findings, key=lambda finding: finding.severity, default=None)
    if worst is not None and worst.severity is not XidSeverity.NOTE:
        return _worse(replace(known, good=None), worst, findings, now_s, rules)
    if not readable or sample is None:
        why = sample.detail if sample is not None else "no new sample"
        return _stays(known, "no telemetry", f"nothing new is known about it: {why}", findings)
    lacking = _lacking(sample)
    if lacking:
        return _stays(known, "incomplete telemetry", f"too little is known about it: {lacking}", findings)
    if known.state is GpuState.HEALTHY:
        return _stays(known, "healthy", "no finding", findings)
    good = Streak.extend(known.good, now_s, rules.evidence_gap_s)
    return _better(replace(known, good=good), good.lasted_s, findings, now_s, rules)


def _worse(
    health: GpuHealth, worst: GpuFinding, findings: tuple[GpuFinding, ...], now_s: float, rules: GpuRules
) -> HealthAssessment:
    if health.state in OUT_OF_USE:
        harder = _RECOVERIES.index(worst.recovery) > _RECOVERIES.index(health.recovery)
        if worst.severity is XidSeverity.FATAL and harder:
            health = replace(health, recovery=worst.recovery, rule=worst.rule, reason=worst.reason)
        return _stays(health, worst.rule, worst.reason, findings)
    state = GpuState.CORDONED if worst.severity is XidSeverity.FATAL else GpuState.SUSPECT
    if state is health.state:
        health = replace(health, reason=worst.reason, rule=worst.rule)
        return _stays(health, worst.rule, worst.reason, findings)
    after = transition(
        health, state, now_s=now_s, rule=worst.rule, reason=worst.reason, rules=rules, recovery=worst.recovery
    )
    return _assessment(health.state, after, worst.rule, worst.reason, findings)


def _better(
    health: GpuHealth, good_s: float, findings: tuple[GpuFinding, ...], now_s: float, rules: GpuRules
) -> HealthAssessment:
    """The GPU after good readings for ``good_s``."""
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
    if good_s < needed_s:
        return _stays(health, "recovering", f"good readings for {good_s:.0f} of {needed_s:.0f} s", findings)
    reason = f"good readings for {good_s:.0f} s after: {health.reason}"
    after = transition(health, state, now_s=now_s, rule=rule, reason=reason, rules=rules)
    return _assessment(health.state, after, rule, reason, findings)


def _stays(health: GpuHealth, rule: str, reason: str, findings: tuple[GpuFinding, ...]) -> HealthAssessment:
    return _assessment(health.state, health, rule, reason, findings)


def _assessment(
    before: GpuState, health: GpuHealth, rule: str, reason: str, findings: tuple[GpuFinding, ...]
) -> HealthAssessment:
    decision = HealthDecision(uuid=health.uuid, before=before, after=health.state, rule=rule, reason=reason)
    return HealthAssessment(health, decision, findings)


def _with_counters(health: GpuHealth, sample: GpuSample, boot_id: str) -> GpuHealth:
    """Stores the sample's counters, and whether there was a reset: a counter fell, the node rebooted, or the
    GPU had fallen off the bus and responds again."""
    lost = sample.condition is GpuCondition.LOST
    uncorrected = _count(sample.ecc_uncorrected, health.ecc_uncorrected)
    corrected = _count(sample.ecc_corrected, health.ecc_corrected)
    unchanged = uncorrected == health.ecc_uncorrected and corrected == health.ecc_corrected
    if unchanged and lost is health.was_lost and boot_id in ("", health.boot_id):
        return health  # The usual case, thousands of times a second.
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


def _lacking(sample: GpuSample) -> str:
    """Why the sample can't show that the GPU is well; a reading that this GPU never has is not required."""
    for reading in (sample.memory_free_bytes, sample.temperature_c):
        if isinstance(reading, Missing) and reading.absence not in _NEVER_AVAILABLE:
            return reading.reason
    return ""


def _count(reading: Reading[int], before: int | None) -> int | None:
    return before if isinstance(reading, Missing) else reading


def _fell(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now < before
