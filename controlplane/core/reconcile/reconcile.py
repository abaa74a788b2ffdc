"""What to do now: the cluster's observed state → commands, each with its reason.

Pure and repeatable: the same state gives the same commands, and once they are applied there is nothing more
to do until something changes or time passes. Only *observations* lead to commands. A node that does not
report, a missing reading, or a replica that a restarted controller has not heard from yet leads to none.

A replica has to leave its GPUs if one of them is out of use, its node is drained, or an operator drains the
replica. Then it migrates. If there is room elsewhere, its tier's target goes up by one; once the new replica
serves, the target goes down again with the old replica listed as leaving, and the old replica has to drain
and stop. Without room, or if the replica serves no requests anyway, it is retired at once, and Serve starts
another one as soon as there is room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint, EndpointState
from controlplane.core.gpus.health import GpuState
from controlplane.core.reconcile.migrations import Migration, MigrationPhase, Restart, TierHold

_BECOMING_READY = frozenset({EndpointState.STARTING, EndpointState.RESTARTING})


@dataclass(frozen=True, slots=True)
class ReconcileRules:
    """Times and limits."""

    replacement_wait_s: float = 60.0
    """If no replacement has begun to start after this time, the old replica is retired first."""
    start_limit_s: float = 3600.0
    """If no replacement is ready after this time, the old replica is retired without one."""
    settle_s: float = 60.0
    """How long a stopped replica stays listed as leaving, so that Serve has certainly noticed that it
    stopped."""
    surge_limit: int = 1
    """Maximum number of replicas of one tier whose replacements may start at the same time."""
    restart_limit_s: float = 3600.0
    """A restart that is not finished after this time is given up."""
    stall_limit: int = 3
    """An engine that was restarted this often for stalling, in ``stall_window_s``, is replaced instead."""
    stall_window_s: float = 1800.0
    crash_limit: int = 3
    """A tier is held once this many of its replicas have failed within ``crash_window_s``."""
    crash_window_s: float = 1800.0
    hold_initial_s: float = 600.0
    """How long a tier is held the first time; each further hold lasts twice as long."""
    hold_max_s: float = 14_400.0


@dataclass(frozen=True, slots=True)
class GpuOutOfUse:
    """A GPU that takes no new replicas."""

    state: GpuState
    holders: tuple[str, ...]
    """Endpoint ids that hold a lease on it."""
    must_leave: bool
    """Whether the holders have to leave it."""
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaFailure:
    """A replica whose supervisor gave up."""

    at_s: float
    endpoint_id: str
    diagnosis: str


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The input of :func:`reconcile`."""

    now_s: float
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    base_targets: Mapping[str, int] = field(default_factory=dict)
    """Tier → replicas that it should have while nothing migrates."""
    leaving: Mapping[str, str] = field(default_factory=dict)
    """Endpoint id → why it has to leave its GPUs."""
    room: Mapping[str, str] = field(default_factory=dict)
    """Endpoint id → where a replacement would go; an empty string if nowhere. An endpoint without an entry
    has not been checked yet, and waits."""
    gpus: Mapping[str, GpuOutOfUse] = field(default_factory=dict)
    """By UUID."""
    migrations: Mapping[str, Migration] = field(default_factory=dict)
    """By endpoint id."""
    restarts: Mapping[str, Restart] = field(default_factory=dict)
    """By endpoint id."""
    holds: Mapping[str, TierHold] = field(default_factory=dict)
    """By tier."""
    stalled: Mapping[str, str] = field(default_factory=dict)
    """Endpoint id → which readings show that its engine makes no progress."""
    stall_restarts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Endpoint id → when its engine was restarted for stalling."""
    failures: Mapping[str, tuple[ReplicaFailure, ...]] = field(default_factory=dict)
    """By tier, oldest first."""
    hold_counts: Mapping[str, int] = field(default_factory=dict)
    """Tier → how many times in a row it was held for failures."""


@dataclass(frozen=True, slots=True)
class BeginMigration:
    """A replica begins to leave its GPUs."""

    endpoint_id: str
    tier: str
    phase: MigrationPhase
    reason: str
    """Why it leaves."""
    note: str
    """Why it begins in this phase."""


@dataclass(frozen=True, slots=True)
class AdvanceMigration:
    """A migration enters its next phase."""

    endpoint_id: str
    expected: MigrationPhase
    """The current phase; in any other, the command is not carried out."""
    phase: MigrationPhase
    reason: str


@dataclass(frozen=True, slots=True)
class EndMigration:
    """A migration is over."""

    endpoint_id: str
    expected: MigrationPhase
    """The current phase; in any other, the command is not carried out."""
    reason: str


@dataclass(frozen=True, slots=True)
class SetGpu:
    """A cordoned GPU is now being drained, or is drained."""

    uuid: str
    state: GpuState
    reason: str


@dataclass(frozen=True, slots=True)
class BeginRestart:
    """An engine process is replaced because it stalled."""

    endpoint_id: str
    tier: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class IssueRestart:
    """A requested restart is sent to its replica."""

    endpoint_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class EndRestart:
    """A restart is over."""

    endpoint_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class HoldTier:
    """No replica of the tier is started for ``for_s``."""

    tier: str
    for_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseTier:
    """Replicas of the tier may be started again."""

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


def reconcile(state: ClusterState, rules: ReconcileRules) -> tuple[Command, ...]:
    """Everything to do now, in the order in which to do it."""
    tiers = _TierCounts(state)
    return (
        *_update_gpus(state),
        *_advance_migrations(state, tiers, rules),
        *_begin_migrations(state, tiers, rules),
        *_advance_restarts(state, tiers, rules),
        *_replace_stalled(state, rules),
        *_update_holds(state, rules),
    )


class _TierCounts:
    """Counts per tier, including the decisions of this call of :func:`reconcile` so far."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._serving: dict[str, int] = {}
        self.with_replacement: Counter[str] = Counter()
        """Migrations for which a replacement was started first."""
        self.without_replacement: Counter[str] = Counter()
        """Migrations in which the replica was retired first."""
        for migration in state.migrations.values():
            if migration.phase is not MigrationPhase.SETTLING:
                count = self.with_replacement if migration.surged else self.without_replacement
                count[migration.tier] += 1

    @cached_property
    def members(self) -> Mapping[str, Sequence[Endpoint]]:
        """Endpoints by tier. Computed on first use, since most calls of :func:`reconcile` don't need it."""
        members: dict[str, list[Endpoint]] = {}
        for endpoint in self._state.endpoints.values():
            members.setdefault(endpoint.tier, []).append(endpoint)
        return members

    def serving(self, tier: str) -> int:
        """How many replicas of the tier serve and are not being retired."""
        if tier not in self._serving:
            self._serving[tier] = sum(
                item.state in SERVING and not _retires(self._state, item.endpoint_id)
                for item in self.members.get(tier, ())
            )
        return self._serving[tier]

    def retire_one(self, tier: str, needed: int) -> bool:
        """Counts one serving replica of the tier as retired; False if fewer than ``needed`` would be left."""
        if self.serving(tier) <= needed:
            return False
        self._serving[tier] -= 1
        return True

    def replacement_starting(self, tier: str) -> bool:
        """Whether a replica of the tier is starting that doesn't have to leave too."""
        return any(
            item.state in _BECOMING_READY
            and item.endpoint_id not in self._state.migrations
            and item.endpoint_id not in self._state.leaving
            for item in self.members.get(tier, ())
        )


