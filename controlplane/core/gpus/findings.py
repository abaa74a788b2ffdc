"""What is wrong with a GPU, by one look: events and readings → findings, each with its figures.

Readings that are missing give no finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.core.gpus.xid import Recovery, XidSeverity, classify
from controlplane.core.telemetry.samples import (
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    GpuInfo,
    GpuSample,
    Missing,
    RecoveryAction,
)

_MARKS_KEPT = 64
_HARDWARE_HEAT = "hw_thermal"


@dataclass(frozen=True, slots=True)
class GpuRules:
    """Thresholds and times."""

    fallback_slowdown_c: int = 90
    """For GPUs whose driver does not tell their slowdown temperature."""
    cool_margin_c: int = 3
    """Once too hot, a GPU counts as hot until it is this far below the limit."""
    hot_for_s: float = 30.0
    """A GPU that is too hot for this long is cordoned."""
    evidence_gap_s: float = 15.0
    """Two readings further apart than this do not belong to one spell."""
    watch_window_s: float = 600.0
    watch_limit: int = 3
    """Watched events in the window that cordon."""
    application_limit: int = 10
    """Application errors in the window that make the GPU itself suspect."""
    corrected_ecc_limit: int = 1000
    """Corrected ECC errors between two looks that make it suspect."""
    suspect_for_s: float = 300.0
    """A suspect with good readings for this long is healthy."""
    probation_s: float = 600.0
    hold_initial_s: float = 120.0
    hold_max_s: float = 14_400.0
    flap_memory_s: float = 21_600.0


@dataclass(frozen=True, slots=True)
class Streak:
    """Something that was seen again and again without a gap."""

    since_s: float
    last_s: float

    @property
    def lasted_s(self) -> float:
        """From the first time it was seen to the last."""
        return self.last_s - self.since_s

    @staticmethod
    def extend(spell: Streak | None, now_s: float, gap_s: float) -> Streak:
        """The spell with one more sighting, or a new one if the last is too long ago."""
        if spell is None or now_s - spell.last_s > gap_s or now_s < spell.last_s:
            return Streak(now_s, now_s)
        return Streak(spell.since_s, now_s)


@dataclass(frozen=True, slots=True)
class GpuFinding:
    """One thing wrong, with its figures in the reason."""

    rule: str
    level: XidSeverity
    reason: str
    recovery: Recovery = Recovery.CLEAR


Marks = tuple[tuple[float, str], ...]


def findings_of(
    sample: GpuSample | None,
    events: Sequence[GpuEvent],
    *,
    ecc_uncorrected: int | None,
    ecc_corrected: int | None,
    hot: Streak | None,
    marks: Marks,
    now_s: float,
    rules: GpuRules,
) -> tuple[tuple[GpuFinding, ...], Streak | None, Marks]:
    """Everything wrong at this look, and the heat spell and the marks to remember for the next.

    ``ecc_uncorrected`` and ``ecc_corrected`` are the counters at the look before (None: this is the first).
    """
    if marks and marks[0][0] < now_s - rules.watch_window_s:
        marks = tuple(mark for mark in marks if mark[0] >= now_s - rules.watch_window_s)
    found: list[GpuFinding] = []
    for event in events:
        finding, mark = _of_event(event)
        if mark:
            marks = (*marks, (now_s, mark))[-_MARKS_KEPT:]
        if finding is not None:
            found.append(finding)
    if events:
        found += _of_marks(marks, rules)
    if sample is not None:
        found += _of_condition(sample)
        found += _of_ecc(sample, ecc_uncorrected, ecc_corrected, rules)
        found += _of_worn_memory(sample)
        hot = _spell_of_heat(sample, hot, now_s, rules)
        if hot is not None and hot.last_s == now_s:
            found.append(_of_heat(sample, hot, rules))
    return tuple(found), hot, marks


def _of_event(event: GpuEvent) -> tuple[GpuFinding | None, str]:
    """The event's finding, and its mark if only many of them count."""
    if event.kind is GpuEventKind.XID:
        xid = classify(event.code)
        reason = f"XID {event.code}: {xid.meaning}"
        mark = {XidSeverity.NOTE: "application", XidSeverity.WATCH: f"XID {event.code}"}.get(xid.level, "")
        return GpuFinding("xid", xid.level, reason, xid.recovery), mark
    if event.kind is GpuEventKind.UNCORRECTED_ECC:
        reason = "the driver reported an uncorrectable memory error"
        return GpuFinding("uncorrected_ecc", XidSeverity.FATAL, reason, Recovery.RESET), ""
    if event.kind is GpuEventKind.LOST:
        return _lost(event.detail), ""
    return None, ""


def _of_marks(marks: Marks, rules: GpuRules) -> list[GpuFinding]:
    """A GPU on which watched events repeat is worse than one of them; and a flood of application errors
    is no longer the applications'."""
    application = sum(1 for _, mark in marks if mark == "application")
    watched = len(marks) - application
    found = []
    if watched >= rules.watch_limit:
        kinds = ", ".join(sorted({mark for _, mark in marks if mark != "application"}))
        reason = f"{watched} watched events in {rules.watch_window_s:.0f} s: {kinds}"
        found.append(GpuFinding("repeated", XidSeverity.FATAL, reason, Recovery.RESET))
    if application >= rules.application_limit:
        reason = f"{application} application errors in {rules.watch_window_s:.0f} s"
        found.append(GpuFinding("application_errors", XidSeverity.WATCH, reason))
    return found


