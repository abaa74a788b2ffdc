"""Whatever fails and whatever operators do: no GPU is used twice, what is missing decides nothing, and
the control loop comes to rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.health import GpuState
from controlplane.core.placement.gangs import WHOLE_MILLI, GangShape
from controlplane.core.reconcile.in_progress import InProgress
from controlplane.core.reconcile.migrations import (
    TRANSITIONS,
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
    ClusterState,
    Command,
    EndMigration,
    EndRestart,
    GpuOutOfUse,
    HoldTier,
    IssueRestart,
    ReconcileRules,
    ReleaseTier,
    ReplicaFailure,
    SetGpu,
    reconcile,
)
from controlplane.core.telemetry.samples import Absence, GpuCondition, Missing
from controlplane.errors import IllegalTransition
from tests.support.controller import World, xid
from tests.support.samples import GIB

NODES = {"node-1": ["gpu-a0", "gpu-a1"], "node-2": ["gpu-b0", "gpu-b1"], "node-3": ["gpu-c0"]}
GPUS = [uuid for uuids in NODES.values() for uuid in uuids]
SHAPES = [GangShape(), GangShape(gpus=2), GangShape(milli_gpu=400, gpu_memory_bytes=30 * GIB)]

STORY_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""Stories take a while: one that fails is shown as it is."""

troubles = st.one_of(
    st.tuples(st.just("xid"), st.sampled_from(GPUS), st.sampled_from([13, 48, 74, 79])),
    st.tuples(st.just("hot"), st.sampled_from(GPUS), st.booleans()),
    st.tuples(st.just("silent"), st.sampled_from(list(NODES)), st.booleans()),
    st.tuples(st.just("node lost"), st.sampled_from(list(NODES)), st.booleans()),
    st.tuples(
        st.sampled_from(["cordon", "drain", "uncordon", "restart"]),
        st.sampled_from([*GPUS, *NODES, "small", "other"]),
        st.none(),
    ),
    st.tuples(st.just("engine lost"), st.integers(0, 5), st.none()),
    st.tuples(st.just("replica lost"), st.integers(0, 5), st.none()),
    st.tuples(st.just("disobey"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("controller killed"), st.booleans(), st.none()),
    st.tuples(st.just("seconds"), st.integers(1, 40), st.none()),
)


def node_of(uuid: str) -> str:
    return next(node_id for node_id, uuids in NODES.items() if uuid in uuids)


def strike(world: World, trouble: tuple[str, object, object]) -> None:
    """Something fails, or an operator acts."""
    kind, what, how = trouble
    replicas = list(world.replicas.values())
    match kind:
        case "xid" if node_of(str(what)) in world.nodes:
            assert isinstance(how, int)
            world.events.append(xid(node_of(str(what)), str(what), how))
        case "hot":
            readings = world.samples.setdefault(node_of(str(what)), {})
            readings[str(what)] = {"temperature_c": 95} if how else {}
        case "silent":
            (world.silent.add if how else world.silent.discard)(str(what))
        case "node lost":
            if how:
                world.nodes.pop(str(what), None)
            else:
                world.nodes[str(what)] = NODES[str(what)]
        case "cordon" | "drain" | "uncordon" | "restart":
            answer = getattr(world.controller, kind)(str(what), "because")
            assert answer.reason
        case "engine lost" if replicas:
            assert isinstance(what, int)
            replica = replicas[what % len(replicas)]
            if replica.endpoint.state is EndpointState.READY:
                replica.starts_in = 3
                replica.endpoint = replace(
                    replica.endpoint,
                    state=EndpointState.RESTARTING,
                    generation=replica.endpoint.generation + 1,
                )
        case "replica lost" if replicas:
            assert isinstance(what, int)
            del world.replicas[replicas[what % len(replicas)].endpoint.endpoint_id]
        case "disobey" if replicas:
            assert isinstance(what, int)
            replicas[what % len(replicas)].obeys = not how
        case "controller killed":
            restart_controller(world, same_cluster=bool(what))
        case "seconds":
            assert isinstance(what, int)
            for _ in range(what):
                world.step()
                check(world)


def restart_controller(world: World, *, same_cluster: bool) -> None:
    stored = world.restart_controller(same_cluster=same_cluster)
    if same_cluster:
        assert world.controller.checkpoint() == stored


def check(world: World) -> None:
    """No GPU is leased twice or over-committed, by the controller's leases and by those of the replicas."""
    leases = world.controller.leases
    check_stored_leases(world)
    for uuid in GPUS:
        parts = [part for lease in leases.values() for part in lease.parts if part.gpu_uuid == uuid]
        assert sum(part.milli for part in parts) <= WHOLE_MILLI
        assert sum(part.memory_bytes for part in parts) <= 80 * GIB
        held = [
            part.milli
            for replica in world.replicas.values()
            if replica.lease is not None
            for part in replica.lease.parts
            if part.gpu_uuid == uuid
        ]
        assert sum(held) <= WHOLE_MILLI, f"{uuid} is in use by {held}"
    for migration in world.migrations.values():
        assert migration.reason


def check_stored_leases(world: World) -> None:
    """The leases of a checkpoint, which are gathered from changes, are all leases that there are."""
    stored = {key: value for key, value in world.controller.checkpoint().items() if key.startswith("lease/")}
    assert stored == {
        f"lease/{holder}": {
            "generation": lease.generation,
            "node_id": lease.node_id,
            "parts": [[part.gpu_uuid, part.milli, part.memory_bytes] for part in lease.parts],
        }
        for holder, lease in world.controller.leases.items()
    }


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=STORY_PHASES)
@given(st.sampled_from(SHAPES), st.integers(1, 3), st.lists(troubles, max_size=12))
def test_nothing_is_leased_twice_and_all_comes_to_rest(
    shape: GangShape, replicas: int, story: list[tuple[str, object, object]]
) -> None:
    world = World(
        {name: list(uuids) for name, uuids in NODES.items()},
        {"small": replicas, "other": 1},
        shape,
        shift_s=7.0,
    )
    world.step(10)
    for trouble in story:
        strike(world, trouble)
        check(world)
    # the troubles are over
    world.nodes = {name: list(uuids) for name, uuids in NODES.items()}
    world.samples.clear()
    world.silent.clear()
    for replica in world.replicas.values():
        replica.obeys = True
    world.step(20)
    for uuid in GPUS:
        world.controller.uncordon(uuid, "mended")
    for name in (*NODES, "small", "other"):
        world.controller.uncordon(name, "mended")
    for _ in range(120):
        world.step()
        check(world)
    before = world.registry.events[-1].number
    for _ in range(30):
        world.step()
        assert world.controller.tick() == ()
    assert world.registry.events[-1].number == before, world.registry.events[-3:]
    activity = world.controller.activity()
    assert not activity.migrations
    assert not activity.restarts
    assert not activity.drains
    if shape.gpus == 1:
        assert world.ready("small") == replicas
        assert world.ready("other") == 1