def _retires(state: ClusterState, endpoint_id: str) -> bool:
    migration = state.migrations.get(endpoint_id)
    return migration is not None and migration.phase is not MigrationPhase.STARTING_ELSEWHERE


def _update_gpus(state: ClusterState) -> Iterable[Command]:
    for uuid, gpu in sorted(state.gpus.items()):
        if not gpu.holders and gpu.state in (GpuState.CORDONED, GpuState.DRAINING):
            yield SetGpu(uuid, GpuState.DRAINED, "nothing runs on it")
        elif gpu.holders and gpu.must_leave and gpu.state is GpuState.CORDONED:
            yield SetGpu(uuid, GpuState.DRAINING, f"{', '.join(gpu.holders)} must leave: {gpu.reason}")


def _advance_migrations(state: ClusterState, tiers: _TierCounts, rules: ReconcileRules) -> Iterable[Command]:
    oldest_first = sorted(state.migrations.items(), key=lambda item: (item[1].began_s, item[0]))
    for endpoint_id, migration in oldest_first:
        endpoint = state.endpoints.get(endpoint_id)
        in_phase_s = state.now_s - migration.since_s
        if migration.phase is MigrationPhase.SETTLING:
            if in_phase_s >= rules.settle_s:
                yield EndMigration(endpoint_id, migration.phase, f"ended {in_phase_s:.0f} s ago")
        elif endpoint is None or endpoint.state in ENDED:
            yield AdvanceMigration(
                endpoint_id, migration.phase, MigrationPhase.SETTLING, "the replica has ended"
            )
        elif migration.phase is MigrationPhase.STARTING_ELSEWHERE:
            if endpoint_id not in state.leaving and endpoint.state is not EndpointState.DRAINING:
                yield EndMigration(endpoint_id, migration.phase, "the replica no longer has to leave")
                continue
            why = _may_retire(state, tiers, rules, endpoint, in_phase_s)
            if why:
                yield AdvanceMigration(endpoint_id, migration.phase, MigrationPhase.RETIRING, why)


