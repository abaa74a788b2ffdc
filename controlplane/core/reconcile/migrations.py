"""What is under way: replicas that leave their place, engines that are restarted, tiers that are held.

Times are the controller's monotonic clock. A move's life is a transition table as an endpoint's is
(:mod:`controlplane.core.domain.endpoint`): an illegal step raises and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from controlplane.errors import IllegalTransition

CONTROLLER = "controller"
OPERATOR = "operator"
"""Who wants something."""


class MigrationPhase(StrEnum):
    """How far a move is."""

    ELSEWHERE_FIRST = "starting elsewhere first"
    """The tier's target is one higher; the old replica serves until the new one is ready."""
    RETIRING = "retiring"
    """The old replica is told to drain and end."""
    SETTLING = "settling"
    """The old replica is gone. It stays listed as leaving until Serve has certainly seen that, or Serve would
    end one of those that serve (:mod:`controlplane.core.reconcile.replica_targets`)."""


_P = MigrationPhase

STEPS: Mapping[MigrationPhase, frozenset[MigrationPhase]] = MappingProxyType(
    {
        _P.ELSEWHERE_FIRST: frozenset({_P.RETIRING, _P.SETTLING}),
        _P.RETIRING: frozenset({_P.SETTLING}),
        _P.SETTLING: frozenset(),
    }
)
"""From each phase, where a move may go. Staying is always allowed."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One replica that leaves its place; another one takes over."""

    endpoint_id: str
    tier: str
    phase: MigrationPhase
    reason: str
    """Why it leaves."""
    since_s: float
    """When the phase was entered."""
    began_s: float
    surged: bool = False
    """It began with another one starting elsewhere."""
    note: str = ""
    """Why it is in this phase."""


def step(move: Migration, phase: MigrationPhase, *, now_s: float, note: str) -> Migration:
    """The move in ``phase``; staying keeps the time. Raises IllegalTransition."""
    if phase is move.phase:
        return move
    if phase not in STEPS[move.phase]:
        raise IllegalTransition(f"a move that is {move.phase} can't become {phase}")
    return replace(move, phase=phase, since_s=now_s, note=note)


@dataclass(frozen=True, slots=True)
class Restart:
    """An engine process that is to be replaced in its place."""

    endpoint_id: str
    tier: str
    generation: int
    """The process that is meant: a newer one ends it."""
    reason: str
    since_s: float
    """When it was asked for, or issued."""
    issued: bool = False
    """The replica is told; until then it waits for its turn in the tier."""


@dataclass(frozen=True, slots=True)
class TierHold:
    """Nothing of the tier is started."""

    reason: str
    since_s: float
    by: str = OPERATOR
    until_s: float | None = None
    """When it is tried again; None: when an operator says so."""
    must_leave: bool = False
    """What runs is retired."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What the controller is at, for people."""

    moves: tuple[Migration, ...]
    restarts: tuple[Restart, ...]
    holds: tuple[tuple[str, TierHold], ...]
    """By tier."""
    drains: tuple[tuple[str, str], ...]
    """Endpoint ids that are to leave, and why."""
    settled: bool
    """False: it has just started, and does nothing until everybody has been heard again."""
    store_warning: str
    """Why its memory would not survive a restart; empty: it would."""
    tick_s: float
    """How long its last look at everything took."""
