"""Random node failures."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.outages import OutageModel, Outages

MODEL = OutageModel(mtbf_s=1000.0, recovery_s=50.0)


def outage_times(*node_ids: str, seed: int = 0, until_s: float = 200_000.0) -> dict[str, list[float]]:
    """By node: the times at which it failed and came back, alternating."""
    clock = VirtualClock()
    moments: dict[str, list[float]] = {node_id: [] for node_id in node_ids}

    def note(node_id: str) -> None:
        moments[node_id].append(clock.now_s)

    outages = Outages(clock, MODEL, node_ids, seed=seed, on_lost=note, on_back=note)
    clock.run_until(until_s)
    assert outages.failures == sum(-(-len(found) // 2) for found in moments.values())
    return moments


def test_a_node_is_lost_for_its_recovery_time_and_present_for_a_random_time() -> None:
    moments = outage_times("a")["a"]
    assert [back - lost for lost, back in zip(moments[::2], moments[1::2], strict=False)] == pytest.approx(
        [50.0] * (len(moments) // 2)
    )
    there_s = [lost - back for back, lost in list(pairwise([0.0, *moments]))[::2]]
    assert statistics.fmean(there_s) == pytest.approx(1000.0, rel=0.2)


def test_failures_depend_on_the_seed_and_not_on_other_nodes() -> None:
    assert outage_times("a")["a"] == outage_times("a", "b")["a"]
    assert outage_times("a")["a"] != outage_times("b")["b"]
    assert outage_times("a")["a"] != outage_times("a", seed=1)["a"]
