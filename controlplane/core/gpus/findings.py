"""Finds what is wrong with a GPU: events and one sample → findings, each with the values it is based on.

A missing reading gives no finding.
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

_MAX_RECENT_EVENTS = 64
_HARDWARE_HEAT = "hw_thermal"
_APPLICATION = "application"


@dataclass(frozen=True, slots=True)
class GpuRules:
    """Thresholds and times."""

    fallback_slowdown_c: int = 90
    """The slowdown temperature of GPUs whose driver does not report it."""
    cool_margin_c: int = 3
    """A GPU that was too hot counts as hot until its temperature is this far below the limit."""
    hot_for_s: float = 30.0
    """A GPU that is too hot for this long is cordoned."""
    evidence_gap_s: float = 15.0
    """Two readings further apart than this do not belong to the same streak."""
    watch_window_s: float = 600.0
    watch_limit: int = 3
    """This many events of severity WATCH within ``watch_window_s`` cordon the GPU."""
    application_limit: int = 10
    """This many application errors within ``watch_window_s`` make the GPU itself suspect."""
    corrected_ecc_limit: int = 1000
    """This many corrected ECC errors between two samples make the GPU suspect."""
    suspect_for_s: float = 300.0
    """A suspect GPU is healthy again after good readings for this long."""
    probation_s: float = 600.0
    """A returned GPU is healthy again after good readings for this long."""
    hold_initial_s: float = 120.0
    """A cordoned GPU returns after good readings for this long. The time doubles with each cordoning within
    ``flap_memory_s``."""
    hold_max_s: float = 14_400.0
    flap_memory_s: float = 21_600.0


@dataclass(frozen=True, slots=True)
class Streak:
    """A condition that was observed repeatedly without a gap."""

    since_s: float
    last_s: float

    @property
    def lasted_s(self) -> float:
        """From the first observation to the last."""
        return self.last_s - self.since_s

    @staticmethod
    def extend(streak: Streak | None, now_s: float, gap_s: float) -> Streak:
        """The streak with an observation now; a new streak if the last observation is more than ``gap_s``
        old."""
        if streak is None or now_s - streak.last_s > gap_s or now_s < streak.last_s:
            return Streak(now_s, now_s)
        return Streak(streak.since_s, now_s)


@dataclass(frozen=True, slots=True)
class GpuFinding:
    """One problem of a GPU; the reason states the measured values."""

    rule: str
    severity: XidSeverity
    reason: str
    recovery: Recovery = Recovery.CLEAR


RecentEvents = tuple[tuple[float, str], ...]
"""Time and name of each event within the watch window that matters only when repeated."""


def findings_of(
    sample: GpuSample | None,
    events: Sequence[GpuEvent],
    *,
    ecc_uncorrected: int | None,
    ecc_corrected: int | None,
    hot: Streak | None,
    recent_events: RecentEvents,
    now_s: float,
    rules: GpuRules,
) -> tuple[tuple[GpuFinding, ...], Streak | None, RecentEvents]:
    """Everything that is wrong now, and the ``hot`` and ``recent_events`` to pass to the next call.

    ``ecc_uncorrected`` and ``ecc_corrected`` are the counters of the previous sample; None if there is none.
    """
    if recent_events and recent_events[0][0] < now_s - rules.watch_window_s:
        recent_events = tuple(event for event in recent_events if event[0] >= now_s - rules.watch_window_s)
    found: list[GpuFinding] = []
    for event in events:
        finding, name = _of_event(event)
        if name:
            recent_events = (*recent_events, (now_s, name))[-_MAX_RECENT_EVENTS:]
        if finding is not None:
            found.append(finding)
    if events:
        found += _of_repetition(recent_events, rules)
    if sample is not None:
        found += _of_condition(sample)
        found += _of_ecc(sample, ecc_uncorrected, ecc_corrected, rules)
        found += _of_worn_memory(sample)
        hot = _hot_streak(sample, hot, now_s, rules)
        if hot is not None and hot.last_s == now_s:
            found.append(_of_heat(sample, hot, rules))
    return tuple(found), hot, recent_events


def _of_event(event: GpuEvent) -> tuple[GpuFinding | None, str]:
    """The event's finding, and its name in :data:`RecentEvents` if it also matters when repeated."""
    if event.kind is GpuEventKind.XID:
        xid = classify(event.code)
        reason = f"XID {event.code}: {xid.meaning}"
        name = {XidSeverity.NOTE: _APPLICATION, XidSeverity.WATCH: f"XID {event.code}"}.get(xid.severity, "")
        return GpuFinding("xid", xid.severity, reason, xid.recovery), name
    if event.kind is GpuEventKind.UNCORRECTED_ECC:
        reason = "the driver reported an uncorrectable memory error"
        return GpuFinding("uncorrected_ecc", XidSeverity.FATAL, reason, Recovery.RESET), ""
    if event.kind is GpuEventKind.LOST:
        return _lost(event.detail), ""
    return None, ""


