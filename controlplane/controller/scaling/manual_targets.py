"""Replicas that an operator sets by hand: what can be set, for how long, and the events about it."""

from __future__ import annotations

from controlplane.controller.controller import Controller
from controlplane.controller.operator_actions import NO_REASON
from controlplane.core.autoscaling.overrides import Override, Overrides
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.core.reconcile.migrations import OPERATOR


class ManualTargets:
    """Overrides by tier. When one ends, its tier is left to the scaling policy."""

    def __init__(self, controller: Controller) -> None:
        self.overrides = Overrides()
        self._controller = controller

    def scale(self, name: str, replicas: int | None, for_s: float | None, reason: str) -> ActionResponse:
        """Set a tier's replicas, for ``for_s`` seconds or until it is ended; None ends it. An override wins
        over the policy; a drained or held tier has no replicas all the same."""
        controller = self._controller
        spec = next((item for item in controller.tiers if item.name == name), None)
        if spec is None:
            known = ", ".join(item.name for item in controller.tiers)
            return ActionResponse(ActionOutcome.UNKNOWN, f"there is no tier '{name}': there is {known}")
        if spec.scaling is None:
            return ActionResponse(
                ActionOutcome.REFUSED, f"tier {name}: it runs elsewhere, no replicas are here", (name,)
            )
        reason = reason or NO_REASON
        if replicas is None:
            if not self.overrides.end(name):
                return ActionResponse(ActionOutcome.UNCHANGED, "no number was set by hand", (name,))
            controller.unpublish([name])
            controller.note("scaling resumed", name, reason, name, actor=OPERATOR)
            return ActionResponse(ActionOutcome.DONE, f"tier {name}: no longer set by hand", (name,))
        if not 0 <= replicas <= spec.scaling.ceiling:
            setting = "tiers[].scaling.max_replicas"
            text = f"tier {name}: 0 to {spec.scaling.ceiling} replicas ({setting}), not {replicas}"
            return ActionResponse(ActionOutcome.REFUSED, text, (name,))
        until = None if for_s is None else controller.unix_s() + for_s
        if not self.overrides.set(name, Override(replicas, reason, until)):
            return ActionResponse(ActionOutcome.UNCHANGED, "it was so already", (name,))
        text = f"{replicas} replicas{'' if for_s is None else f' for {for_s:g} s'}"
        controller.note("scale", name, f"{text}: {reason}", name, actor=OPERATOR)
        return ActionResponse(ActionOutcome.DONE, f"tier {name}: {text}", (name,))

    def expire(self, unix_s: float) -> None:
        """End the overrides whose time is over."""
        for tier in self.overrides.expire(unix_s):
            self._controller.note("scaling resumed", tier, "the time of the number set by hand is over", tier)
            self._controller.unpublish([tier])
