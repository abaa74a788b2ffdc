from __future__ import annotations

import pytest

from controlplane.core.autoscaling.gpu_budget import GpuDemand, carried_gains, share_gpus


def counts(demands: list[GpuDemand], gpus: float) -> list[int]:
    return list(share_gpus(demands, gpus))


def test_enough_for_all_gives_all() -> None:
    demands = [GpuDemand(1.0, 1, 3), GpuDemand(2.0, 1, 2)]
    assert counts(demands, 7.0) == [3, 2]


def test_minimums_come_first_and_priority_before_gain() -> None:
    demands = [
        GpuDemand(1.0, 1, 8, priority=0, gains=(9.0,) * 8),
        GpuDemand(1.0, 1, 3, priority=1, gains=(1.0,) * 3),
    ]
    assert counts(demands, 2.0) == [1, 1]
    assert counts(demands, 4.0) == [1, 3]
    assert counts(demands, 6.0) == [3, 3]


def test_the_largest_gain_per_gpu_goes_first() -> None:
    demands = [
        GpuDemand(1.0, 0, 4, gains=(3.0, 2.0, 1.0, 0.5)),
        GpuDemand(2.0, 0, 2, gains=(5.0, 1.0)),
    ]
    assert counts(demands, 3.0) == [1, 1]


def test_a_tier_without_gpus_takes_none() -> None:
    assert counts([GpuDemand(0.0, 1, 5), GpuDemand(1.0, 1, 2)], 1.0) == [5, 1]


def test_gains_are_what_each_replica_carries() -> None:
    assert carried_gains(5.0, 2.0, 4) == pytest.approx((2.0, 2.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("gpus", "running", "granted"),
    [
        # Two GPUs are left and the less important tier runs on both: it retains them, the other waits.
        (2.0, (0, 2), [2, 2]),
        # It runs on all four that are left: the part above its minimum goes to the other's minimum.
        (4.0, (0, 4), [2, 2]),
        # It does not run, so the important tier goes first.
        (2.0, (0, 0), [2, 0]),
        # No GPU is left: the important tier waits, then the other.
        (0.0, (0, 0), [2, 0]),
        (2.0, (2, 0), [2, 2]),
        # No GPU is reported, but everything runs.
        (0.0, (2, 2), [2, 2]),
    ],
)
def test_a_running_minimum_is_never_taken_and_the_most_important_tier_waits(
    gpus: float, running: tuple[int, int], granted: list[int]
) -> None:
    important, other = running
    demands = [
        GpuDemand(1.0, 2, 3, priority=1, ordered=2, running=important),
        GpuDemand(1.0, 2, 4, ordered=4, running=other),
    ]
    assert counts(demands, gpus) == granted


def test_a_tier_without_gpus_that_starts_delays_no_other() -> None:
    demands = [GpuDemand(0.0, 1, 1, priority=1), GpuDemand(1.0, 1, 1)]
    assert counts(demands, 0.0) == [1, 1]