blank = st.sampled_from(list(Absence)).map(lambda absence: Missing(absence, "not there"))
unreadable = st.fixed_dictionaries(
    {
        "temperature_c": blank,
        "memory_free_bytes": blank,
        "memory_used_bytes": blank,
        "gpu_ratio": blank,
        "power_w": blank,
        "ecc_uncorrected": blank,
        "ecc_corrected": blank,
        "condition": st.sampled_from([GpuCondition.OK, GpuCondition.UNREADABLE]),
    }
)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from(GPUS), unreadable),
    st.sets(st.sampled_from(list(NODES))),
    st.integers(1, 200),
)
def test_what_is_missing_never_cordons_and_never_scales(
    readings: Mapping[str, dict[str, object]], silent: set[str], seconds: int
) -> None:
    world = World({name: list(uuids) for name, uuids in NODES.items()}, {"small": 3})
    world.settle()
    targets = {tier: target.replicas for tier, target in world.controller.targets().items()}
    holders = {uuid: world.holder_of(uuid) for uuid in GPUS}
    for uuid, reading in readings.items():
        world.samples.setdefault(node_of(uuid), {})[uuid] = reading
    world.silent |= silent
    for _ in range(seconds):
        world.step()
        assert not world.controller.gpus_out_of_use()
        assert not world.migrations
        assert {tier: target.replicas for tier, target in world.controller.targets().items()} == targets
    assert {uuid: world.holder_of(uuid) for uuid in GPUS} == holders


# --- the reconciler alone, on states that no story leads to -----------------------------------------------

