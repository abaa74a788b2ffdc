"""Requests on their way through routing and the queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from controlplane.core.admission.queue import AdmissionQueue, AdmissionSettings, RejectReason
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.request import Priority
from controlplane.core.routing.dispatcher import Dispatcher, DispatchRefused, Started, WaitsInQueue, lane_key
from controlplane.core.routing.endpoint_table import EndpointTable, LoadSettings
from controlplane.core.routing.router import RouteOutcome
from controlplane.core.routing.tier_table import (
    OverflowDirection,
    RouteRefusal,
    RouteRequest,
    TierPolicy,
    TierTable,
    resolve,
)

NOW_S = 10.0
TABLE = TierTable.build([TierPolicy("small", "s"), TierPolicy("large", "l", spill=OverflowDirection.NONE)])
SMALL = Endpoint("small-0", "small", "s", "vllm", "http://127.0.0.1:1", EndpointState.READY, 1, generation=1)
LARGE = replace(SMALL, endpoint_id="large-0", tier="large", model="l")


def dispatcher(*endpoints: Endpoint, capacity: int = 10, **settings: Any) -> Dispatcher:
    endpoint_table = EndpointTable(TABLE, LoadSettings(**settings))
    endpoint_table.apply(endpoints)
    return Dispatcher(endpoint_table, AdmissionQueue(AdmissionSettings(capacity=capacity)))


def submit(
    plane: Dispatcher, request: RouteRequest, now_s: float = NOW_S, **fields: Any
) -> Started | WaitsInQueue | DispatchRefused:
    route = resolve(request, TABLE)
    return plane.submit(request, route, now_s, 0, **{"deadline_s": NOW_S + 60.0, **fields})


def test_a_request_starts_or_waits_until_a_slot_is_free() -> None:
    plane = dispatcher(LARGE)
    first = submit(plane, RouteRequest(model="large"))
    assert isinstance(first, Started)
    second = submit(plane, RouteRequest(model="large"))
    assert isinstance(second, WaitsInQueue)
    assert second.decision.reason == "model=large; large full"
    assert plane.pump(NOW_S, 0) == []
    first.slot.succeed(NOW_S + 1)
    (started,) = plane.pump(NOW_S + 1, 0)
    assert started.ticket is second.ticket
    assert started.slot.load.endpoint.endpoint_id == "large-0"
    assert plane.pump(NOW_S + 1, 0) == []


def test_a_tier_that_becomes_ready_gets_the_requests_that_wait_for_it() -> None:
    plane = dispatcher(replace(LARGE, state=EndpointState.RESTARTING))
    waiting = submit(plane, RouteRequest(model="large"))
    assert isinstance(waiting, WaitsInQueue)
    plane.endpoint_table.apply([replace(LARGE, generation=2)])
    (started,) = plane.pump(NOW_S, 0)
    assert started.decision.reason == "model=large"


def test_a_full_tier_does_not_delay_requests_for_others() -> None:
    plane = dispatcher(SMALL, LARGE)
    running = [submit(plane, RouteRequest(model=name)) for name in ("small", "large")]
    waits_high = submit(plane, RouteRequest(model="large", priority=Priority.HIGH))
    waits_low = submit(plane, RouteRequest(model="s", priority=Priority.LOW))
    assert isinstance(waits_high, WaitsInQueue)
    assert isinstance(waits_low, WaitsInQueue)
    assert isinstance(running[0], Started)
    running[0].slot.succeed(NOW_S + 1)
    assert [one.ticket for one in plane.pump(NOW_S + 1, 0)] == [waits_low.ticket]


def test_requests_that_may_spill_have_another_lane_than_those_that_may_not() -> None:
    spills, stays = RouteRequest(model="small"), RouteRequest(model="s")
    keys = {lane_key(resolve(request, TABLE), request) for request in (spills, stays)}
    assert len(keys) == 2
    order = [RouteRequest(models=models) for models in (("small", "large"), ("large", "small"))]
    assert len({lane_key(resolve(request, TABLE), request) for request in order}) == 1


def test_refusals_of_routing_and_of_the_queue() -> None:
    plane = dispatcher(LARGE, capacity=1)
    unknown = submit(plane, RouteRequest(model="nope"))
    assert isinstance(unknown, DispatchRefused)
    assert unknown.decision.refusal is RouteRefusal.UNKNOWN_MODEL
    assert unknown.rejected is None
    late = submit(plane, RouteRequest(model="large"), deadline_s=NOW_S)
    assert isinstance(late, DispatchRefused)
    assert late.rejected is not None
    assert late.rejected.reason is RejectReason.TOO_LATE
    submit(plane, RouteRequest(model="large"))
    submit(plane, RouteRequest(model="large"))
    full = submit(plane, RouteRequest(model="large"))
    assert isinstance(full, DispatchRefused)
    assert full.rejected is not None
    assert full.rejected.reason is RejectReason.FULL


def test_sheds_by_the_observed_speed_of_the_tiers() -> None:
    plane = dispatcher(LARGE)
    first = submit(plane, RouteRequest(model="large"))
    assert isinstance(first, Started)
    first.slot.succeed(NOW_S + 4.0)
    submit(plane, RouteRequest(model="large"), NOW_S + 4.0)
    shed = submit(plane, RouteRequest(model="large"), NOW_S + 4.0, deadline_s=NOW_S + 7.0)
    assert isinstance(shed, DispatchRefused)
    assert shed.rejected is not None
    assert (shed.rejected.reason, shed.rejected.wait_s) == (RejectReason.WOULD_MISS_DEADLINE, 4.0)


def test_a_retry_has_the_age_of_its_request_and_goes_elsewhere() -> None:
    plane = dispatcher(replace(LARGE, concurrency_limit=2), replace(LARGE, endpoint_id="large-1"))
    first = submit(plane, RouteRequest(model="large"))
    assert isinstance(first, Started)
    first.slot.fail(NOW_S + 1)
    request = RouteRequest(model="large", exclude=frozenset({first.slot.load.key}))
    second = submit(plane, request, NOW_S + 1, arrived_s=NOW_S)
    assert isinstance(second, Started)
    assert second.slot.load is not first.slot.load
    third = submit(plane, request, NOW_S + 2, arrived_s=NOW_S)
    assert isinstance(third, WaitsInQueue)
    assert third.ticket.arrived_s == NOW_S


def test_queued_requests_that_no_endpoint_can_serve_any_more_are_removed() -> None:
    plane = dispatcher(replace(LARGE, state=EndpointState.RESTARTING), replace(SMALL, concurrency_limit=2))
    waiting = submit(plane, RouteRequest(model="l"))
    assert isinstance(waiting, WaitsInQueue)
    assert plane.remove_unservable(NOW_S, 0) == []
    plane.endpoint_table.apply([replace(LARGE, state=EndpointState.FAILED, diagnosis="bad flag"), SMALL])
    ((ticket, decision),) = plane.remove_unservable(NOW_S, 0)
    assert ticket is waiting.ticket
    assert (decision.outcome, decision.message) == (
        RouteOutcome.REJECT,
        "all endpoints of large failed: bad flag",
    )
    assert len(plane.queue) == 0


def test_a_ticket_that_is_served_by_age_may_use_reserved_slots() -> None:
    plane = dispatcher(replace(LARGE, concurrency_limit=10))
    plane.endpoint_table.high_seen_s = NOW_S
    running = [submit(plane, RouteRequest(model="large")) for _ in range(9)]
    assert all(isinstance(one, Started) for one in running)
    low = submit(plane, RouteRequest(model="large", priority=Priority.LOW))
    assert isinstance(low, WaitsInQueue)
    assert plane.pump(NOW_S, 0) == [], "the tenth slot is reserved"
    plane.queue._lanes[low.ticket.lane_key].priority_queues[low.ticket.rank].credit = 1.0
    (started,) = plane.pump(NOW_S + 6.0, 0)
    assert started.ticket is low.ticket


def test_a_hedge_takes_a_free_slot_or_none() -> None:
    plane = dispatcher(replace(LARGE, concurrency_limit=2), capacity=1)
    request = RouteRequest(model="large")
    route = resolve(request, TABLE)
    assert isinstance(submit(plane, request), Started)
    second = plane.start_at_once(request, route, NOW_S, 0)
    assert second is not None
    assert second.slot.load.in_flight == 2
    waiting = submit(plane, request._replace(priority=Priority.LOW))
    assert isinstance(waiting, WaitsInQueue)
    assert plane.start_at_once(request._replace(priority=Priority.HIGH), route, NOW_S, 0) is None
    assert len(plane.queue) == 1, "nobody was evicted for it"
