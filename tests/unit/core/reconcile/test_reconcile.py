"""The reconciler's rules as tables: a rule, a state of the cluster, the commands with their reasons.

Unless a case says otherwise, the tier ``small`` has a base target of 2 and its replicas serve. ``ago(s)`` is
the time ``s`` seconds before now. The limits are the defaults of :class:`ReconcileRules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest

from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.health import GpuState
from controlplane.core.reconcile.migrations import CONTROLLER, Migration, MigrationPhase, Restart, TierHold
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
from tests.support.endpoints import make_endpoint

RULES = ReconcileRules(
    replacement_wait_s=60,
    start_limit_s=3600,
    settle_s=60,
    surge_limit=1,
    restart_limit_s=3600,
    stall_limit=3,
    stall_window_s=1800,
    crash_limit=3,
    crash_window_s=1800,
    hold_initial_s=600,
    hold_max_s=14_400,
)
NOW_S = 100_000.0
WHY = "GPU GPU-1: XID 79"
"""Why a replica has to leave, in all cases."""

READY, STARTING, RESTARTING = EndpointState.READY, EndpointState.STARTING, EndpointState.RESTARTING
DRAINING, FAILED, STOPPED = EndpointState.DRAINING, EndpointState.FAILED, EndpointState.STOPPED
ELSEWHERE, RETIRING, SETTLING = (
    MigrationPhase.STARTING_ELSEWHERE,
    MigrationPhase.RETIRING,
    MigrationPhase.SETTLING,
)

Case = tuple[str, ClusterState, list[Command]]


def ago(seconds: float) -> float:
    return NOW_S - seconds


def replica(name: str, state: EndpointState = READY, *, generation: int = 1, **fields: str) -> Endpoint:
    return make_endpoint(name, state, generation=generation, **{"tier": "small", **fields})


def migration(
    name: str, phase: MigrationPhase, since_s: float = NOW_S, *, surged: bool | None = None
) -> Migration:
    surged = phase is ELSEWHERE if surged is None else surged
    return Migration(name, "small", phase, WHY, since_s, since_s, surged)


def restart(name: str, since_s: float = NOW_S, *, issued: bool, tier: str = "small") -> Restart:
    return Restart(name, tier, 1, "operator", since_s, issued)


def state(
    *replicas: Endpoint,
    target: int = 2,
    leaving: tuple[str, ...] = (),
    room: Mapping[str, str] | None = None,
    gpu: GpuOutOfUse | None = None,
    migrations: tuple[Migration, ...] = (),
    restarts: tuple[Restart, ...] = (),
    hold: TierHold | None = None,
    stalled: str = "",
    stall_restarts_s: tuple[float, ...] = (),
    failures_s: tuple[float, ...] = (),
    hold_count: int = 0,
) -> ClusterState:
    return ClusterState(
        now_s=NOW_S,
        endpoints={item.endpoint_id: item for item in replicas},
        base_targets={"small": target},
        leaving=dict.fromkeys(leaving, WHY),
        room=room or {},
        gpus={"GPU-1": gpu} if gpu else {},
        migrations={item.endpoint_id: item for item in migrations},
        restarts={item.endpoint_id: item for item in restarts},
        holds={"small": hold} if hold else {},
        stalled={stalled: "3 requests run but produce no tokens"} if stalled else {},
        stall_restarts={stalled: stall_restarts_s} if stalled else {},
        failures={"small": tuple(ReplicaFailure(at_s, "x", "bad flag") for at_s in failures_s)},
        hold_counts={"small": hold_count},
    )


A, B, C = replica("a"), replica("b"), replica("c")


# --- GPUs ---------------------------------------------------------------------------------------------------


def gpu(state: GpuState, *holders: str, must_leave: bool = True) -> GpuOutOfUse:
    return GpuOutOfUse(state, holders, must_leave, "XID 79")


GPUS: list[Case] = [
    (
        "a cordoned GPU is draining while replicas hold it that must leave",
        state(A, gpu=gpu(GpuState.CORDONED, "a", "b")),
        [SetGpu("GPU-1", GpuState.DRAINING, "a, b must leave: XID 79")],
    ),
    (
        "a cordoned GPU whose replicas may stay is left as it is",
        state(A, gpu=gpu(GpuState.CORDONED, "a", must_leave=False)),
        [],
    ),
    (
        "a cordoned GPU that nothing holds is drained",
        state(gpu=gpu(GpuState.CORDONED)),
        [SetGpu("GPU-1", GpuState.DRAINED, "nothing runs on it")],
    ),
    (
        "a draining GPU that nothing holds any more is drained",
        state(gpu=gpu(GpuState.DRAINING)),
        [SetGpu("GPU-1", GpuState.DRAINED, "nothing runs on it")],
    ),
    ("a draining GPU waits for its holders", state(A, gpu=gpu(GpuState.DRAINING, "a")), []),
    ("a drained GPU stays drained", state(gpu=gpu(GpuState.DRAINED)), []),
]

# --- a replica has to leave: how its migration begins -------------------------------------------------------


def begins(name: str, phase: MigrationPhase, note: str) -> Command:
    return BeginMigration(name, "small", phase, WHY, note)


BEGIN_MIGRATION: list[Case] = [
    ("nothing has to leave: nothing to do", state(A, B), []),
    (
        "with room elsewhere, a replacement starts first",
        state(A, B, leaving=("a",), room={"a": "on n2"}),
        [begins("a", ELSEWHERE, "there is room: on n2")],
    ),
    (
        "one replacement per tier at a time: the second replica waits",
        state(A, B, leaving=("a", "b"), room={"a": "on n2", "b": "on n2"}),
        [begins("a", ELSEWHERE, "there is room: on n2")],
    ),
    (
        "a replica waits while a replacement of another one is still starting",
        state(A, B, leaving=("a", "b"), room={"b": "on n2"}, migrations=(migration("a", ELSEWHERE, ago(1)),)),
        [],
    ),
    (
        "without room elsewhere, a replica is retired first",
        state(A, B, leaving=("a",), room={"a": ""}),
        [begins("a", RETIRING, "there is no room elsewhere")],
    ),
    (
        "without room, one replica of a tier at a time: the others go on serving where they are",
        state(A, B, leaving=("a", "b"), room={"a": "", "b": ""}),
        [begins("a", RETIRING, "there is no room elsewhere")],
    ),
    (
        "a replica for which room has not been looked for yet waits",
        state(A, B, leaving=("a",)),
        [],
    ),
    (
        "if more replicas serve than the tier needs, one that has to leave is retired at once",
        state(A, B, C, leaving=("a",)),
        [begins("a", RETIRING, "enough other replicas serve")],
    ),
    (
        "only as many replicas are retired at once as the tier does not need",
        state(A, B, C, leaving=("a", "b")),
        [begins("a", RETIRING, "enough other replicas serve")],
    ),
    (
        "a replica that serves no requests is retired at once, with or without room",
        state(replica("a", STARTING), B, leaving=("a",), room={"a": "on n2"}),
        [begins("a", RETIRING, "it serves no requests")],
    ),
    (
        "a replica that drains already is retired",
        state(replica("a", DRAINING), B, leaving=("a",)),
        [begins("a", RETIRING, "it is draining already")],
    ),
    (
        "a replica that has ended need not leave",
        state(replica("a", FAILED), replica("b", STOPPED), leaving=("a", "b", "unknown")),
        [],
    ),
    (
        "the replicas of a drained tier are all retired at once",
        state(A, B, leaving=("a", "b"), hold=TierHold("too expensive", ago(9), must_leave=True)),
        [begins("a", RETIRING, "its tier is drained"), begins("b", RETIRING, "its tier is drained")],
    ),
    (
        "in a held tier no replacement would start, so replicas are retired one at a time",
        state(A, B, leaving=("a", "b"), room={"a": "on n2"}, hold=TierHold("bad flag", ago(9))),
        [begins("a", RETIRING, "its tier is held")],
    ),
]

# --- how a migration goes on --------------------------------------------------------------------------------


def advances(name: str, before: MigrationPhase, after: MigrationPhase, reason: str) -> Command:
    return AdvanceMigration(name, before, after, reason)


ADVANCE_MIGRATION: list[Case] = [
    (
        "the old replica is retired once as many others serve as the tier needs",
        state(A, B, C, leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(30)),)),
        [advances("a", ELSEWHERE, RETIRING, "2 other replicas serve")],
    ),
    (
        "a replica that is being retired does not count as serving",
        state(
            A,
            B,
            C,
            leaving=("a", "c"),
            migrations=(migration("a", ELSEWHERE, ago(30)), migration("c", RETIRING, ago(9))),
        ),
        [],
    ),
    (
        "the old replica goes on serving while its replacement starts",
        state(
            A, B, replica("c", STARTING), leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(3599)),)
        ),
        [],
    ),
    (
        "a replacement that is not ready after an hour is no longer waited for",
        state(
            A, B, replica("c", STARTING), leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(3600)),)
        ),
        [advances("a", ELSEWHERE, RETIRING, "no replacement was ready after 3600 s")],
    ),
    (
        "the old replica waits a minute for a replacement to begin to start",
        state(A, B, leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(59)),)),
        [],
    ),
    (
        "if none begins to start in a minute, the old replica is retired first: that may make room",
        state(A, B, leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(60)),)),
        [advances("a", ELSEWHERE, RETIRING, "no replacement has begun to start after 60 s")],
    ),
    (
        "a starting replica that has to leave itself is no replacement",
        state(
            A,
            B,
            replica("c", STARTING),
            leaving=("a", "c"),
            migrations=(migration("a", ELSEWHERE, ago(60)), migration("c", RETIRING, ago(9), surged=False)),
        ),
        [advances("a", ELSEWHERE, RETIRING, "no replacement has begun to start after 60 s")],
    ),
    (
        "an old replica that no longer serves requests is retired without waiting",
        state(replica("a", RESTARTING), B, leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(9)),)),
        [advances("a", ELSEWHERE, RETIRING, "it is restarting and serves no requests")],
    ),
    (
        "a migration ends if the replica may stay again, and its tier's target is the base target again",
        state(A, B, migrations=(migration("a", ELSEWHERE, ago(9)),)),
        [EndMigration("a", ELSEWHERE, "the replica no longer has to leave")],
    ),
    (
        "a replica that got the command to retire is not called back",
        state(A, B, migrations=(migration("a", RETIRING, ago(9)),)),
        [],
    ),
    (
        "once the replica has ended, the migration settles",
        state(B, leaving=("a",), migrations=(migration("a", RETIRING, ago(9)),)),
        [advances("a", RETIRING, SETTLING, "the replica has ended")],
    ),
    (
        "the migration also settles if the replica ended before it got the command to retire",
        state(replica("a", FAILED), B, leaving=("a",), migrations=(migration("a", ELSEWHERE, ago(9)),)),
        [advances("a", ELSEWHERE, SETTLING, "the replica has ended")],
    ),
    (
        "a replica that has ended stays listed as leaving until Serve has certainly seen its end",
        state(B, migrations=(migration("a", SETTLING, ago(59)),)),
        [],
    ),
    (
        "after that, the migration is over",
        state(B, migrations=(migration("a", SETTLING, ago(60)),)),
        [EndMigration("a", SETTLING, "ended 60 s ago")],
    ),
    (
        "the oldest migration goes first: the spare replica is spent on it",
        state(
            A,
            B,
            C,
            leaving=("a", "b"),
            migrations=(migration("a", ELSEWHERE, ago(10)), migration("b", ELSEWHERE, ago(20))),
        ),
        [advances("b", ELSEWHERE, RETIRING, "2 other replicas serve")],
    ),
]

# --- restarts -----------------------------------------------------------------------------------------------

NO_OTHER = "no other engine of the tier is restarting"

RESTARTS: list[Case] = [
    (
        "engines of a tier restart one at a time, the earliest request first",
        state(A, B, restarts=(restart("a", ago(1), issued=False), restart("b", ago(2), issued=False))),
        [IssueRestart("b", NO_OTHER)],
    ),
    (
        "a restart waits while another engine of its tier restarts",
        state(A, B, restarts=(restart("a", ago(1), issued=False), restart("b", ago(2), issued=True))),
        [],
    ),
    (
        "restarts of different tiers don't wait for each other",
        state(
            A,
            replica("z", tier="other"),
            restarts=(restart("a", ago(1), issued=False), restart("z", ago(2), issued=True, tier="other")),
        ),
        [IssueRestart("a", NO_OTHER)],
    ),
    (
        "the only replica that serves restarts only once another one serves",
        state(A, replica("b", STARTING), restarts=(restart("a", issued=False),)),
        [],
    ),
    (
        "the only replica of a tier restarts without waiting",
        state(A, restarts=(restart("a", issued=False),)),
        [IssueRestart("a", NO_OTHER)],
    ),
    (
        "a replica that serves no requests restarts without waiting",
        state(replica("a", FAILED), replica("b", STARTING), restarts=(restart("a", issued=False),)),
        [IssueRestart("a", NO_OTHER)],
    ),
    (
        "a restart is over when the new engine serves",
        state(replica("a", generation=2), B, restarts=(restart("a", ago(30), issued=True),)),
        [EndRestart("a", "generation 2 serves")],
    ),
    (
        "a restart is over when the new engine has failed",
        state(
            replica("a", FAILED, generation=2, diagnosis="bad flag"),
            B,
            restarts=(restart("a", ago(30), issued=True),),
        ),
        [EndRestart("a", "the new engine failed: bad flag")],
    ),
    (
        "a restart goes on while the new engine starts",
        state(replica("a", STARTING, generation=2), B, restarts=(restart("a", ago(3599), issued=True),)),
        [],
    ),
    (
        "a new engine that is not ready after an hour is no longer waited for",
        state(replica("a", STARTING, generation=2), B, restarts=(restart("a", ago(3600), issued=True),)),
        [EndRestart("a", "the new engine was not ready after 3600 s")],
    ),
    (
        "a restart that the replica does not carry out is given up after an hour",
        state(A, B, restarts=(restart("a", ago(3600), issued=True),)),
        [EndRestart("a", "the replica has not restarted after 3600 s")],
    ),
    (
        "a replica that drains, has ended or is not known is not restarted",
        state(
            replica("a", DRAINING),
            replica("b", STOPPED),
            restarts=(
                restart("a", ago(3), issued=False),
                restart("b", ago(2), issued=True),
                restart("unknown", ago(1), issued=False),
            ),
        ),
        [EndRestart(name, "the replica is gone") for name in ("a", "b", "unknown")],
    ),
]

# --- engines that make no progress --------------------------------------------------------------------------

NO_TOKENS = "3 requests run but produce no tokens"

STALLED: list[Case] = [
    (
        "a stalled engine is restarted at once",
        state(A, B, stalled="a"),
        [BeginRestart("a", "small", 1, NO_TOKENS)],
    ),
    (
        "it is restarted again if it was restarted for that twice before",
        state(A, B, stalled="a", stall_restarts_s=(ago(1700), ago(900))),
        [BeginRestart("a", "small", 1, NO_TOKENS)],
    ),
    (
        "after three restarts within half an hour the whole replica is replaced",
        state(A, B, stalled="a", stall_restarts_s=(ago(1799), ago(1200), ago(600))),
        [BeginMigration("a", "small", RETIRING, NO_TOKENS, "it was restarted 3 times before for this")],
    ),
    (
        "restarts more than half an hour ago don't count",
        state(A, B, stalled="a", stall_restarts_s=(ago(1800), ago(1200), ago(600))),
        [BeginRestart("a", "small", 1, NO_TOKENS)],
    ),
    (
        "a stalled engine that does not serve is left to its supervisor",
        state(replica("a", STARTING), stalled="a"),
        [],
    ),
    (
        "a stalled engine whose restart is requested already is left alone",
        state(A, stalled="a", restarts=(restart("a", issued=True),)),
        [],
    ),
    (
        "a stalled engine whose replica leaves is left alone",
        state(A, B, stalled="a", leaving=("a",), migrations=(migration("a", RETIRING),)),
        [],
    ),
]

# --- tiers whose replicas fail again and again --------------------------------------------------------------


def held(for_s: int, failures: int = 3) -> Command:
    reason = (
        f"{failures} replicas failed in 1800 s; the last one: bad flag; replicas start again in {for_s} s, "
        "or now with `tierplane restart small`"
    )
    return HoldTier("small", for_s, reason)


HOLDS: list[Case] = [
    ("two failures do not hold a tier", state(failures_s=(ago(20), ago(10))), []),
    (
        "three failures within half an hour hold the tier",
        state(failures_s=(ago(1799), ago(20), ago(10))),
        [held(600)],
    ),
    ("failures more than half an hour ago don't count", state(failures_s=(ago(1800), ago(20), ago(10))), []),
    ("each further hold lasts twice as long", state(failures_s=(ago(3),) * 4, hold_count=2), [held(2400, 4)]),
    ("a hold lasts four hours at most", state(failures_s=(ago(3),) * 3, hold_count=1000), [held(14_400)]),
    (
        "a tier that is held already is not held again",
        state(failures_s=(ago(3),) * 3, hold=TierHold("bad flag", ago(9), CONTROLLER, NOW_S + 1)),
        [],
    ),
    (
        "when the hold has passed, the tier is released",
        state(hold=TierHold("bad flag", ago(600), CONTROLLER, NOW_S)),
        [ReleaseTier("small", "held for 600 s; replicas start again")],
    ),
    (
        "an operator's hold lasts until an operator releases it",
        state(hold=TierHold("bad flag", ago(9e9))),
        [],
    ),
]

TABLE = [*GPUS, *BEGIN_MIGRATION, *ADVANCE_MIGRATION, *RESTARTS, *STALLED, *HOLDS]


@pytest.mark.parametrize(("given", "commands"), [pytest.param(*case, id=rule) for rule, *case in TABLE])
def test_rule(given: ClusterState, commands: list[Command]) -> None:
    assert list(reconcile(given, RULES)) == commands


def test_the_tables_have_every_kind_of_command() -> None:
    assert {type(command) for _, _, commands in TABLE for command in commands} == set(get_args(Command))


def test_the_rules_here_are_the_defaults() -> None:
    assert ReconcileRules() == RULES


def test_commands_come_in_the_order_in_which_to_carry_them_out() -> None:
    """GPUs first, then migrations that go on, then those that begin, so that a spare replica is used once."""
    everything = state(
        A,
        B,
        C,
        replica("d"),
        target=2,
        gpu=gpu(GpuState.CORDONED, "a"),
        leaving=("a", "b"),
        room={"b": "on n2"},
        migrations=(migration("a", ELSEWHERE, ago(30)),),
        stalled="c",
        restarts=(restart("d", issued=False),),
        failures_s=(ago(3),) * 3,
    )
    assert [type(command) for command in reconcile(everything, RULES)] == [
        SetGpu,
        AdvanceMigration,
        IssueRestart,
        BeginRestart,
        HoldTier,
    ]
