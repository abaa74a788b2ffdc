"""How many replicas Serve is to run."""

from __future__ import annotations

import pytest

from controlplane.core.reconcile.migrations import CONTROLLER, Migration, MigrationPhase, TierHold
from controlplane.core.reconcile.replica_targets import TierTarget, desired_replicas, tier_target

MOVE = TierTarget(3, "moving a away from GPU-1", 10.0)


@pytest.mark.parametrize(
    ("target", "unix_s", "running", "replicas", "why"),
    [
        (None, 0.0, {"a", "b"}, 2, "as configured"),
        (MOVE, 0.0, {"a", "b"}, 3, "moving a"),
        (MOVE, 10.0, {"a", "b"}, 3, "moving a"),
        (MOVE, 10.1, {"a", "b", "c"}, 2, "expired"),
        (TierTarget(2, "moved", 10.0, ("a",)), 0.0, {"a", "b", "c"}, 3, "until it has left"),
        (TierTarget(2, "moved", 10.0, ("a",)), 0.0, {"b", "c"}, 2, "moved"),
        (TierTarget(2, "moved", 10.0, ("a", "b")), 0.0, {"a", "b", "c", "d"}, 4, "2 more"),
    ],
)
def test_what_serve_is_told(
    target: TierTarget | None, unix_s: float, running: set[str], replicas: int, why: str
) -> None:
    answer = desired_replicas(target, unix_s, configured=2, running=running)
    assert answer.replicas == replicas
    assert why in answer.reason


def move(name: str, phase: MigrationPhase) -> Migration:
    return Migration(name, "small", phase, "XID 79", 0.0, 0.0)


HOLD = TierHold("3 replicas failed", 0.0, CONTROLLER, 60.0)
DRAINED = TierHold("costs too much", 0.0, must_leave=True)


@pytest.mark.parametrize(
    ("moves", "hold", "serving", "replicas", "leaving"),
    [
        ([], None, 2, 2, ()),
        ([move("a", MigrationPhase.STARTING_ELSEWHERE)], None, 2, 3, ()),
        ([move("a", MigrationPhase.RETIRING)], None, 3, 2, ("a",)),
        (
            [move("a", MigrationPhase.SETTLING), move("b", MigrationPhase.STARTING_ELSEWHERE)],
            None,
            2,
            3,
            ("a",),
        ),
        ([], HOLD, 1, 1, ()),
        ([], HOLD, 5, 2, ()),
        ([move("a", MigrationPhase.RETIRING)], DRAINED, 2, 0, ()),
        ([], TierHold("by hand", 0.0), 2, 2, ()),
    ],
)
def test_what_is_published(
    moves: list[Migration], hold: TierHold | None, serving: int, replicas: int, leaving: tuple[str, ...]
) -> None:
    others = [Migration("z", "other", MigrationPhase.STARTING_ELSEWHERE, "XID 79", 0.0, 0.0)]
    target = tier_target("small", 2, [*moves, *others], hold, serving=serving, valid_until_unix_s=9.0)
    assert (target.replicas, target.leaving, target.valid_until_unix_s) == (replicas, leaving, 9.0)
    assert target.reason