def _lost(detail: str) -> GpuFinding:
    return GpuFinding("lost", XidSeverity.FATAL, f"the GPU is lost: {detail or 'no reason given'}")


def _of_condition(sample: GpuSample) -> list[GpuFinding]:
    if sample.condition is GpuCondition.LOST:
        return [_lost(sample.detail)]
    if sample.condition is GpuCondition.RESET_REQUIRED:
        return [GpuFinding("reset_required", XidSeverity.FATAL, f"the GPU needs a reset: {sample.detail}")]
    action = sample.info.recovery_action
    if isinstance(action, Missing) or action is RecoveryAction.NONE:
        return []
    level = XidSeverity.WATCH if action is RecoveryAction.DRAIN_P2P else XidSeverity.FATAL
    return [GpuFinding("recovery_action", level, f"the driver asks for {action}")]


def _of_ecc(
    sample: GpuSample, uncorrected: int | None, corrected: int | None, rules: GpuRules
) -> list[GpuFinding]:
    found = []
    now = sample.ecc_uncorrected
    if not isinstance(now, Missing) and uncorrected is not None and now > uncorrected:
        reason = f"{now - uncorrected} new uncorrectable memory errors, {now} since the last reset"
        found.append(GpuFinding("uncorrected_ecc", XidSeverity.FATAL, reason, Recovery.RESET))
    now = sample.ecc_corrected
    if not isinstance(now, Missing) and corrected is not None:
        new = now - corrected
        if new >= rules.corrected_ecc_limit:
            found.append(GpuFinding("corrected_ecc", XidSeverity.WATCH, f"{new} new corrected memory errors"))
    return found


def _of_worn_memory(sample: GpuSample) -> list[GpuFinding]:
    found = []
    remaps = sample.info.row_remaps
    if not isinstance(remaps, Missing):
        if remaps.failed:
            reason = f"no spare memory row is left after {remaps.uncorrected + remaps.corrected} remaps"
            found.append(GpuFinding("row_remap_failed", XidSeverity.FATAL, reason, Recovery.OPERATOR))
        elif remaps.pending:
            found.append(
                GpuFinding(
                    "row_remap_pending", XidSeverity.WATCH, "a memory row is remapped at the next reset"
                )
            )
    if sample.info.page_retirement_pending is True:
        found.append(
            GpuFinding(
                "page_retirement_pending", XidSeverity.WATCH, "a memory page is retired at the next reset"
            )
        )
    return found


def _slowdown_c(sample: GpuSample, rules: GpuRules) -> int:
    told = sample.info.slowdown_c
    return rules.fallback_slowdown_c if isinstance(told, Missing) or told <= 0 else told


def is_hot(sample: GpuSample, temperature_c: int, rules: GpuRules) -> bool:
    """Whether it is at its slowdown temperature, or the hardware throttles for heat."""
    told, throttle = sample.info.slowdown_c, sample.throttle
    limit_c = rules.fallback_slowdown_c if isinstance(told, Missing) or told <= 0 else told
    return temperature_c >= limit_c or (not isinstance(throttle, Missing) and _HARDWARE_HEAT in throttle)


def nothing_found(info: GpuInfo) -> bool:
    """Whether what changes rarely gives no finding."""
    action, remaps = info.recovery_action, info.row_remaps
    return (
        (isinstance(action, Missing) or action is RecoveryAction.NONE)
        and (isinstance(remaps, Missing) or not (remaps.failed or remaps.pending))
        and info.page_retirement_pending is not True
    )


def _spell_of_heat(sample: GpuSample, hot: Streak | None, now_s: float, rules: GpuRules) -> Streak | None:
    """The heat spell after this reading; a missing reading neither lengthens nor ends it."""
    temperature = sample.temperature_c
    if isinstance(temperature, Missing):
        return hot
    limit_c = _slowdown_c(sample, rules)
    if is_hot(sample, temperature, rules):
        return Streak.extend(hot, now_s, rules.evidence_gap_s)
    if hot is not None and temperature > limit_c - rules.cool_margin_c:
        return Streak.extend(hot, now_s, rules.evidence_gap_s)
    return None


def _of_heat(sample: GpuSample, hot: Streak, rules: GpuRules) -> GpuFinding:
    shutdown, temperature = sample.info.shutdown_c, sample.temperature_c
    limit_c = _slowdown_c(sample, rules)
    figures = f"{temperature} °C for {hot.lasted_s:.0f} s, slowdown at {limit_c} °C"
    if (
        not isinstance(shutdown, Missing)
        and not isinstance(temperature, Missing)
        and 0 < shutdown <= temperature
    ):
        return GpuFinding("overheating", XidSeverity.FATAL, f"{figures}, shutdown at {shutdown} °C")
    level = XidSeverity.FATAL if hot.lasted_s >= rules.hot_for_s else XidSeverity.WATCH
    return GpuFinding("overheating", level, figures)
