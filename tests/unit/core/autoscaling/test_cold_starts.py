"""How long starts take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from controlplane.core.autoscaling.cold_starts import MAX_STARTS, SCHEDULING_S, ColdStarts
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from tests.support.endpoints import make_endpoint


def ready(number: int, took_s: float, **more: Any) -> Endpoint:
    times = {"started_unix_s": 100.0, "since_unix_s": 100.0 + took_s}
    return make_endpoint(f"e{number}", **{"tier": "small", "generation": 1, **times, **more})


def observed(starts: ColdStarts, *endpoints: Endpoint) -> float | None:
    starts.learn({item.endpoint_id: item for item in endpoints})
    return starts.longest_s("small")


def test_the_longest_of_the_last_starts_counts_each_once() -> None:
    starts = ColdStarts()
    assert observed(starts) is None
    assert observed(starts, ready(1, 20.0)) == 20.0 + SCHEDULING_S
    assert observed(starts, ready(1, 50.0)) == 20.0 + SCHEDULING_S, "the same process, ready again"
    assert observed(starts, ready(1, 20.0), ready(2, 30.0)) == 30.0 + SCHEDULING_S
    for number in range(3, 3 + MAX_STARTS):
        found = observed(starts, ready(number, 10.0))
    assert found == 10.0 + SCHEDULING_S, "the slow ones are long ago"
    assert starts.longest_s("other") is None


def test_only_cold_starts_count() -> None:
    starts = ColdStarts()
    assert observed(starts, ready(1, 20.0, state=EndpointState.STARTING)) is None
    assert observed(starts, replace(ready(2, 20.0), generation=2)) is None, "replaced in the same replica"
    assert observed(starts, replace(ready(3, 20.0), started_unix_s=0.0)) is None, "its start is unknown"


def test_it_survives_as_json() -> None:
    starts, again = ColdStarts(), ColdStarts()
    observed(starts, ready(1, 20.0), ready(2, 30.0))
    again.restore(starts.values())
    assert again.values() == starts.values() == {"small": [20.0, 30.0]}
