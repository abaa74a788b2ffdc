"""What is to be done now: observed state → commands, each with its reason.

Pure and repeatable: the same state gives the same commands, and once they are applied there is nothing more
to do until something changes or time passes. Only what was *seen* makes a command: a node that is silent, a
reading that is missing or a controller that has just started and does not know everybody again give none.

A replica leaves its place (its GPU is out of use, its node is drained, an operator says so) like this: if
there is room elsewhere, its tier's target goes up by one; when the new replica serves, the target goes down
again with the old one listed as leaving, and the old one is told to drain and end. Without room, or if
it serves nothing anyway, it is retired at once and Serve starts another one where there is a place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint, EndpointState
from controlplane.core.gpus.health import GpuState
from controlplane.core.reconcile.migrations import Migration, MigrationPhase, Restart, TierHold

_COMING = frozenset({EndpointState.STARTING, EndpointState.RESTARTING})


@dataclass(frozen=True, slots=True)
class ReconcileRules:
    """Times and limits."""

    newcomer_wait_s: float = 60.0
    """If no replica of the tier has begun to start elsewhere by then, the old one is retired first."""
    start_limit_s: float = 3600.0
    """A replica that starts elsewhere may take this long."""
    settle_s: float = 60.0
    """Serve has seen that a replica is gone by then."""
    surge_limit: int = 1
    """Replicas of one tier that start elsewhere first at a time."""
    restart_limit_s: float = 3600.0
    """A restart that is not over by then is given up."""
    hung_limit: int = 3
    """An engine that hung so often within ``hung_window_s`` is replaced rather than restarted."""
    hung_window_s: float = 1800.0
    crash_limit: int = 3
    """Replicas of one tier that failed within ``crash_window_s`` and the tier is held."""
    crash_window_s: float = 1800.0
    hold_initial_s: float = 600.0
    """A held tier is tried again after this, after twice as long the next time."""
    hold_max_s: float = 14_400.0


@dataclass(frozen=True, slots=True)
class GpuOutOfUse:
    """A GPU that nothing new comes to."""

    state: GpuState
    holders: tuple[str, ...]
    must_leave: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaFailure:
    """A replica that gave up."""

    at_s: float
    endpoint_id: str
    diagnosis: str


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All that is looked at."""

    now_s: float
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    bases: Mapping[str, int] = field(default_factory=dict)
    """Tier → replicas that it is to have when nothing moves."""
    leaving: Mapping[str, str] = field(default_factory=dict)
    """Endpoint id → why it has to leave its place."""
    room: Mapping[str, str] = field(default_factory=dict)
    """Endpoint id → where another one like it would go; empty: nowhere. Of those not looked at yet: no
    entry, and they wait."""
    gpus: Mapping[str, GpuOutOfUse] = field(default_factory=dict)
    moves: Mapping[str, Migration] = field(default_factory=dict)
    restarts: Mapping[str, Restart] = field(default_factory=dict)
    holds: Mapping[str, TierHold] = field(default_factory=dict)
    """By tier."""
    hung: Mapping[str, str] = field(default_factory=dict)
    """Endpoint id → by which readings its engine is hung."""
    hung_before: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Endpoint id → when it was restarted for it."""
    failures: Mapping[str, tuple[ReplicaFailure, ...]] = field(default_factory=dict)
    """By tier, oldest first."""
    holds_before: Mapping[str, int] = field(default_factory=dict)
    """Tier → how often it was held in a row."""


@dataclass(frozen=True, slots=True)
class BeginMigration:
    """The replica leaves its place."""

    endpoint_id: str
    tier: str
    phase: MigrationPhase
    reason: str
    note: str


@dataclass(frozen=True, slots=True)
class AdvanceMigration:
    """The move goes on."""

    endpoint_id: str
    expected: MigrationPhase
    """It is carried out only from there."""
    phase: MigrationPhase
    reason: str


@dataclass(frozen=True, slots=True)
class EndMigration:
    """The move is over."""

    endpoint_id: str
    expected: MigrationPhase
    reason: str


@dataclass(frozen=True, slots=True)
class SetGpu:
    """A cordoned GPU is being left, or is empty."""

    uuid: str
    state: GpuState
    reason: str


@dataclass(frozen=True, slots=True)
class BeginRestart:
    """The engine process is to be replaced."""

    endpoint_id: str
    tier: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class IssueRestart:
    """It is its turn."""

    endpoint_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class EndRestart:
    """It is over."""

    endpoint_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class HoldTier:
    """Nothing of the tier is started until ``for_s`` have passed."""

    tier: str
    for_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseTier:
    """The tier is tried again."""

    tier: str
    reason: str


Command: TypeAlias = (
    BeginMigration
    | AdvanceMigration
    | EndMigration
    | SetGpu
    | BeginRestart
    | IssueRestart
    | EndRestart
    | HoldTier
    | ReleaseTier
)


def reconcile(seen: ClusterState, rules: ReconcileRules) -> tuple[Command, ...]:
    """Everything to do now, in the order in which to do it."""
    tiers = _Tiers(seen)
    return (
        *_gpus(seen),
        *_running_moves(seen, tiers, rules),
        *_new_moves(seen, tiers, rules),
        *_restarts(seen, tiers, rules),
        *_hung(seen, tiers, rules),
        *_holds(seen, rules),
    )


class _Tiers:
    """Counts by tier, kept up to date with what has been decided in this look."""

    def __init__(self, seen: ClusterState) -> None:
        self._seen = seen
        self._serving: dict[str, int] = {}
        self.surges: dict[str, int] = {}
        self.bare: dict[str, int] = {}
        """Retirements without anybody to take over."""
        for move in seen.moves.values():
            if move.phase is MigrationPhase.SETTLING:
                continue
            if move.surged:
                self.surges[move.tier] = self.surges.get(move.tier, 0) + 1
            else:
                self.bare[move.tier] = self.bare.get(move.tier, 0) + 1

    @cached_property
    def members(self) -> Mapping[str, Sequence[Endpoint]]:
        """By tier. Mostly nothing is to be decided, and then nobody asks."""
        members: dict[str, list[Endpoint]] = {}
        for endpoint in self._seen.endpoints.values():
            members.setdefault(endpoint.tier, []).append(endpoint)
        return members

    def serving(self, tier: str) -> int:
        """How many of the tier serve and will go on to."""
        if tier not in self._serving:
            self._serving[tier] = sum(
                item.state in SERVING and not _retires(self._seen, item.endpoint_id)
                for item in self.members.get(tier, ())
            )
        return self._serving[tier]

    def let_go(self, tier: str, base: int) -> bool:
        """Whether one that serves may end with ``base`` left; if so it is counted as gone."""
        if self.serving(tier) <= base:
            return False
        self._serving[tier] -= 1
        return True

    def newcomer(self, seen: ClusterState, tier: str) -> bool:
        """Whether a replica of the tier is starting that does not leave itself."""
        return any(
            item.state in _COMING
            and item.endpoint_id not in seen.moves
            and item.endpoint_id not in seen.leaving
            for item in self.members.get(tier, ())
        )


def _retires(seen: ClusterState, endpoint_id: str) -> bool:
    move = seen.moves.get(endpoint_id)
    return move is not None and move.phase is not MigrationPhase.ELSEWHERE_FIRST


def _gpus(seen: ClusterState) -> Iterable[Command]:
    for uuid, gpu in sorted(seen.gpus.items()):
        if not gpu.holders and gpu.state in (GpuState.CORDONED, GpuState.DRAINING):
            yield SetGpu(uuid, GpuState.DRAINED, "nothing runs on it")
        elif gpu.holders and gpu.must_leave and gpu.state is GpuState.CORDONED:
            yield SetGpu(uuid, GpuState.DRAINING, f"{', '.join(gpu.holders)} must leave: {gpu.reason}")


def _running_moves(seen: ClusterState, tiers: _Tiers, rules: ReconcileRules) -> Iterable[Command]:
    for endpoint_id, move in sorted(seen.moves.items(), key=lambda item: (item[1].began_s, item[0])):
        endpoint = seen.endpoints.get(endpoint_id)
        gone = endpoint is None or endpoint.state in ENDED
        waited_s = seen.now_s - move.since_s
        if move.phase is MigrationPhase.SETTLING:
            if waited_s >= rules.settle_s:
                yield EndMigration(endpoint_id, move.phase, f"gone for {waited_s:.0f} s")
        elif gone:
            yield AdvanceMigration(endpoint_id, move.phase, MigrationPhase.SETTLING, "it has ended")
        elif move.phase is MigrationPhase.ELSEWHERE_FIRST:
            assert endpoint is not None
            if endpoint_id not in seen.leaving and endpoint.state is not EndpointState.DRAINING:
                yield EndMigration(endpoint_id, move.phase, "it need not leave any more")
                continue
            why = _may_retire(seen, tiers, rules, move, endpoint, waited_s)
            if why:
                yield AdvanceMigration(endpoint_id, move.phase, MigrationPhase.RETIRING, why)


def _may_retire(
    seen: ClusterState,
    tiers: _Tiers,
    rules: ReconcileRules,
    move: Migration,
    endpoint: Endpoint,
    waited_s: float,
) -> str:
    if endpoint.state not in SERVING:
        return f"it is {endpoint.state} and serves nothing"
    base = seen.bases.get(move.tier, 0)
    if tiers.let_go(move.tier, base):
        return f"{base} of {base} others serve"
    if waited_s >= rules.newcomer_wait_s and not tiers.newcomer(seen, move.tier):
        return f"none has begun to start elsewhere in {waited_s:.0f} s"
    if waited_s >= rules.start_limit_s:
        return f"none was ready elsewhere in {waited_s:.0f} s"
    return ""


def _new_moves(seen: ClusterState, tiers: _Tiers, rules: ReconcileRules) -> Iterable[Command]:
    for endpoint_id, reason in sorted(seen.leaving.items()):
        endpoint = seen.endpoints.get(endpoint_id)
        if endpoint is None or endpoint_id in seen.moves or endpoint.state in ENDED:
            continue
        tier = endpoint.tier
        if endpoint.state not in SERVING:
            note = (
                "it is leaving already" if endpoint.state is EndpointState.DRAINING else "it serves nothing"
            )
            yield BeginMigration(endpoint_id, tier, MigrationPhase.RETIRING, reason, note)
            continue
        if tier in seen.holds:
            held = seen.holds[tier]
            if held.must_leave:
                yield BeginMigration(
                    endpoint_id, tier, MigrationPhase.RETIRING, reason, "its tier is drained"
                )
                continue
        elif tiers.serving(tier) > seen.bases.get(tier, 0) + tiers.surges.get(tier, 0):
            # more serve than are asked for: somebody has taken over already
            tiers.let_go(tier, seen.bases.get(tier, 0))
            yield BeginMigration(endpoint_id, tier, MigrationPhase.RETIRING, reason, "enough others serve")
            continue
        elif seen.room.get(endpoint_id):
            if tiers.surges.get(tier, 0) < rules.surge_limit:
                tiers.surges[tier] = tiers.surges.get(tier, 0) + 1
                note = f"there is room: {seen.room[endpoint_id]}"
                yield BeginMigration(endpoint_id, tier, MigrationPhase.ELSEWHERE_FIRST, reason, note)
            continue
        looked = tier in seen.holds or endpoint_id in seen.room
        # one at a time: the others go on serving where they are
        if looked and not tiers.bare.get(tier, 0) and not tiers.surges.get(tier, 0):
            tiers.bare[tier] = 1
            note = "its tier is held" if tier in seen.holds else "there is no room elsewhere"
            yield BeginMigration(endpoint_id, tier, MigrationPhase.RETIRING, reason, note)


def _restarts(seen: ClusterState, tiers: _Tiers, rules: ReconcileRules) -> Iterable[Command]:
    busy = {item.tier for item in seen.restarts.values() if item.issued}
    for endpoint_id, restart in sorted(seen.restarts.items(), key=lambda item: (item[1].since_s, item[0])):
        endpoint = seen.endpoints.get(endpoint_id)
        if endpoint is None or endpoint.state in (EndpointState.DRAINING, EndpointState.STOPPED):
            yield EndRestart(endpoint_id, "the replica is gone")
        elif endpoint.generation > restart.generation:
            if endpoint.state in SERVING:
                yield EndRestart(endpoint_id, f"generation {endpoint.generation} serves")
            elif endpoint.state is EndpointState.FAILED:
                yield EndRestart(endpoint_id, f"it failed: {endpoint.diagnosis}")
            elif seen.now_s - restart.since_s >= rules.restart_limit_s:
                yield EndRestart(endpoint_id, f"not ready after {seen.now_s - restart.since_s:.0f} s")
        elif restart.issued:
            if seen.now_s - restart.since_s >= rules.restart_limit_s:
                yield EndRestart(endpoint_id, "the replica does not obey")
        elif restart.tier not in busy:
            others = [item for item in tiers.members.get(restart.tier, ()) if item.endpoint_id != endpoint_id]
            if endpoint.state not in SERVING or not others or any(item.state in SERVING for item in others):
                busy.add(restart.tier)
                yield IssueRestart(endpoint_id, "its turn")


def _hung(seen: ClusterState, tiers: _Tiers, rules: ReconcileRules) -> Iterable[Command]:
    for endpoint_id, reason in sorted(seen.hung.items()):
        endpoint = seen.endpoints.get(endpoint_id)
        busy = endpoint_id in seen.restarts or endpoint_id in seen.moves or endpoint_id in seen.leaving
        if endpoint is None or busy or endpoint.state not in SERVING:
            continue
        times = sum(seen.now_s - at_s < rules.hung_window_s for at_s in seen.hung_before.get(endpoint_id, ()))
        if times < rules.hung_limit:
            yield BeginRestart(endpoint_id, endpoint.tier, endpoint.generation, reason)
        else:
            note = f"it hung {times} times before"
            yield BeginMigration(endpoint_id, endpoint.tier, MigrationPhase.RETIRING, reason, note)


def _holds(seen: ClusterState, rules: ReconcileRules) -> Iterable[Command]:
    for tier, hold in sorted(seen.holds.items()):
        if hold.until_s is not None and seen.now_s >= hold.until_s:
            yield ReleaseTier(tier, f"held for {seen.now_s - hold.since_s:.0f} s: it is tried again")
    for tier, failures in sorted(seen.failures.items()):
        recent = [item for item in failures if seen.now_s - item.at_s < rules.crash_window_s]
        if tier in seen.holds or len(recent) < rules.crash_limit:
            continue
        for_s = min(rules.hold_max_s, rules.hold_initial_s * 2.0 ** min(seen.holds_before.get(tier, 0), 60))
        reason = (
            f"{len(recent)} replicas failed in {rules.crash_window_s:.0f} s; the last one: "
            f"{recent[-1].diagnosis or 'no diagnosis'}; it is tried again in {for_s:.0f} s, "
            f"or by `tierplane restart {tier}`"
        )
        yield HoldTier(tier, for_s, reason)