IDS = ("e1", "e2", "e3")
ids = st.sampled_from(IDS)
tiers = st.sampled_from(("t1", "t2"))
times = st.floats(0, 5000, allow_nan=False)
endpoints = st.builds(
    Endpoint,
    endpoint_id=st.just(""),
    tier=tiers,
    model=st.just("m"),
    engine=st.just("simulated"),
    base_url=st.just(""),
    state=st.sampled_from(EndpointState),
    concurrency_limit=st.just(1),
    generation=st.integers(1, 3),
)
moves = st.builds(
    Migration,
    ids,
    tiers,
    st.sampled_from(MigrationPhase),
    st.just("why"),
    times,
    times,
    st.booleans(),
    st.just(""),
)
restarts = st.builds(Restart, ids, tiers, st.integers(1, 3), st.just("why"), times, st.booleans())
holds = st.builds(
    TierHold, st.just("why"), times, st.sampled_from(["operator", "controller"]), st.none() | times
)
failures = st.lists(st.builds(ReplicaFailure, times, ids, st.just("bad flag")), max_size=5).map(tuple)
observations = st.builds(
    ClusterState,
    now_s=times,
    endpoints=st.dictionaries(ids, endpoints).map(
        lambda found: {name: replace(item, endpoint_id=name) for name, item in found.items()}
    ),
    base_targets=st.dictionaries(tiers, st.integers(0, 3)),
    leaving=st.dictionaries(ids, st.just("its GPU is bad")),
    room=st.dictionaries(ids, st.sampled_from(["", "on n2"])),
    gpus=st.dictionaries(
        st.sampled_from(GPUS),
        st.builds(
            GpuOutOfUse,
            st.sampled_from([GpuState.CORDONED, GpuState.DRAINING, GpuState.DRAINED]),
            st.lists(ids, max_size=2, unique=True).map(tuple),
            st.booleans(),
            st.just("XID 79"),
        ),
    ),
    migrations=st.dictionaries(ids, moves),
    restarts=st.dictionaries(ids, restarts),
    holds=st.dictionaries(tiers, holds),
    stalled=st.dictionaries(ids, st.just("no token")),
    stall_restarts=st.dictionaries(ids, st.lists(times, max_size=4).map(tuple)),
    failures=st.dictionaries(tiers, failures),
)


def consistent(seen: ClusterState) -> ClusterState:
    """Moves and restarts are filed under their own endpoint."""
    return replace(
        seen,
        migrations={name: replace(item, endpoint_id=name) for name, item in seen.migrations.items()},
        restarts={name: replace(item, endpoint_id=name) for name, item in seen.restarts.items()},
    )


def work_of(seen: ClusterState) -> InProgress:
    return InProgress(
        migrations=dict(seen.migrations),
        restarts=dict(seen.restarts),
        holds=dict(seen.holds),
        failures=dict(seen.failures),
        stall_restarts=dict(seen.stall_restarts),
    )


@settings(max_examples=200)
@given(observations.map(consistent))
def test_any_state_comes_to_rest_and_every_command_has_a_reason(seen: ClusterState) -> None:
    work = work_of(seen)
    gpus = dict(seen.gpus)
    for _ in range(12):
        now = replace(
            seen,
            gpus=gpus,
            migrations=dict(work.migrations),
            restarts=dict(work.restarts),
            holds=dict(work.holds),
            failures=dict(work.failures),
            stall_restarts=dict(work.stall_restarts),
            hold_counts={tier: count for tier, (count, _) in work.hold_history.items()},
        )
        commands = reconcile(now, ReconcileRules())
        assert commands == reconcile(now, ReconcileRules()), "the same state gives the same commands"
        if not commands:
            return
        for command in commands:
            assert command.reason
            if isinstance(command, SetGpu):
                gpus[command.uuid] = replace(gpus[command.uuid], state=command.state)
            else:
                work.apply(command, seen.endpoints, seen.now_s)
    pytest.fail(f"still at it: {commands}")


phases = st.sampled_from(MigrationPhase)
commands = st.one_of(
    st.builds(BeginMigration, ids, tiers, phases, st.just("why"), st.just("")),
    st.builds(AdvanceMigration, ids, phases, phases, st.just("why")),
    st.builds(EndMigration, ids, phases, st.just("why")),
    st.builds(BeginRestart, ids, tiers, st.integers(1, 3), st.just("why")),
    st.builds(IssueRestart, ids, st.just("why")),
    st.builds(EndRestart, ids, st.just("why")),
    st.builds(HoldTier, tiers, st.just(60.0), st.just("why")),
    st.builds(ReleaseTier, tiers, st.just("why")),
)


@settings(max_examples=150)
@given(observations.map(consistent), st.lists(commands, max_size=10))
def test_a_command_that_does_not_fit_changes_nothing(seen: ClusterState, commands: list[Command]) -> None:
    work = work_of(seen)
    for command in commands:
        before = (dict(work.migrations), dict(work.restarts), dict(work.holds), dict(work.failures))
        applied = work.apply(command, seen.endpoints, seen.now_s)
        after = (work.migrations, work.restarts, work.holds, work.failures)
        if applied is None:
            assert after == before
        else:
            assert after != before or isinstance(command, AdvanceMigration)
        for name, move in work.migrations.items():
            old = before[0].get(name)
            assert old is None or move.phase is old.phase or move.phase in TRANSITIONS[old.phase]


@given(moves, phases)
def test_an_illegal_step_of_a_migration_raises(move: Migration, phase: MigrationPhase) -> None:
    if phase is move.phase:
        assert transition(move, phase, now_s=1.0, note="") is move
    elif phase in TRANSITIONS[move.phase]:
        assert transition(move, phase, now_s=1.0, note="n").phase is phase
    else:
        with pytest.raises(IllegalTransition):
            transition(move, phase, now_s=1.0, note="")
