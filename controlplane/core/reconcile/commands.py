"""What the controller answers to replicas and operators: commands, permissions to start, results of actions.

A replica gets its commands with the response to every report until they are carried out. So a repeated
command means nothing new, and a lost one is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReplicaCommandKind(StrEnum):
    """What a replica can be told to do."""

    RETIRE = "retire"
    """Drain, end the engine, then the replica itself. Serve starts another one if its target says so."""
    RESTART = "restart"
    """End the engine process and start another one in the same replica."""


@dataclass(frozen=True, slots=True)
class ReplicaCommand:
    """One command to one replica."""

    kind: ReplicaCommandKind
    endpoint_id: str
    reason: str
    generation: int = 0
    """RESTART: the engine process to replace. A replica with a newer one has carried out the command."""


@dataclass(frozen=True, slots=True)
class ReportResponse:
    """The response to an endpoint's report."""

    known: bool
    """False if the endpoint has to register, and to say again which GPUs it holds."""
    commands: tuple[ReplicaCommand, ...] = ()
    lease_known: bool = True
    """False if the endpoint reports GPUs for which there is no lease; it has to claim them with
    ``restore_lease``."""


@dataclass(frozen=True, slots=True)
class StartPermission:
    """Whether an engine of a tier may be started now."""

    allowed: bool
    reason: str
    retry_after_s: float = 0.0
    """When to ask again; 0 if it is allowed."""


class ActionOutcome(StrEnum):
    """The outcome of an operator's action."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """It was in that state already."""
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """Nothing has that name, or several things do."""


@dataclass(frozen=True, slots=True)
class ActionResponse:
    """The outcome of an operator's action, and why."""

    outcome: ActionOutcome
    reason: str
    subjects: tuple[str, ...] = ()
    """Full ids of what the action applies to."""
