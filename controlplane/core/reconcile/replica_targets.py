"""How many replicas of a tier Serve should run: the controller's target while it is valid, or the configured
number.

A migration consists of two targets in sequence: first one replica more, and once the additional one serves,
the original number with the old replica ``leaving``. While Serve still counts a leaving replica, the number
is higher by one. Otherwise it would fall before Serve has noticed that this replica stopped, and Serve would
stop another replica of its own choice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from controlplane.core.reconcile.migrations import CONTROLLER, Migration, MigrationPhase, TierHold


@dataclass(frozen=True, slots=True)
class TierTarget:
    """What the controller publishes for one tier."""

    replicas: int
    """Without those that are leaving."""
    reason: str
    valid_until_unix_s: float
    leaving: tuple[str, ...] = ()
    """Endpoint ids of replicas that are retiring or have just retired."""


@dataclass(frozen=True, slots=True)
class DesiredReplicas:
    """The number for Serve's autoscaler: a target plus the leaving replicas that Serve still counts."""

    replicas: int
    reason: str


def desired_replicas(
    target: TierTarget | None,
    unix_s: float,
    *,
    configured: int,
    running: Collection[str],
    present: int | None = None,
) -> DesiredReplicas:
    """The number for Serve at ``unix_s``.

    ``running`` are the endpoint ids of the replicas that Serve counts. ``present`` is Serve's current number.
    Pass it for a tier that scales, and until the controller's first targets have arrived: without a valid
    target, such a tier stays at that number. Any other tier goes to the ``configured`` number.
    """
    if target is None and present is not None:
        return DesiredReplicas(present, "unchanged: the controller has not published a target yet")
    if target is None:
        return DesiredReplicas(configured, "as configured")
    if unix_s > target.valid_until_unix_s:
        if present is not None:
            return DesiredReplicas(present, "unchanged: the controller's last target has expired")
        return DesiredReplicas(configured, "as configured: the controller's last target has expired")
    leaving = sum(endpoint_id in running for endpoint_id in target.leaving)
    if not leaving:
        return DesiredReplicas(target.replicas, target.reason)
    return DesiredReplicas(target.replicas + leaving, f"{target.reason}; {leaving} more until it has left")


def tier_target(
    tier: str,
    base: int,
    migrations: Iterable[Migration],
    hold: TierHold | None,
    *,
    serving: int,
    valid_until_unix_s: float,
) -> TierTarget:
    """How many replicas of ``tier`` Serve should run, and why.

    ``base`` is their number while nothing migrates, ``serving`` how many serve now. ``migrations`` may be
    those of all tiers.
    """
    migrating = [item for item in migrations if item.tier == tier]
    leaving = tuple(
        item.endpoint_id for item in migrating if item.phase is not MigrationPhase.STARTING_ELSEWHERE
    )
    if hold is not None and hold.must_leave:
        # All replicas leave, so Serve can't stop the wrong one and may get the number at once.
        return TierTarget(0, f"drained: {hold.reason}", valid_until_unix_s)
    if hold is not None and hold.by == CONTROLLER:
        return TierTarget(min(base, serving), f"held: {hold.reason}", valid_until_unix_s, leaving)
    reason = "base target; nothing migrates"
    if migrating:
        listed = "; ".join(f"{item.endpoint_id} ({item.phase}): {item.reason}" for item in migrating)
        reason = f"base target {base}, with migrations: {listed}"
    return TierTarget(base + len(migrating) - len(leaving), reason, valid_until_unix_s, leaving)
