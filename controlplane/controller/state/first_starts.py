"""Which tiers have served since the plane was started, and what snapshots say about the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from controlplane.core.cluster.snapshot import TierMode, TierNote
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import SERVING, Endpoint, EndpointState
from controlplane.core.json_values import StoredState
from controlplane.core.reconcile.migrations import CONTROLLER, TierHold

SCHEDULING_S: Final = 300.0
"""How long the first replica of a tier may take to report: Ray starts its process, and perhaps a node."""
_SERVED: Final = "served"
"""The key in a checkpoint."""


class FirstStarts:
    """A tier that has served once is down when nothing serves; before that it is starting, for as long as its
    engines may take to load."""

    def __init__(self) -> None:
        self._served: set[str] = set()
        self._wanted_since_s: dict[str, float] = {}
        """Tier → since when it should have replicas."""
        self._at_zero_s: dict[str, float] = {}
        self.at_zero: Final = MappingProxyType(self._at_zero_s)
        """Tier → since when its target has been 0."""

    def observe(self, targets: Mapping[str, int], endpoints: Mapping[str, Endpoint], now_s: float) -> None:
        """Take in the targets and endpoints of a tick."""
        self._served.update(item.tier for item in endpoints.values() if item.state in SERVING)
        for since_s, at_zero in ((self._wanted_since_s, False), (self._at_zero_s, True)):
            found = {tier for tier, target in targets.items() if (target == 0) is at_zero}
            for tier in since_s.keys() - found:
                del since_s[tier]
            for tier in found:
                since_s.setdefault(tier, now_s)

    def starting(
        self, specs: Iterable[TierSpec], endpoints: Mapping[str, Endpoint], now_s: float
    ) -> dict[str, float]:
        """Tier → since when it has been starting for the first time. A tier with a replica whose engine was
        lost or given up is not among them, nor one whose time to start is over."""
        states: dict[str, set[EndpointState]] = {}
        for endpoint in endpoints.values():
            states.setdefault(endpoint.tier, set()).add(endpoint.state)
        found = {}
        for spec in specs:
            since_s = self._wanted_since_s.get(spec.name, now_s)
            present = states.get(spec.name, set())
            limit_s = spec.start_limit_s if present else min(SCHEDULING_S, spec.start_limit_s)
            unserved = spec.name not in self._served and present <= {EndpointState.STARTING}
            if unserved and now_s - since_s < limit_s:
                found[spec.name] = since_s
        return found

    def checkpoint(self) -> dict[str, Any]:
        """What has to survive the controller's process: a tier that is down stays down for the next one."""
        return {_SERVED: sorted(self._served)} if self._served else {}

    def restore(self, stored: StoredState) -> None:
        """Restore a checkpoint."""
        self._served.update(stored.value(_SERVED, list[str]) or ())


def tier_notes(
    specs: Sequence[TierSpec],
    targets: Mapping[str, int],
    holds: Mapping[str, TierHold],
    starting: Mapping[str, float],
    at_zero: Mapping[str, float],
    shift_s: float,
) -> tuple[TierNote, ...]:
    """The tiers that are not simply on, each with the reason; ``shift_s`` is wall clock less monotonic
    clock."""
    notes = []
    for spec in specs:
        tier, hold = spec.name, holds.get(spec.name)
        if hold is not None:
            who = "the controller" if hold.by == CONTROLLER else "an operator"
            mode = TierMode.DRAINED if hold.must_leave else TierMode.HELD
            notes.append(TierNote(tier, mode, f"{mode} by {who}: {hold.reason}", hold.since_s + shift_s))
        elif targets.get(tier) == 0:
            wakes = spec.scaling is not None and spec.scaling.autoscaled
            reason = "scaled to zero: the next request starts a replica" if wakes else "set to 0 replicas"
            notes.append(TierNote(tier, TierMode.AT_ZERO, reason, at_zero.get(tier, 0.0) + shift_s))
        elif tier in starting:
            reason = (
                f"starts for the first time; an engine of kind {spec.engine} usually takes up to "
                f"{spec.expected_start_s:g} s"
            )
            notes.append(TierNote(tier, TierMode.STARTING, reason, starting[tier] + shift_s))
    return tuple(notes)
