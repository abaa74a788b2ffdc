"""What the controller tells the edges: orders to replicas, leave to start, answers to operators.

A replica gets its orders in the answer to every report for as long as they are not carried out: an order
that is repeated means nothing new, and one that is lost comes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReplicaCommandKind(StrEnum):
    """What a replica may be told to do."""

    RETIRE = "retire"
    """Drain, end the engine and then the replica itself; Serve replaces it as its target says."""
    RESTART = "restart"
    """End the engine process and start another one, in the same replica."""


@dataclass(frozen=True, slots=True)
class ReplicaCommand:
    """One thing that one replica is to do."""

    kind: ReplicaCommandKind
    endpoint_id: str
    reason: str
    generation: int = 0
    """RESTART: the engine process that is meant; a replica with a newer one has obeyed already."""


@dataclass(frozen=True, slots=True)
class ReportResponse:
    """The answer to an endpoint's report."""

    known: bool
    """False: it has to register, and to say again which GPUs it holds."""
    orders: tuple[ReplicaCommand, ...] = ()
    lease_known: bool = True
    """False: it says that it uses GPUs of which no lease is known; it has to claim them with
    ``restore_lease``."""


@dataclass(frozen=True, slots=True)
class StartPermission:
    """Whether an engine of a tier may be started now."""

    allowed: bool
    reason: str
    retry_after_s: float = 0.0
    """When to ask again; 0 if it is allowed."""


class ActionOutcome(StrEnum):
    """What became of an operator's wish."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """It was already so."""
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """There is nothing of that name, or it names several things."""


@dataclass(frozen=True, slots=True)
class ActionResponse:
    """What became of an operator's wish, and why."""

    outcome: ActionOutcome
    reason: str
    subjects: tuple[str, ...] = ()
    """What it concerns, by full id."""