def _of_repetition(recent_events: RecentEvents, rules: GpuRules) -> list[GpuFinding]:
    """The findings of repeated events: several WATCH events are worse than one, and so many application
    errors that the applications no longer explain them."""
    application = sum(1 for _, name in recent_events if name == _APPLICATION)
    watched = len(recent_events) - application
    found = []
    if watched >= rules.watch_limit:
        kinds = ", ".join(sorted({name for _, name in recent_events if name != _APPLICATION}))
        reason = f"{watched} errors in {rules.watch_window_s:.0f} s: {kinds}"
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
    severity = XidSeverity.WATCH if action is RecoveryAction.DRAIN_P2P else XidSeverity.FATAL
    return [GpuFinding("recovery_action", severity, f"the driver asks for {action}")]


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
            reason = "a memory row will be remapped at the next reset"
            found.append(GpuFinding("row_remap_pending", XidSeverity.WATCH, reason))
    if sample.info.page_retirement_pending is True:
        reason = "a memory page will be retired at the next reset"
        found.append(GpuFinding("page_retirement_pending", XidSeverity.WATCH, reason))
    return found


def _slowdown_c(sample: GpuSample, rules: GpuRules) -> int:
    reported = sample.info.slowdown_c
    return rules.fallback_slowdown_c if isinstance(reported, Missing) or reported <= 0 else reported


def is_hot(sample: GpuSample, temperature_c: int, rules: GpuRules) -> bool:
    """Whether the GPU is at its slowdown temperature, or its hardware throttles because of heat."""
    throttle = sample.throttle
    if temperature_c >= _slowdown_c(sample, rules):
        return True
    return not isinstance(throttle, Missing) and _HARDWARE_HEAT in throttle


def info_is_clear(info: GpuInfo) -> bool:
    """Whether the facts in ``info`` give no finding."""
    action, remaps = info.recovery_action, info.row_remaps
    return (
        (isinstance(action, Missing) or action is RecoveryAction.NONE)
        and (isinstance(remaps, Missing) or not (remaps.failed or remaps.pending))
        and info.page_retirement_pending is not True
    )


def _hot_streak(sample: GpuSample, hot: Streak | None, now_s: float, rules: GpuRules) -> Streak | None:
    """The hot streak after this reading; a missing reading neither extends nor ends it."""
    temperature = sample.temperature_c
    if isinstance(temperature, Missing):
        return hot
    still_hot = hot is not None and temperature > _slowdown_c(sample, rules) - rules.cool_margin_c
    if still_hot or is_hot(sample, temperature, rules):
        return Streak.extend(hot, now_s, rules.evidence_gap_s)
    return None


def _of_heat(sample: GpuSample, hot: Streak, rules: GpuRules) -> GpuFinding:
    shutdown, temperature = sample.info.shutdown_c, sample.temperature_c
    limit_c = _slowdown_c(sample, rules)
    values = f"{temperature} °C for {hot.lasted_s:.0f} s, slowdown at {limit_c} °C"
    if (
        not isinstance(shutdown, Missing)
        and not isinstance(temperature, Missing)
        and 0 < shutdown <= temperature
    ):
        return GpuFinding("overheating", XidSeverity.FATAL, f"{values}, shutdown at {shutdown} °C")
    severity = XidSeverity.FATAL if hot.lasted_s >= rules.hot_for_s else XidSeverity.WATCH
    return GpuFinding("overheating", severity, values)
