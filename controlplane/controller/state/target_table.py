"""How many replicas each tier should have: the published targets, and when Serve fetched them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import ENDED, Endpoint
from controlplane.core.reconcile.in_progress import InProgress
from controlplane.core.reconcile.replica_targets import TierTarget

SERVE_SILENT_S: Final = 5.0
"""If Serve has not fetched targets for this long, it counts as down."""


class TargetTable:
    """Published targets by tier, and when Serve fetched targets."""

    def __init__(self, now_s: Callable[[], float], unix_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._unix_s = unix_s
        self._published: dict[str, TierTarget] = {}
        self.published: Final = MappingProxyType(self._published)
        """The last published target of each tier."""
        self._fetched_s = self._fetched_before_s = -math.inf
        """When Serve fetched targets last, and the time before that."""
        self.apply_scaling = False
        """Whether tiers that may scale follow the published targets. Such a tier keeps its replicas until
        there is a target."""

    def publish(self, targets: Mapping[str, TierTarget]) -> None:
        """Set how many replicas these tiers should have; migrations and holds are added on top."""
        self._published.update(targets)

    def unpublish(self, tiers: Iterable[str]) -> None:
        """Withdraw the targets of these tiers: each gets its configured replicas, or stays as it is if it
        scales."""
        for tier in tiers:
            self._published.pop(tier, None)

    def base(self, spec: TierSpec, endpoints: Mapping[str, Endpoint], in_progress: InProgress) -> int:
        """The tier's replicas when nothing migrates: the published target while it is valid, or the
        configured number. A tier that scales never shrinks because it has no target."""
        published = self._published.get(spec.name)
        scales = self.apply_scaling and spec.scaling is not None and spec.scaling.autoscaled
        if published is not None and (scales or published.valid_until_unix_s > self._unix_s()):
            # What was stored, or decided under another configuration, never exceeds what is configured now.
            ceiling = published.replicas if spec.scaling is None else spec.scaling.ceiling
            return min(published.replicas, ceiling)
        if scales:
            living = sum(
                endpoint.tier == spec.name and endpoint.state not in ENDED for endpoint in endpoints.values()
            )
            return max(spec.replicas, living - in_progress.leaving_count(spec.name))
        return spec.replicas

    def fetched(self) -> None:
        """Record that Serve fetches targets now."""
        self._fetched_before_s, self._fetched_s = self._fetched_s, self._now_s()

    def serve_follows(self, since_s: float) -> bool:
        """Whether Serve has acted on a target that has been in force since ``since_s``: it has fetched
        targets twice since then (it acts before it fetches again), or it is down."""
        silent_s = self._now_s() - max(self._fetched_s, since_s)
        return self._fetched_before_s > since_s or silent_s > SERVE_SILENT_S
