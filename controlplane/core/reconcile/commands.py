"""The controller's responses to replicas and operators: commands, permissions to start, results of actions.

The response to every report of a replica contains the commands that it has not carried out yet. So a repeated
command is the same command, and a lost one is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReplicaCommandKind(StrEnum):
    """What the controller can command a replica to do."""

    RETIRE = "retire"
    """Drain, stop the engine, then exit. Serve starts another replica if its target requires one."""
    RESTART = "restart"
    """Stop the engine process and start a new one in the same replica."""


@dataclass(frozen=True, slots=True)
class ReplicaCommand:
    """One command to one replica."""

    kind: ReplicaCommandKind
    endpoint_id: str
    reason: str
    generation: int = 0
    """For RESTART: the engine process to replace. A replica with a newer one has carried out the command."""


@dataclass(frozen=True, slots=True)
class ReportResponse:
    """The response to an endpoint's report."""

    known: bool
    """False if the endpoint has to register again and report which GPUs it holds."""
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
    """When to repeat the request; 0 if it is allowed."""


class ActionOutcome(StrEnum):
    """The outcome of an operator's action."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """The subject was in that state already."""
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
