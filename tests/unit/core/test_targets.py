"""How many replicas Serve is to run."""

from __future__ import annotations

import pytest

from controlplane.core.targets import TierTarget, desired_replicas

MOVE = TierTarget(3, "moving a away from GPU-1", 10.0)


@pytest.mark.parametrize(
    ("target", "unix_s", "running", "replicas", "why"),
    [
        (None, 0.0, {"a", "b"}, 2, "as configured"),
        (MOVE, 0.0, {"a", "b"}, 3, "moving a"),
        (MOVE, 10.0, {"a", "b"}, 3, "moving a"),
        (MOVE, 10.1, {"a", "b", "c"}, 2, "run out"),
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
