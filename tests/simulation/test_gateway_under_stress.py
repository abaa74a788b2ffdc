"""The gateway's core under a virtual clock: overload, bursts, restarts and half-alive engines.

The production dispatcher, breakers and retry rules run; only the engines are a model: a request holds a
slot for a drawn time, and gives its first token after a tenth of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import pairwise
from math import inf
from typing import Any

import pytest

from controlplane.core.admission.queue import AdmissionQueue, AdmissionSettings, Ticket
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.request import Priority
from controlplane.core.routing.dispatcher import Dispatcher, DispatchRefused, Started, WaitsInQueue
from controlplane.core.routing.endpoint_table import EndpointTable, RequestSlot
from controlplane.core.routing.retry import (
    RULES,
    AttemptFailure,
    FailedAttempt,
    GiveUp,
    RetryBudget,
    RetryElsewhere,
    RetrySettings,
    next_step,
)
from controlplane.core.routing.tier_table import RouteRequest, TierPolicy, TierTable, resolve

FIRST_TOKEN_TIMEOUT_S = 3.0


@dataclass
class Request:
    ask: RouteRequest
    arrived_s: float
    deadline_s: float
    caller: str = ""
    attempts: int = 0
    losses: int = 0
    tier: str = ""
    reason: str = ""
    answered_s: float | None = None
    outcome: str = ""
    tried: list[str] = field(default_factory=list)

    @property
    def latency_s(self) -> float:
        assert self.answered_s is not None
        return self.answered_s - self.arrived_s


class World:
    """One gateway, its engines, and a clock that jumps from event to event."""

    def __init__(
        self, endpoints: list[Endpoint], service_s: Callable[[random.Random], float], seed: int = 1
    ) -> None:
        tiers = list(dict.fromkeys(endpoint.tier for endpoint in endpoints))
        self.table = TierTable.build([TierPolicy(tier, tier + "-model") for tier in tiers], tiers[0])
        self.endpoints = {endpoint.endpoint_id: endpoint for endpoint in endpoints}
        self.endpoint_table = EndpointTable(self.table)
        self.endpoint_table.apply(endpoints)
        self.plane = Dispatcher(self.endpoint_table, AdmissionQueue(AdmissionSettings()))
        self.budget = RetryBudget(RetrySettings(), 0.0)
        self.service_s = service_s
        self.random = random.Random(seed)
        self.waiting: dict[Ticket, Request] = {}
        self.mute: set[str] = set()
        self.now_s = 0.0
        self.requests: list[Request] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, moment_s: float, what: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heappush(self._events, (moment_s, self._count, what, args))

    def arrive(self, moment_s: float, ask: RouteRequest, timeout_s: float = 60.0, caller: str = "") -> None:
        request = Request(ask, moment_s, moment_s + timeout_s, caller)
        self.requests.append(request)
        self.at(moment_s, self._submit, request)

    def change(self, moment_s: float, endpoint_id: str, **fields: Any) -> None:
        def apply() -> None:
            self.endpoints[endpoint_id] = replace(self.endpoints[endpoint_id], **fields)
            self.endpoint_table.apply(self.endpoints.values())
            self._pump()

        self.at(moment_s, apply)

    def next_probe_s(self) -> float:
        """When the next open breaker lets a request through."""
        loads = self.endpoint_table.by_endpoint_id.values()
        return min(
            (
                load.breaker.blocked_until_s
                for load in loads
                if load.ready and load.breaker.blocked_until_s > self.now_s
            ),
            default=inf,
        )

    def run(self) -> None:
        while self._events:
            self.now_s, _, what, args = heappop(self._events)
            what(*args)
            for ticket in self.plane.queue.expire(self.now_s):
                self.waiting.pop(ticket).outcome = "expired"

    def _submit(self, request: Request) -> None:
        self._count += 1
        self.budget.on_request()
        ask = request.ask._replace(exclude=frozenset(request.tried))
        result = self.plane.submit(
            ask,
            resolve(ask, self.table),
            self.now_s,
            self._count,
            deadline_s=request.deadline_s,
            caller=request.caller,
            arrived_s=request.arrived_s,
        )
        if isinstance(result, Started):
            self._start(request, result)
        elif isinstance(result, DispatchRefused):
            reason = result.rejected.reason if result.rejected else result.decision.refusal
            request.outcome = str(reason)
        else:
            assert isinstance(result, WaitsInQueue)
            self.waiting[result.ticket] = request
            self.at(request.deadline_s, lambda: None)
            probe_s = self.next_probe_s()
            if probe_s < request.deadline_s:
                self.at(probe_s, self._pump)
            if result.queued.evicted is not None:
                self.waiting.pop(result.queued.evicted).outcome = "evicted"

    def _pump(self) -> None:
        for started in self.plane.pump(self.now_s, self._count):
            assert started.ticket is not None
            self._start(self.waiting.pop(started.ticket), started)

    def _start(self, request: Request, started: Started) -> None:
        request.attempts += 1
        request.tier, request.reason = started.decision.tier, started.decision.reason
        name = started.slot.load.endpoint.endpoint_id
        if name in self.mute:
            self.at(self.now_s + FIRST_TOKEN_TIMEOUT_S, self._fail, request, started.slot)
            return
        held_s = self.service_s(self.random)
        self.at(self.now_s + held_s / 10, lambda: started.slot.first_token(self.now_s))
        self.at(self.now_s + held_s, self._end, request, started.slot)

    def _end(self, request: Request, slot: RequestSlot) -> None:
        slot.succeed(self.now_s)
        request.answered_s, request.outcome = self.now_s, "ok"
        self._pump()

    def _fail(self, request: Request, slot: RequestSlot) -> None:
        failure = AttemptFailure.FIRST_TOKEN_TIMEOUT
        slot.fail(self.now_s, RULES[failure].breaker_weight)
        request.tried.append(slot.load.key)
        attempt = FailedAttempt(request.attempts, False, request.deadline_s, request.losses)
        step = next_step(failure, attempt, RetrySettings(), self.budget, self.now_s)
        if isinstance(step, RetryElsewhere):
            self._submit(request)
        else:
            request.outcome = step.code if isinstance(step, GiveUp) else "resume"
        self._pump()


def replica(name: str, slots: int = 10) -> Endpoint:
    tier = name.split("-", maxsplit=1)[0]
    return Endpoint(
        name,
        tier,
        tier + "-model",
        "simulated",
        "http://127.0.0.1:1",
        EndpointState.READY,
        slots,
        generation=1,
    )


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def overloaded(
    load_ratio: float,
    service_s: Callable[[random.Random], float],
    *,
    seed: int,
    priorities: bool = True,
    seconds: float = 200.0,
) -> dict[Priority, list[Request]]:
    """Two replicas of ten slots; a fifth of the requests is high, half normal, the rest low."""
    world = World([replica("balanced-0"), replica("balanced-1")], service_s, seed)
    draw = random.Random(seed)
    mean_s = sum(service_s(draw) for _ in range(4000)) / 4000
    moment_s = 0.0
    truth: dict[Priority, list[Request]] = {priority: [] for priority in Priority}
    while (moment_s := moment_s + draw.expovariate(load_ratio * 20 / mean_s)) < seconds:
        (priority,) = draw.choices([Priority.HIGH, Priority.NORMAL, Priority.LOW], [0.2, 0.5, 0.3])
        ask = RouteRequest(priority=priority if priorities else Priority.NORMAL)
        world.arrive(moment_s, ask, caller=f"caller-{draw.randrange(5)}")
        truth[priority].append(world.requests[-1])
    world.run()
    return truth


def latencies(requests: list[Request]) -> list[float]:
    return [request.latency_s for request in requests if request.outcome == "ok"]


SERVICE_TIMES = [
    pytest.param(lambda draw: 1.0, id="all alike"),
    pytest.param(lambda draw: draw.expovariate(1.0), id="exponential"),
    pytest.param(lambda draw: draw.lognormvariate(0.0, 0.5), id="log-normal"),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("service_s", SERVICE_TIMES)
def test_at_twice_the_capacity_high_hardly_notices_and_low_still_gets_through(
    service_s: Callable[[random.Random], float], seed: int
) -> None:
    half = overloaded(0.5, service_s, seed=seed)
    twice = overloaded(2.0, service_s, seed=seed)
    assert all(request.outcome == "ok" for requests in half.values() for request in requests)
    assert all(request.outcome == "ok" for request in twice[Priority.HIGH])
    assert p99(latencies(twice[Priority.HIGH])) <= 1.5 * p99(latencies(half[Priority.HIGH]))
    low = latencies(twice[Priority.LOW])
    served = sum(len(latencies(requests)) for requests in twice.values())
    assert len(low) >= 0.02 * served
    # Of the time there is for them, low tickets are served all along and not only at the end.
    moments = sorted(one.answered_s for one in twice[Priority.LOW] if one.answered_s is not None)
    assert max(later - sooner for sooner, later in pairwise(moments)) < 20.0


def test_without_priorities_the_same_load_delays_every_request() -> None:
    """The control: the test above does not pass because the load is harmless."""
    half = overloaded(0.5, lambda draw: 1.0, seed=1, priorities=False)
    twice = overloaded(2.0, lambda draw: 1.0, seed=1, priorities=False)
    assert p99(latencies(twice[Priority.HIGH])) > 10 * p99(latencies(half[Priority.HIGH]))


@pytest.mark.parametrize("service_s", SERVICE_TIMES)
def test_under_overload_requests_are_shed_at_once_rather_than_queued_in_vain(
    service_s: Callable[[random.Random], float],
) -> None:
    requests = [one for group in overloaded(2.0, service_s, seed=3).values() for one in group]
    outcomes = [request.outcome for request in requests]
    assert set(outcomes) <= {"ok", "full", "hopeless", "evicted", "expired"}
    assert outcomes.count("expired") < 0.03 * len(outcomes)
    assert outcomes.count("hopeless") > 10 * outcomes.count("expired")


def test_a_burst_on_an_idle_tier_is_not_taken_for_overload() -> None:
    """An idle tier finishes little, but could do more: twenty slots of a second do sixty in three."""
    world = World([replica("balanced-0"), replica("balanced-1")], lambda draw: 1.0)
    for second in range(30):
        world.arrive(float(second * 2), RouteRequest(), timeout_s=30.0)
    for _ in range(60):
        world.arrive(100.0, RouteRequest(), timeout_s=5.0)
    world.run()
    assert {request.outcome for request in world.requests} == {"ok"}
    assert max(request.latency_s for request in world.requests) == pytest.approx(3.0)


def test_callers_share_a_full_tier_whatever_they_send() -> None:
    world = World([replica("balanced-0", 2)], lambda draw: 1.0)
    for index in range(200):
        world.arrive(index * 0.001, RouteRequest(), caller="greedy")
    for index in range(10):
        world.arrive(1.0 + index, RouteRequest(), caller="modest")
    world.run()
    modest = [request for request in world.requests if request.caller == "modest"]
    assert {request.outcome for request in modest} == {"ok"}
    assert max(request.latency_s for request in modest) <= 3.0


def test_a_restarting_tier_is_bridged_and_gets_its_traffic_back() -> None:
    world = World([replica("lightweight-0"), replica("balanced-0")], lambda draw: 0.5)
    world.change(10.0, "lightweight-0", state=EndpointState.RESTARTING)
    world.change(40.0, "lightweight-0", state=EndpointState.READY, generation=2)
    for index in range(500):
        world.arrive(index * 0.1, RouteRequest(model="lightweight"))
    world.run()
    assert {request.outcome for request in world.requests} == {"ok"}
    for request in world.requests:
        bridged = 10.0 <= request.arrived_s < 40.0
        assert request.tier == ("balanced" if bridged else "lightweight")
        assert ("bridge: lightweight restarting" in request.reason) == bridged


def test_a_half_alive_engine_is_found_by_the_requests_and_none_of_them_fails() -> None:
    """It takes requests and gives no tokens: a few run into its time-out, are tried elsewhere, and the
    rest goes round it. Once it is well again, a probe finds out."""
    world = World([replica(f"balanced-{i}") for i in range(3)], lambda draw: 0.5)
    world.at(10.0, world.mute.add, "balanced-0")
    world.at(60.0, world.mute.discard, "balanced-0")
    for index in range(2000):
        world.arrive(index * 0.05, RouteRequest(), timeout_s=30.0)
    world.run()
    assert {request.outcome for request in world.requests} == {"ok"}
    hit = [request for request in world.requests if request.tried]
    assert 1 <= len(hit) <= 40, "of a thousand that came while it was mute"
    assert max(request.latency_s for request in hit) <= 2 * FIRST_TOKEN_TIMEOUT_S + 1.0
    load = world.endpoint_table.by_endpoint_id["balanced-0"]
    assert load.breaker.state == "closed"
    assert load.sampled_s > 60.0, "it serves again"


def test_engines_that_only_fail_are_not_overloaded_with_retries() -> None:
    world = World([replica(f"balanced-{i}", 50) for i in range(3)], lambda draw: 0.5)
    world.mute |= set(world.endpoints)
    for index in range(3000):
        world.arrive(index * 0.02, RouteRequest(), timeout_s=20.0)
    world.run()
    attempts = sum(request.attempts for request in world.requests)
    assert "ok" not in {request.outcome for request in world.requests}
    assert attempts < 0.2 * len(world.requests), "the breakers let hardly any through"
    assert all(request.outcome for request in world.requests), "and every request ends"
