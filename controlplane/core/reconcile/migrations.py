"""The controller's operations on running replicas: migrations, engine restarts, and holds of tiers.

Times are the controller's monotonic clock. A migration's life cycle is a transition table, like an endpoint's
(:mod:`controlplane.core.domain.endpoint`): an illegal transition raises and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from controlplane.errors import IllegalTransition

CONTROLLER = "controller"
OPERATOR = "operator"
"""Who decided something."""


class MigrationPhase(StrEnum):
    """The phase of a migration; the legal transitions are in :data:`TRANSITIONS`."""

    STARTING_ELSEWHERE = "starting elsewhere first"
    """The tier's target is one higher, and the old replica serves until its replacement is ready."""
    RETIRING = "retiring"
    """The old replica has to drain and stop."""
    SETTLING = "settling"
    """The old replica has stopped. It stays listed as leaving until Serve has certainly noticed; otherwise
    Serve would stop a replica that serves (:mod:`controlplane.core.reconcile.replica_targets`)."""


_P = MigrationPhase

TRANSITIONS: Mapping[MigrationPhase, frozenset[MigrationPhase]] = MappingProxyType(
    {
        _P.STARTING_ELSEWHERE: frozenset({_P.RETIRING, _P.SETTLING}),
        _P.RETIRING: frozenset({_P.SETTLING}),
        _P.SETTLING: frozenset(),
    }
)
"""From each phase, the phases that a migration may enter next. Staying is always allowed."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One replica that leaves its GPUs, while another one takes over."""

    endpoint_id: str
    tier: str
    phase: MigrationPhase
    reason: str
    """Why it leaves."""
    since_s: float
    """When ``phase`` was entered."""
    began_s: float
    surged: bool = False
    """Whether it began with a replacement starting elsewhere."""
    note: str = ""
    """Why it is in this phase."""


def check_transition(current: MigrationPhase, new: MigrationPhase) -> None:
    """Raises IllegalTransition unless a migration in ``current`` may enter ``new``."""
    if new is not current and new not in TRANSITIONS[current]:
        raise IllegalTransition(f"a migration that is {current} can't become {new}")


def transition(migration: Migration, phase: MigrationPhase, *, now_s: float, note: str) -> Migration:
    """The migration in ``phase``, entered at ``now_s``; unchanged if it is in that phase already.

    Raises IllegalTransition.
    """
    check_transition(migration.phase, phase)
    if phase is migration.phase:
        return migration
    return replace(migration, phase=phase, since_s=now_s, note=note)


@dataclass(frozen=True, slots=True)
class Restart:
    """An engine process that is to be replaced by a new one in the same replica."""

    endpoint_id: str
    tier: str
    generation: int
    """Generation of the process to replace; the restart is over once a newer one serves."""
    reason: str
    since_s: float
    """When it was requested, or issued."""
    issued: bool = False
    """Whether the command goes out to the replica. Before that, the restart waits until no other engine of
    the tier is restarting."""


@dataclass(frozen=True, slots=True)
class TierHold:
    """No replica of the tier is started."""

    reason: str
    since_s: float
    by: str = OPERATOR
    """:data:`CONTROLLER` or :data:`OPERATOR`."""
    until_s: float | None = None
    """When replicas may start again; None: only once an operator releases the tier."""
    must_leave: bool = False
    """Whether the running replicas are retired."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What the controller is doing, for display."""

    migrations: tuple[Migration, ...]
    restarts: tuple[Restart, ...]
    holds: tuple[tuple[str, TierHold], ...]
    """By tier."""
    drains: tuple[tuple[str, str], ...]
    """Endpoint ids that an operator drained, and why."""
    settled: bool
    """False while the controller has just started and waits for all replicas and gateways to report."""
    store_warning: str
    """Why the controller's state would not survive a restart; empty if it would."""
    tick_s: float
    """How long the last tick of the control loop took."""