def _may_retire(
    state: ClusterState, tiers: _TierCounts, rules: ReconcileRules, endpoint: Endpoint, waited_s: float
) -> str:
    """Why a replica may retire now; empty if it has to wait for its replacement."""
    if endpoint.state not in SERVING:
        return f"it is {endpoint.state} and serves no requests"
    needed = state.base_targets.get(endpoint.tier, 0)
    if tiers.retire_one(endpoint.tier, needed):
        return f"{needed} other replicas serve"
    if waited_s >= rules.replacement_wait_s and not tiers.replacement_starting(endpoint.tier):
        return f"no replacement has begun to start after {waited_s:.0f} s"
    if waited_s >= rules.start_limit_s:
        return f"no replacement was ready after {waited_s:.0f} s"
    return ""


def _begin_migrations(state: ClusterState, tiers: _TierCounts, rules: ReconcileRules) -> Iterable[Command]:
    for endpoint_id, reason in sorted(state.leaving.items()):
        endpoint = state.endpoints.get(endpoint_id)
        if endpoint is None or endpoint_id in state.migrations or endpoint.state in ENDED:
            continue
        beginning = _first_phase(state, tiers, rules, endpoint)
        if beginning is not None:
            phase, note = beginning
            yield BeginMigration(endpoint_id, endpoint.tier, phase, reason, note)


def _first_phase(
    state: ClusterState, tiers: _TierCounts, rules: ReconcileRules, endpoint: Endpoint
) -> tuple[MigrationPhase, str] | None:
    """The phase in which the migration of ``endpoint`` begins now, and why; None if it has to wait."""
    tier, hold = endpoint.tier, state.holds.get(endpoint.tier)
    if endpoint.state is EndpointState.DRAINING:
        return MigrationPhase.RETIRING, "it is draining already"
    if endpoint.state not in SERVING:
        return MigrationPhase.RETIRING, "it serves no requests"
    if hold is not None and hold.must_leave:
        return MigrationPhase.RETIRING, "its tier is drained"
    if hold is None:
        needed = state.base_targets.get(tier, 0)
        if tiers.serving(tier) > needed + tiers.with_replacement[tier]:
            tiers.retire_one(tier, needed)
            return MigrationPhase.RETIRING, "enough other replicas serve"
        where = state.room.get(endpoint.endpoint_id)
        if where is None:
            return None
        if where:
            if tiers.with_replacement[tier] >= rules.surge_limit:
                return None
            tiers.with_replacement[tier] += 1
            return MigrationPhase.STARTING_ELSEWHERE, f"there is room: {where}"
    # The tier loses a serving replica, so only one at a time.
    if tiers.without_replacement[tier] or tiers.with_replacement[tier]:
        return None
    tiers.without_replacement[tier] += 1
    return MigrationPhase.RETIRING, "there is no room elsewhere" if hold is None else "its tier is held"


