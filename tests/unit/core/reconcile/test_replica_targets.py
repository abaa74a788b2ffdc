"""How many replicas Serve should run."""

from __future__ import annotations

import pytest

from controlplane.core.reconcile.migrations import CONTROLLER, Migration, MigrationPhase, TierHold
from controlplane.core.reconcile.replica_targets import TierTarget, desired_replicas, tier_target

MIGRATING = TierTarget(3, "a leaves GPU-1", 10.0)


@pytest.mark.parametrize(
    ("target", "unix_s", "running", "replicas", "why"),
    [
        (None, 0.0, {"a", "b"}, 2, "as configured"),
        (MIGRATING, 0.0, {"a", "b"}, 3, "a leaves GPU-1"),
        (MIGRATING, 10.0, {"a", "b"}, 3, "a leaves GPU-1"),
        (MIGRATING, 10.1, {"a", "b", "c"}, 2, "expired"),
        (TierTarget(2, "a has left", 10.0, ("a",)), 0.0, {"a", "b", "c"}, 3, "until it has left"),
        (TierTarget(2, "a has left", 10.0, ("a",)), 0.0, {"b", "c"}, 2, "a has left"),
        (TierTarget(2, "a has left", 10.0, ("a", "b")), 0.0, {"a", "b", "c", "d"}, 4, "2 more"),
    ],
)
def test_desired_replicas_are_the_target_and_those_that_leave(
    target: TierTarget | None, unix_s: float, running: set[str], replicas: int, why: str
) -> None:
    desired = desired_replicas(target, unix_s, configured=2, running=running)
    assert desired.replicas == replicas
    assert why in desired.reason


def migration(name: str, phase: MigrationPhase) -> Migration:
    return Migration(name, "small", phase, "XID 79", 0.0, 0.0)


HOLD = TierHold("3 replicas failed", 0.0, CONTROLLER, 60.0)
DRAINED = TierHold("costs too much", 0.0, must_leave=True)


@pytest.mark.parametrize(
    ("migrations", "hold", "serving", "replicas", "leaving"),
    [
        ([], None, 2, 2, ()),
        ([migration("a", MigrationPhase.STARTING_ELSEWHERE)], None, 2, 3, ()),
        ([migration("a", MigrationPhase.RETIRING)], None, 3, 2, ("a",)),
        (
            [migration("a", MigrationPhase.SETTLING), migration("b", MigrationPhase.STARTING_ELSEWHERE)],
            None,
            2,
            3,
            ("a",),
        ),
        ([], HOLD, 1, 1, ()),
        ([], HOLD, 5, 2, ()),
        ([migration("a", MigrationPhase.RETIRING)], DRAINED, 2, 0, ()),
        ([], TierHold("by hand", 0.0), 2, 2, ()),
    ],
)
def test_target_that_the_controller_publishes(
    migrations: list[Migration], hold: TierHold | None, serving: int, replicas: int, leaving: tuple[str, ...]
) -> None:
    others = [Migration("z", "other", MigrationPhase.STARTING_ELSEWHERE, "XID 79", 0.0, 0.0)]
    target = tier_target("small", 2, [*migrations, *others], hold, serving=serving, valid_until_unix_s=9.0)
    assert (target.replicas, target.leaving, target.valid_until_unix_s) == (replicas, leaving, 9.0)
    assert target.reason
