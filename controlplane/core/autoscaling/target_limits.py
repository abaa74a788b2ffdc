"""Turns the number of replicas that a tier needs into a target: bounds, hold time, cool-downs and steps."""

from __future__ import annotations

import math
from typing import Final

from controlplane.core.autoscaling.counterfactuals import SlidingMaximum
from controlplane.core.autoscaling.decision import TierObservation
from controlplane.core.autoscaling.rule import ScalingRule

WATCH_S: Final = 300.0
"""A tier is not scaled down until it has been observed for this long, unless ``hold_s`` is configured: a
controller that has just started knows little."""


class TargetLimits:
    """Limits one tier's target, and stores the history on which the limits depend."""

    def __init__(self) -> None:
        self._needed = SlidingMaximum()
        self._since_s: float | None = None
        """Start of the first observed interval."""
        self._scaled_up_s = -math.inf
        self._scaled_down_s = -math.inf
        self._before: tuple[float, int] | None = None
        """Time and target of the previous observation."""

    def watched_s(self, now_s: float) -> float:
        """How long the tier has been observed."""
        return 0.0 if self._since_s is None else now_s - self._since_s

    def observe(self, seen: TierObservation) -> None:
        """Record whether the target changed. Cool-downs run from changes that were carried out, by the policy
        or an operator, rather than from decisions."""
        if self._before is not None:
            at_s, target = self._before
            if seen.target > target:
                self._scaled_up_s = at_s
            elif seen.target < target:
                self._scaled_down_s = at_s
        self._before = seen.now_s, seen.target

    def target(
        self, rule: ScalingRule, seen: TierObservation, needed: int, reason: str, lowest: int, highest: int
    ) -> tuple[int, str]:
        """The target for ``needed`` replicas, and its reason. ``lowest`` and ``highest`` are the bounds that
        apply now."""
        bounded = min(max(needed, lowest), highest)
        if bounded != needed:
            reason = f"{reason}; the bounds are {lowest} to {highest}"
        if seen.target > highest:
            return highest, f"the bounds are {lowest} to {highest}"
        hold_s = rule.resolved_hold_s
        from_s = seen.now_s - hold_s
        self._needed.push(seen.now_s, bounded, from_s)
        held = int(self._needed.since(from_s))
        if self._since_s is None:
            self._since_s = seen.now_s - seen.interval_s
        if bounded > seen.target:
            return self._up(rule, seen, bounded, reason, urgent=seen.target < lowest)
        if seen.blind:
            return seen.target, f"no scale-down without fresh signals: {seen.blind}"
        watch_s = WATCH_S if rule.hold_s is None else hold_s
        watched_s = self.watched_s(seen.now_s)
        if held < seen.target and watched_s < watch_s:
            return seen.target, f"{reason}; this tier was watched for only {watched_s:.0f} s"
        if held < seen.target:
            return self._down(rule, seen, held, reason)
        if bounded < seen.target:
            reason = f"{reason}; the last {hold_s:.0f} s asked for {held}"
        return seen.target, reason

    def _up(
        self, rule: ScalingRule, seen: TierObservation, target: int, reason: str, *, urgent: bool
    ) -> tuple[int, str]:
        wait_s = self._scaled_up_s + rule.cool_down_up_s - seen.now_s
        if wait_s > 0 and not urgent:
            return seen.target, f"{reason}; the cool-down lasts another {wait_s:.0f} s"
        if rule.step_up is not None and target > seen.target + rule.step_up:
            target = seen.target + rule.step_up
            reason = f"{reason}; at most {rule.step_up} at once"
        return target, reason

    def _down(self, rule: ScalingRule, seen: TierObservation, target: int, reason: str) -> tuple[int, str]:
        wait_s = max(self._scaled_up_s, self._scaled_down_s) + rule.cool_down_down_s - seen.now_s
        if wait_s > 0:
            return seen.target, f"{reason}; the cool-down lasts another {wait_s:.0f} s"
        if rule.step_down is not None and target < seen.target - rule.step_down:
            target = seen.target - rule.step_down
            reason = f"{reason}; at most {rule.step_down} at once"
        return target, reason