def _advance_restarts(state: ClusterState, tiers: _TierCounts, rules: ReconcileRules) -> Iterable[Command]:
    restarting_tiers = {item.tier for item in state.restarts.values() if item.issued}
    oldest_first = sorted(state.restarts.items(), key=lambda item: (item[1].since_s, item[0]))
    for endpoint_id, restart in oldest_first:
        endpoint = state.endpoints.get(endpoint_id)
        waited_s = state.now_s - restart.since_s
        if endpoint is None or endpoint.state in (EndpointState.DRAINING, EndpointState.STOPPED):
            yield EndRestart(endpoint_id, "the replica is gone")
        elif endpoint.generation > restart.generation:
            if endpoint.state in SERVING:
                yield EndRestart(endpoint_id, f"generation {endpoint.generation} serves")
            elif endpoint.state is EndpointState.FAILED:
                yield EndRestart(endpoint_id, f"the new engine failed: {endpoint.diagnosis}")
            elif waited_s >= rules.restart_limit_s:
                yield EndRestart(endpoint_id, f"the new engine was not ready after {waited_s:.0f} s")
        elif restart.issued:
            if waited_s >= rules.restart_limit_s:
                yield EndRestart(endpoint_id, f"the replica has not restarted after {waited_s:.0f} s")
        elif restart.tier not in restarting_tiers:
            others = [item for item in tiers.members.get(restart.tier, ()) if item.endpoint_id != endpoint_id]
            if endpoint.state not in SERVING or not others or any(item.state in SERVING for item in others):
                restarting_tiers.add(restart.tier)
                yield IssueRestart(endpoint_id, "no other engine of the tier is restarting")


def _replace_stalled(state: ClusterState, rules: ReconcileRules) -> Iterable[Command]:
    for endpoint_id, reason in sorted(state.stalled.items()):
        endpoint = state.endpoints.get(endpoint_id)
        handled = (
            endpoint_id in state.restarts or endpoint_id in state.migrations or endpoint_id in state.leaving
        )
        if endpoint is None or handled or endpoint.state not in SERVING:
            continue
        restarts_s = state.stall_restarts.get(endpoint_id, ())
        recent = sum(state.now_s - at_s < rules.stall_window_s for at_s in restarts_s)
        if recent < rules.stall_limit:
            yield BeginRestart(endpoint_id, endpoint.tier, endpoint.generation, reason)
        else:
            note = f"it was restarted {recent} times before for this"
            yield BeginMigration(endpoint_id, endpoint.tier, MigrationPhase.RETIRING, reason, note)


def _update_holds(state: ClusterState, rules: ReconcileRules) -> Iterable[Command]:
    for tier, hold in sorted(state.holds.items()):
        if hold.until_s is not None and state.now_s >= hold.until_s:
            yield ReleaseTier(tier, f"held for {state.now_s - hold.since_s:.0f} s; replicas start again")
    for tier, failures in sorted(state.failures.items()):
        recent = [item for item in failures if state.now_s - item.at_s < rules.crash_window_s]
        if tier in state.holds or len(recent) < rules.crash_limit:
            continue
        for_s = min(rules.hold_max_s, rules.hold_initial_s * 2.0 ** min(state.hold_counts.get(tier, 0), 60))
        reason = (
            f"{len(recent)} replicas failed in {rules.crash_window_s:.0f} s; the last one: "
            f"{recent[-1].diagnosis or 'no diagnosis'}; replicas start again in {for_s:.0f} s, "
            f"or now with `tierplane restart {tier}`"
        )
        yield HoldTier(tier, for_s, reason)
