from __future__ import annotations

import pytest

from controlplane.core.autoscaling.gpu_budget import GpuDemand, carried_gains, share_gpus


def counts(demands: list[GpuDemand], gpus: float) -> list[int]:
    return [share.replicas for share in share_gpus(demands, gpus)]


def test_enough_for_all_gives_all() -> None:
    demands = [GpuDemand("a", 1.0, 1, 3), GpuDemand("b", 2.0, 1, 2)]
    shares = share_gpus(demands, 7.0)
    assert [share.replicas for share in shares] == [3, 2]
    assert shares[0].reason == "all 3 that it wants"


def test_minimums_come_before_wishes_and_priority_before_gain() -> None:
    demands = [
        GpuDemand("a", 1.0, 1, 8, priority=0, gains=(9.0,) * 8),
        GpuDemand("b", 1.0, 1, 3, priority=1, gains=(1.0,) * 3),
    ]
    assert counts(demands, 2.0) == [1, 1]
    assert counts(demands, 4.0) == [1, 3]
    assert counts(demands, 6.0) == [3, 3]


def test_the_largest_gain_per_gpu_goes_first() -> None:
    demands = [
        GpuDemand("a", 1.0, 0, 4, gains=(3.0, 2.0, 1.0, 0.5)),
        GpuDemand("b", 2.0, 0, 2, gains=(5.0, 1.0)),
    ]
    assert counts(demands, 3.0) == [1, 1]
    assert "fewer than the 4" in share_gpus(demands, 3.0)[0].reason


def test_a_tier_without_gpus_takes_none() -> None:
    assert counts([GpuDemand("cpu", 0.0, 1, 5), GpuDemand("a", 1.0, 1, 2)], 1.0) == [5, 1]


def test_gains_are_what_each_replica_carries() -> None:
    assert carried_gains(5.0, 2.0, 4) == pytest.approx((2.0, 2.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("gpus", "running", "given"),
    [
        # Two are left, and the less important tier runs on both: it keeps them, the other waits.
        (2.0, (0, 2), [2, 2]),
        # It runs on all four that are left: what is over its minimum goes to the other's minimum.
        (4.0, (0, 4), [2, 2]),
        # It doesn't run, so the important one goes first.
        (2.0, (0, 0), [2, 0]),
        # Nothing is left: the important one waits, then the other.
        (0.0, (0, 0), [2, 0]),
        (2.0, (2, 0), [2, 2]),
        # Nobody is reported, but all runs.
        (0.0, (2, 2), [2, 2]),
    ],
)
def test_a_minimum_that_runs_is_never_taken_and_who_waits_is_the_most_important(
    gpus: float, running: tuple[int, int], given: list[int]
) -> None:
    important, other = running
    demands = [
        GpuDemand("a", 1.0, 2, 3, priority=1, held=2, running=important),
        GpuDemand("b", 1.0, 2, 4, held=4, running=other),
    ]
    assert counts(demands, gpus) == given


def test_a_tier_without_gpus_that_starts_holds_up_nobody() -> None:
    demands = [GpuDemand("cpu", 0.0, 1, 1, priority=1), GpuDemand("a", 1.0, 1, 1)]
    assert counts(demands, 0.0) == [1, 1]
