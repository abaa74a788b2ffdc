"""How many replicas Serve is to run of a tier: the controller's target while it is valid, or the configured
number.

A move is two targets one after the other: first one replica more than before, and once that serves, the
number as before with the old replica ``leaving``. A replica that leaves is counted on top for as long as
Serve counts it too. Serve could otherwise be told to run one less before it has seen that replica's end,
and would take one of its own choice instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from controlplane.core.reconcile.migrations import CONTROLLER, Migration, MigrationPhase, TierHold


@dataclass(frozen=True, slots=True)
class TierTarget:
    """What the controller publishes for one tier."""

    replicas: int
    """Without those that leave."""
    reason: str
    valid_until_unix_s: float
    """After that it says nothing any more."""
    leaving: tuple[str, ...] = ()
    """Endpoints that were told to leave."""


@dataclass(frozen=True, slots=True)
class DesiredReplicas:
    """What the policy answers."""

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
    """The number for Serve now; ``running`` are the endpoint ids of the replicas that Serve counts.
    ``present``, the number that Serve goes by, is for a tier that scales or whose target is not known yet:
    without a target that holds, it stays."""
    if target is None and present is not None:
        return DesiredReplicas(present, "as it is: the controller has said nothing yet")
    if target is None:
        return DesiredReplicas(configured, "as configured")
    if unix_s > target.valid_until_unix_s:
        if present is not None:
            return DesiredReplicas(present, "as it is: the controller's last target has run out")
        return DesiredReplicas(configured, "as configured: the controller's last target has run out")
    leaving = sum(endpoint_id in running for endpoint_id in target.leaving)
    if not leaving:
        return DesiredReplicas(target.replicas, target.reason)
    return DesiredReplicas(target.replicas + leaving, f"{target.reason}; {leaving} more until it has left")


def target_of(
    tier: str,
    base: int,
    moves: Iterable[Migration],
    hold: TierHold | None,
    *,
    serving: int,
    valid_until_unix_s: float,
) -> TierTarget:
    """How many replicas Serve is to keep, and why."""
    mine = [move for move in moves if move.tier == tier]
    leaving = tuple(move.endpoint_id for move in mine if move.phase is not MigrationPhase.ELSEWHERE_FIRST)
    first = [move for move in mine if move.phase is MigrationPhase.ELSEWHERE_FIRST]
    replicas, reason = base + len(first), "as asked for"
    if hold is not None and hold.must_leave:
        # All go, so Serve can't choose a wrong one: it is told at once.
        return TierTarget(0, f"drained: {hold.reason}", valid_until_unix_s)
    if hold is not None and hold.by == CONTROLLER:
        replicas, reason = min(base, serving), f"held: {hold.reason}"
    elif mine:
        words = "; ".join(f"{move.endpoint_id} moves, {move.phase}: {move.reason}" for move in mine)
        reason = f"{base} and what moves: {words}"
    return TierTarget(replicas, reason, valid_until_unix_s, leaving)
