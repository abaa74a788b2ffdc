"""The controller's work in progress: migrations, restarts, drained replicas and held tiers.

It changes through the commands of :mod:`controlplane.core.reconcile.reconcile` and through operators'
requests. Each command is checked again just before it is carried out; one that no longer applies changes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from controlplane.core.domain.endpoint import ENDED, Endpoint, EndpointState
from controlplane.core.reconcile.commands import ReplicaCommand, ReplicaCommandKind
from controlplane.core.reconcile.migrations import (
    CONTROLLER,
    Migration,
    MigrationPhase,
    Restart,
    TierHold,
    transition,
)
from controlplane.core.reconcile.reconcile import (
    AdvanceMigration,
    BeginMigration,
    BeginRestart,
    Command,
    EndMigration,
    EndRestart,
    HoldTier,
    IssueRestart,
    ReleaseTier,
    ReplicaFailure,
    SetGpu,
)
from controlplane.errors import IllegalTransition

_MAX_FAILURES = 20
"""Maximum number of failures remembered per tier."""
_MAX_STALL_RESTARTS = 16
"""Maximum number of restarts for stalling remembered per endpoint."""


@dataclass(frozen=True, slots=True)
class AppliedCommand:
    """A command that was carried out, for the audit log."""

    kind: str
    subject: str
    reason: str
    tier: str = ""


@dataclass(slots=True)
class InProgress:
    """All work in progress. Not safe for use by several threads."""

    migrations: dict[str, Migration] = field(default_factory=dict)
    """By endpoint id."""
    restarts: dict[str, Restart] = field(default_factory=dict)
    """By endpoint id."""
    drains: dict[str, str] = field(default_factory=dict)
    """Endpoint id → why an operator drained it."""
    holds: dict[str, TierHold] = field(default_factory=dict)
    """By tier."""
    failures: dict[str, tuple[ReplicaFailure, ...]] = field(default_factory=dict)
    """By tier, oldest first."""
    hold_history: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Tier → how many times in a row the controller held it, and when the last hold began."""
    stall_restarts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Endpoint id → when its engine was restarted for stalling."""

    def leaving_count(self, tier: str) -> int:
        """Replicas of the tier that are migrating."""
        return sum(migration.tier == tier for migration in self.migrations.values())

    def apply(
        self, command: Command, endpoints: Mapping[str, Endpoint], now_s: float
    ) -> AppliedCommand | None:
        """Carries out the command. None if it no longer applies; then nothing has changed."""
        match command:
            case BeginMigration():
                return self._begin_migration(command, endpoints, now_s)
            case AdvanceMigration():
                return self._advance_migration(command, now_s)
            case EndMigration():
                return self._end_migration(command)
            case BeginRestart():
                return self._begin_restart(command, endpoints, now_s)
            case IssueRestart():
                restart = self.restarts.get(command.endpoint_id)
                if restart is None or restart.issued:
                    return None
                self.restarts[command.endpoint_id] = replace(restart, issued=True, since_s=now_s)
                return AppliedCommand("restart", command.endpoint_id, restart.reason, restart.tier)
            case EndRestart():
                ended = self.restarts.pop(command.endpoint_id, None)
                if ended is None:
                    return None
                return AppliedCommand("restart over", command.endpoint_id, command.reason, ended.tier)
            case HoldTier():
                if command.tier in self.holds:
                    return None
                count = self.hold_history.get(command.tier, (0, now_s))[0] + 1
                self.hold_history[command.tier] = (count, now_s)
                self.holds[command.tier] = TierHold(command.reason, now_s, CONTROLLER, now_s + command.for_s)
                return AppliedCommand("held", command.tier, command.reason, command.tier)
            case ReleaseTier():
                if self.holds.pop(command.tier, None) is None:
                    return None
                self.failures.pop(command.tier, None)
                return AppliedCommand("released", command.tier, command.reason, command.tier)
            case SetGpu():
                return None  # GPUs' states are in the inventory.

    def _begin_migration(
        self, command: BeginMigration, endpoints: Mapping[str, Endpoint], now_s: float
    ) -> AppliedCommand | None:
        endpoint = endpoints.get(command.endpoint_id)
        if endpoint is None or endpoint.state in ENDED or command.endpoint_id in self.migrations:
            return None
        self.migrations[command.endpoint_id] = Migration(
            endpoint_id=command.endpoint_id,
            tier=command.tier,
            phase=command.phase,
            reason=command.reason,
            since_s=now_s,
            began_s=now_s,
            surged=command.phase is MigrationPhase.STARTING_ELSEWHERE,
            note=command.note,
        )
        self.restarts.pop(command.endpoint_id, None)
        reason = f"{command.reason}; {command.note}"
        return AppliedCommand(command.phase.value, command.endpoint_id, reason, command.tier)

    def _advance_migration(self, command: AdvanceMigration, now_s: float) -> AppliedCommand | None:
        migration = self._migration(command.endpoint_id, command.expected)
        if migration is None:
            return None
        try:
            after = transition(migration, command.phase, now_s=now_s, note=command.reason)
        except IllegalTransition:
            return None
        self.migrations[command.endpoint_id] = after
        return AppliedCommand(command.phase.value, command.endpoint_id, command.reason, migration.tier)

    def _end_migration(self, command: EndMigration) -> AppliedCommand | None:
        migration = self._migration(command.endpoint_id, command.expected)
        if migration is None:
            return None
        del self.migrations[command.endpoint_id]
        finished = migration.phase is MigrationPhase.SETTLING
        if finished:
            self.drains.pop(command.endpoint_id, None)
        kind = "moved" if finished else "move ended"
        return AppliedCommand(kind, command.endpoint_id, command.reason, migration.tier)

    def _begin_restart(
        self, command: BeginRestart, endpoints: Mapping[str, Endpoint], now_s: float
    ) -> AppliedCommand | None:
        endpoint = endpoints.get(command.endpoint_id)
        if endpoint is None or endpoint.generation != command.generation:
            return None
        if command.endpoint_id in self.restarts:
            return None
        self.request_restart(endpoint, command.reason, now_s, issued=True)
        times_s = (*self.stall_restarts.get(command.endpoint_id, ()), now_s)[-_MAX_STALL_RESTARTS:]
        self.stall_restarts[command.endpoint_id] = times_s
        return AppliedCommand("restart", command.endpoint_id, command.reason, command.tier)

    def _migration(self, endpoint_id: str, expected: MigrationPhase) -> Migration | None:
        migration = self.migrations.get(endpoint_id)
        return migration if migration is not None and migration.phase is expected else None

    # --- requests of operators ----------------------------------------------------------------------------

    def request_restart(self, endpoint: Endpoint, reason: str, now_s: float, *, issued: bool = False) -> bool:
        """Requests that the endpoint's current engine process is replaced; False if it was requested
        already."""
        known = self.restarts.get(endpoint.endpoint_id)
        if known is not None and known.generation == endpoint.generation:
            return False
        self.restarts[endpoint.endpoint_id] = Restart(
            endpoint_id=endpoint.endpoint_id,
            tier=endpoint.tier,
            generation=endpoint.generation,
            reason=reason,
            since_s=now_s,
            issued=issued,
        )
        return True

    def request_drain(self, endpoint_id: str, reason: str) -> bool:
        """Requests that the replica leaves its GPUs; False if that was requested already or it is
        migrating."""
        if endpoint_id in self.drains or endpoint_id in self.migrations:
            return False
        self.drains[endpoint_id] = reason
        return True

    def hold(self, tier: str, reason: str, now_s: float, *, must_leave: bool) -> bool:
        """An operator holds the tier; False if such a hold is in effect already."""
        known = self.holds.get(tier)
        if known is not None and known.by != CONTROLLER and (known.must_leave or not must_leave):
            return False
        self.holds[tier] = TierHold(reason, now_s, must_leave=must_leave)
        return True

    def release(self, tier: str) -> bool:
        """An operator releases the tier, and its failures no longer count; False if it was not held."""
        self.failures.pop(tier, None)
        self.hold_history.pop(tier, None)
        return self.holds.pop(tier, None) is not None

    # --- observations --------------------------------------------------------------------------------------

    def record_failure(self, endpoint: Endpoint, now_s: float) -> None:
        """Records that the endpoint's supervisor gave up."""
        failure = ReplicaFailure(now_s, endpoint.endpoint_id, endpoint.diagnosis)
        self.failures[endpoint.tier] = (*self.failures.get(endpoint.tier, ()), failure)[-_MAX_FAILURES:]

    def prune(self, endpoints: Mapping[str, Endpoint], now_s: float, memory_s: float) -> None:
        """Drops records of replicas that are gone, and of failures and holds older than ``memory_s``."""
        for endpoint_id in self.drains.keys() - endpoints.keys() - self.migrations.keys():
            del self.drains[endpoint_id]
        for endpoint_id in self.stall_restarts.keys() - endpoints.keys():
            del self.stall_restarts[endpoint_id]
        for tier, failures in list(self.failures.items()):
            recent = tuple(item for item in failures if now_s - item.at_s < memory_s)
            if recent != failures:
                if recent:
                    self.failures[tier] = recent
                else:
                    del self.failures[tier]
        for tier, (_, held_s) in list(self.hold_history.items()):
            if tier not in self.holds and now_s - held_s >= memory_s:
                del self.hold_history[tier]

    # --- for replicas and the reconciler ------------------------------------------------------------------

    def commands_for(self, endpoint: Endpoint) -> tuple[ReplicaCommand, ...]:
        """The commands for the replica now."""
        migration = self.migrations.get(endpoint.endpoint_id)
        if migration is not None and migration.phase is MigrationPhase.RETIRING:
            return (ReplicaCommand(ReplicaCommandKind.RETIRE, endpoint.endpoint_id, migration.reason),)
        restart = self.restarts.get(endpoint.endpoint_id)
        if (
            restart is not None
            and restart.issued
            and endpoint.generation <= restart.generation
            and endpoint.state is not EndpointState.DRAINING
        ):
            command = ReplicaCommand(
                ReplicaCommandKind.RESTART, endpoint.endpoint_id, restart.reason, restart.generation
            )
            return (command,)
        return ()

    def leaving(
        self,
        endpoints: Mapping[str, Endpoint],
        gpus_out_of_use: Mapping[str, str],
        drained_tiers: Mapping[str, str],
    ) -> dict[str, str]:
        """Endpoint id → why it has to leave.

        ``gpus_out_of_use`` maps endpoint ids whose GPUs or node must be left to the reason, ``drained_tiers``
        maps tiers to the reason why all their replicas leave.
        """
        found: dict[str, str] = {}
        candidates = endpoints if drained_tiers else dict.fromkeys((*gpus_out_of_use, *self.drains))
        for endpoint_id in candidates:
            endpoint = endpoints.get(endpoint_id)
            if endpoint is None:
                continue
            why = gpus_out_of_use.get(endpoint_id) or self.drains.get(endpoint_id, "")
            if not why and endpoint.tier in drained_tiers:
                why = f"tier {endpoint.tier} is drained: {drained_tiers[endpoint.tier]}"
            if why:
                found[endpoint_id] = why
        return found
