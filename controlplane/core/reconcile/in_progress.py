"""The book of what is under way: moves, restarts, drained replicas, held tiers; and the orders that follow.

Commands of :mod:`controlplane.core.reconcile.reconcile` and operators' wishes change it. Each command is
checked again against the book just before it is carried out; one that no longer fits changes nothing.
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
    step,
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
)
from controlplane.errors import IllegalTransition

_FAILURES_KEPT = 20
_HUNG_KEPT = 16


@dataclass(frozen=True, slots=True)
class AppliedCommand:
    """What became of a command, for the record."""

    kind: str
    subject: str
    reason: str
    tier: str = ""


@dataclass(slots=True)
class InProgress:
    """Everything that is under way. Not safe for use by several threads."""

    moves: dict[str, Migration] = field(default_factory=dict)
    restarts: dict[str, Restart] = field(default_factory=dict)
    drains: dict[str, str] = field(default_factory=dict)
    """Endpoint id → why an operator wants it gone."""
    holds: dict[str, TierHold] = field(default_factory=dict)
    failures: dict[str, tuple[ReplicaFailure, ...]] = field(default_factory=dict)
    held_before: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Tier → how often the controller held it in a row, and when last."""
    hung_before: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def leaving_count(self, tier: str) -> int:
        """Replicas of a tier that are on their way out."""
        return sum(move.tier == tier for move in self.moves.values())

    def apply(
        self, command: Command, endpoints: Mapping[str, Endpoint], now_s: float
    ) -> AppliedCommand | None:
        """Carries a command out; None if it no longer fits, and then nothing has changed."""
        match command:
            case BeginMigration():
                return self._begin_move(command, endpoints, now_s)
            case AdvanceMigration():
                move = self._move(command.endpoint_id, command.expected)
                if move is None:
                    return None
                try:
                    self.moves[move.endpoint_id] = step(move, command.phase, now_s=now_s, note=command.reason)
                except IllegalTransition:
                    return None
                return AppliedCommand(command.phase.value, move.endpoint_id, command.reason, move.tier)
            case EndMigration():
                move = self._move(command.endpoint_id, command.expected)
                if move is None:
                    return None
                del self.moves[move.endpoint_id]
                if move.phase is MigrationPhase.SETTLING:
                    self.drains.pop(move.endpoint_id, None)
                word = "moved" if move.phase is MigrationPhase.SETTLING else "move ended"
                return AppliedCommand(word, move.endpoint_id, command.reason, move.tier)
            case BeginRestart():
                endpoint = endpoints.get(command.endpoint_id)
                if endpoint is None or endpoint.generation != command.generation:
                    return None
                if command.endpoint_id in self.restarts:
                    return None
                self.ask_restart(endpoint, command.reason, now_s, issued=True)
                times = (*self.hung_before.get(command.endpoint_id, ()), now_s)[-_HUNG_KEPT:]
                self.hung_before[command.endpoint_id] = times
                return AppliedCommand("restart", command.endpoint_id, command.reason, command.tier)
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
                count = self.held_before.get(command.tier, (0, now_s))[0] + 1
                self.held_before[command.tier] = (count, now_s)
                self.holds[command.tier] = TierHold(command.reason, now_s, CONTROLLER, now_s + command.for_s)
                return AppliedCommand("held", command.tier, command.reason, command.tier)
            case ReleaseTier():
                if self.holds.pop(command.tier, None) is None:
                    return None
                self.failures.pop(command.tier, None)
                return AppliedCommand("released", command.tier, command.reason, command.tier)
            case _:
                return None

    def _begin_move(
        self, command: BeginMigration, endpoints: Mapping[str, Endpoint], now_s: float
    ) -> AppliedCommand | None:
        endpoint = endpoints.get(command.endpoint_id)
        if endpoint is None or endpoint.state in ENDED or command.endpoint_id in self.moves:
            return None
        surged = command.phase is MigrationPhase.ELSEWHERE_FIRST
        self.moves[command.endpoint_id] = Migration(
            *(command.endpoint_id, command.tier, command.phase, command.reason),
            since_s=now_s,
            began_s=now_s,
            surged=surged,
            note=command.note,
        )
        self.restarts.pop(command.endpoint_id, None)
        reason = f"{command.reason}; {command.note}"
        return AppliedCommand(command.phase.value, command.endpoint_id, reason, command.tier)

    def _move(self, endpoint_id: str, expected: MigrationPhase) -> Migration | None:
        move = self.moves.get(endpoint_id)
        return move if move is not None and move.phase is expected else None

    # --- wishes ------------------------------------------------------------------------------------------

    def ask_restart(self, endpoint: Endpoint, reason: str, now_s: float, *, issued: bool = False) -> bool:
        """The engine process that is there now is to be replaced; False if that is asked for already."""
        known = self.restarts.get(endpoint.endpoint_id)
        if known is not None and known.generation == endpoint.generation:
            return False
        self.restarts[endpoint.endpoint_id] = Restart(
            endpoint.endpoint_id, endpoint.tier, endpoint.generation, reason, now_s, issued
        )
        return True

    def ask_drain(self, endpoint_id: str, reason: str) -> bool:
        """The replica is to leave; False if that is asked for already."""
        if endpoint_id in self.drains or endpoint_id in self.moves:
            return False
        self.drains[endpoint_id] = reason
        return True

    def hold(self, tier: str, reason: str, now_s: float, *, must_leave: bool) -> bool:
        """As an operator asks; False if it was so already."""
        known = self.holds.get(tier)
        if known is not None and known.by != CONTROLLER and (known.must_leave or not must_leave):
            return False
        self.holds[tier] = TierHold(reason, now_s, must_leave=must_leave)
        return True

    def release(self, tier: str) -> bool:
        """As an operator asks: the tier's past is forgotten. False if it was not held."""
        self.failures.pop(tier, None)
        self.held_before.pop(tier, None)
        return self.holds.pop(tier, None) is not None

    # --- what is seen -------------------------------------------------------------------------------------

    def failed(self, endpoint: Endpoint, now_s: float) -> None:
        """A replica gave up."""
        failure = ReplicaFailure(now_s, endpoint.endpoint_id, endpoint.diagnosis)
        self.failures[endpoint.tier] = (*self.failures.get(endpoint.tier, ()), failure)[-_FAILURES_KEPT:]

    def forget(self, endpoints: Mapping[str, Endpoint], now_s: float, memory_s: float) -> None:
        """Drops what is about replicas that are gone, and what is older than ``memory_s``."""
        for endpoint_id in [name for name in self.drains if name not in endpoints and name not in self.moves]:
            del self.drains[endpoint_id]
        for endpoint_id in [name for name in self.hung_before if name not in endpoints]:
            del self.hung_before[endpoint_id]
        for tier, failures in list(self.failures.items()):
            recent = tuple(item for item in failures if now_s - item.at_s < memory_s)
            if recent != failures:
                if recent:
                    self.failures[tier] = recent
                else:
                    del self.failures[tier]
        for tier, (_, held_s) in list(self.held_before.items()):
            if tier not in self.holds and now_s - held_s >= memory_s:
                del self.held_before[tier]

    # --- what follows -------------------------------------------------------------------------------------

    def orders_for(self, endpoint: Endpoint) -> tuple[ReplicaCommand, ...]:
        """What the replica is told now."""
        move = self.moves.get(endpoint.endpoint_id)
        if move is not None and move.phase is MigrationPhase.RETIRING:
            return (ReplicaCommand(ReplicaCommandKind.RETIRE, endpoint.endpoint_id, move.reason),)
        restart = self.restarts.get(endpoint.endpoint_id)
        if (
            restart is not None
            and restart.issued
            and endpoint.generation <= restart.generation
            and endpoint.state is not EndpointState.DRAINING
        ):
            order = ReplicaCommand(
                ReplicaCommandKind.RESTART, endpoint.endpoint_id, restart.reason, restart.generation
            )
            return (order,)
        return ()

    def leaving(
        self, endpoints: Mapping[str, Endpoint], why_of_places: Mapping[str, str], drained: Mapping[str, str]
    ) -> dict[str, str]:
        """Endpoint id → why it has to leave; ``why_of_places`` are those whose place is out of use,
        ``drained`` the tiers that are, and why."""
        found: dict[str, str] = {}
        for name in endpoints if drained else dict.fromkeys((*why_of_places, *self.drains)):
            endpoint = endpoints.get(name)
            if endpoint is None:
                continue
            why = why_of_places.get(endpoint.endpoint_id) or self.drains.get(endpoint.endpoint_id, "")
            if not why and endpoint.tier in drained:
                why = f"tier {endpoint.tier} is drained: {drained[endpoint.tier]}"
            if why:
                found[endpoint.endpoint_id] = why
        return found
