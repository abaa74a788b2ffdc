"""Whatever the fleet looks like: only fit endpoints are chosen, floors and limits hold, reasons agree."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from controlplane.core.admission.queue import AdmissionQueue, AdmissionSettings
from controlplane.core.domain.endpoint import Capabilities, Endpoint, EndpointState
from controlplane.core.domain.request import Complexity, Priority
from controlplane.core.routing.circuit_breaker import TRANSITIONS, Breaker, BreakerSettings, BreakerState
from controlplane.core.routing.dispatcher import Dispatcher, Started, WaitsInQueue
from controlplane.core.routing.endpoint_table import EndpointTable, GatewayShard, RequestSlot, shard_share
from controlplane.core.routing.router import Overflow, RouteOutcome, explain, has_room
from controlplane.core.routing.scorers import home
from controlplane.core.routing.tier_table import (
    ALL_INPUTS,
    API_BITS,
    INPUT_BITS,
    Api,
    OverflowDirection,
    RouteRequest,
    TierPolicy,
    TierTable,
    resolve,
)
from controlplane.errors import IllegalTransition
from tests.support.routing import decide

NOW_S = 100.0
NAMES = ("lightweight", "balanced", "capable")

capabilities = st.builds(
    Capabilities,
    embeddings=st.booleans(),
    responses=st.booleans(),
    messages=st.booleans(),
    images=st.booleans(),
    tools=st.booleans(),
)
endpoints = st.builds(
    Endpoint,
    endpoint_id=st.integers(0, 9).map("endpoint-{}".format),
    tier=st.sampled_from(NAMES),
    model=st.just("model"),
    engine=st.just("vllm"),
    base_url=st.just("http://127.0.0.1:1"),
    state=st.sampled_from([EndpointState.READY] * 4 + list(EndpointState)),
    concurrency_limit=st.integers(1, 12),
    generation=st.integers(1, 2),
    capabilities=capabilities,
)
endpoint_lists = st.lists(endpoints, max_size=10, unique_by=lambda endpoint: endpoint.endpoint_id)
directions = st.sampled_from(list(OverflowDirection))
tables = st.builds(
    lambda spills, bridges, floors, default: TierTable.build(
        [
            TierPolicy(name, f"{name}-model", spill=spill, bridge=bridge, floor=floor)
            for name, spill, bridge, floor in zip(NAMES, spills, bridges, floors, strict=True)
        ],
        default,
    ),
    st.tuples(directions, directions, directions),
    st.tuples(*[st.none() | directions] * 3),
    st.tuples(st.none(), st.sampled_from([None, "lightweight", "balanced"]), st.sampled_from([None, *NAMES])),
    st.none() | st.sampled_from(NAMES),
)
requests = st.builds(
    RouteRequest,
    model=st.sampled_from(["auto", "auto", *NAMES, "balanced-model", "unknown"]),
    models=st.lists(st.sampled_from([*NAMES, "capable-model", "auto", "unknown"]), max_size=3).map(tuple),
    complexity=st.none() | st.sampled_from(list(Complexity)),
    agent_type=st.none() | st.just("general"),
    min_tier=st.none() | st.sampled_from(NAMES),
    priority=st.sampled_from(list(Priority)),
    api=st.sampled_from([Api.CHAT, Api.CHAT, *Api]),
    session_key=st.none() | st.integers(0, 2**64 - 1),
    prefix_key=st.none() | st.integers(0, 2**64 - 1),
    inputs=st.sampled_from([0, 0, *INPUT_BITS.values(), ALL_INPUTS]),
    exclude=st.frozensets(st.integers(0, 9).map("endpoint-{}#1".format), max_size=4),
)


@st.composite
def planes(draw: st.DrawFn, *, pauses: bool = False) -> tuple[TierTable, EndpointTable]:
    """A table and a fleet in any state of load and health; with ``pauses``, endpoints may have asked for
    one."""
    table = draw(tables)
    endpoint_table = EndpointTable(table)
    endpoint_table.apply(draw(endpoint_lists))
    for load in endpoint_table.by_endpoint_id.values():
        for _ in range(draw(st.integers(0, load.limit))):
            load.begin(NOW_S - draw(st.sampled_from([0.0, 9.0])))
        trouble = draw(st.sampled_from(["none", "none", "open", "half_open"]))
        if trouble != "none":
            load.breaker.failure(NOW_S - 1.0 if trouble == "half_open" else NOW_S, weight=9)
        if trouble == "half_open":
            load.breaker.start(NOW_S)
        if draw(st.booleans()):
            load.observe(
                NOW_S - draw(st.sampled_from([0.0, 99.0])),
                kv_usage_ratio=draw(st.none() | st.floats(0.0, 1.0)),
                waiting=draw(st.none() | st.floats(0.0, 50.0)),
            )
        load.ttft_s = draw(st.none() | st.floats(0.0, 9.0))
        load.sampled_s = NOW_S
        if pauses and draw(st.booleans()):
            load.held_until_s = NOW_S + draw(st.sampled_from([0.0, 5.0, 9.0]))
    if draw(st.booleans()):
        endpoint_table.high_seen_s = NOW_S
    return table, endpoint_table


def floor_of(request: RouteRequest, table: TierTable) -> int:
    return 0 if request.min_tier is None else table.rank_of[request.min_tier]


@settings(max_examples=200, deadline=None)
@given(planes(pauses=True), requests, st.integers(0, 2**32))
def test_only_fit_endpoints_are_chosen(
    plane: tuple[TierTable, EndpointTable], request: RouteRequest, pick: int
) -> None:
    table, endpoint_table = plane
    decision = decide(request, endpoint_table, NOW_S, pick)
    assert has_room(resolve(request, table), request, endpoint_table, NOW_S) == (decision.load is not None)
    assert (decision.load is not None) == (decision.outcome is RouteOutcome.SEND)
    assert (decision.refusal is not None) == (decision.outcome is RouteOutcome.REJECT)
    assert decision.reason.isascii()
    if decision.load is None:
        return
    load = decision.load
    assert load.endpoint.state is EndpointState.READY
    assert load.in_flight < load.limit
    assert load.key not in request.exclude
    assert load.breaker.blocked_until_s <= NOW_S
    assert load.api_bits & API_BITS[request.api]
    assert not request.inputs & ~load.api_bits
    if load.held_until_s > NOW_S:
        usable = [
            other for other in endpoint_table.by_endpoint_id.values() if other.key not in request.exclude
        ]
        assert not any(
            other.ready
            and other.endpoint.tier == decision.tier
            and other.api_bits & API_BITS[request.api]
            and not request.inputs & ~other.api_bits
            and max(other.held_until_s, other.breaker.blocked_until_s) <= NOW_S
            for other in usable
        ), "another one serves"
    assert load.endpoint.tier == decision.tier
    rank = table.rank_of[decision.tier]
    assert rank >= floor_of(request, table)
    route = resolve(request, table)
    if rank not in route.order and request.api is not Api.EMBEDDINGS:
        policy = table.policies[route.order[0]]
        assert policy.floor is None or rank >= table.rank_of[policy.floor]
        assert decision.wanted_tier == policy.name
        way = policy.spill if decision.overflow is Overflow.SPILL else policy.bridge
        if way is not None:
            assert way is not OverflowDirection.NONE
            assert way is OverflowDirection.BOTH or (way is OverflowDirection.UP) == (rank > route.order[0])


@settings(max_examples=200, deadline=None)
@given(planes(pauses=True), requests, st.integers(0, 2**32))
def test_an_explanation_agrees_with_the_decision(
    plane: tuple[TierTable, EndpointTable], request: RouteRequest, pick: int
) -> None:
    _, endpoint_table = plane
    explanation = explain(request, endpoint_table, NOW_S, pick)
    assert explanation.decision == decide(request, endpoint_table, NOW_S, pick)
    assert len(explanation.candidates) == len(endpoint_table.by_endpoint_id)
    for candidate in explanation.candidates:
        assert all(candidate.left_out)
        assert (candidate.score is None) == bool(candidate.left_out)
        assert all(0.0 <= score <= 1.0 for score in candidate.scores.values())
    fit = {one.endpoint_id for one in explanation.candidates if not one.left_out}
    load = explanation.decision.load
    if load is not None:
        assert load.endpoint.endpoint_id in fit
    else:
        assert not fit, "something was fit and not taken"


@settings(max_examples=100, deadline=None)
@given(planes(), requests)
def test_the_best_endpoint_of_the_first_tier_is_among_the_chosen(
    plane: tuple[TierTable, EndpointTable], request: RouteRequest
) -> None:
    """No pick raises, and the better of two never loses: the best of all is always among the chosen."""
    _, endpoint_table = plane
    request = request._replace(session_key=None, prefix_key=None)
    chosen = [decide(request, endpoint_table, NOW_S, pick) for pick in range(90)]
    if chosen[0].load is None:
        return
    tier = chosen[0].tier
    candidates = explain(request, endpoint_table, NOW_S, 0).candidates
    scored = {one.endpoint_id: one.score for one in candidates if one.tier == tier and one.score is not None}
    best = max(scored.values())
    taken = {one.load.endpoint.endpoint_id for one in chosen if one.load is not None}
    assert any(scored[name] == best for name in taken)
    if len(scored) > 1:
        worst = min(scored.values())
        assert not any(scored[name] == worst for name in taken) or list(scored.values()).count(worst) > 1


@given(st.integers(0, 500), st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_shares_sum_to_the_limit_and_are_even(limit: int, count: int, offset: int) -> None:
    shares = [shard_share(limit, index, count, offset) for index in range(count)]
    assert sum(shares) == limit
    assert max(shares) - min(shares) <= 1
    assert limit < count or min(shares) >= 1


@given(st.sets(st.integers(0, 30), min_size=2, max_size=8), st.integers(0, 2**64 - 1), st.data())
def test_keys_move_only_from_endpoints_that_go(ids: set[int], key: int, data: st.DataObject) -> None:
    table = TierTable.build([TierPolicy("balanced", "m")])
    endpoint_table = EndpointTable(table)
    state = EndpointState.READY
    endpoint_table.apply(
        Endpoint(f"e{i}", "balanced", "m", "vllm", "http://x", state, 4) for i in sorted(ids)
    )
    loads = endpoint_table.pools[0].loads
    owner = loads[home(loads, key)]
    gone = data.draw(st.sampled_from(loads))
    left = [load for load in loads if load is not gone]
    if gone is not owner:
        assert left[home(left, key)] is owner


class BreakerLife(RuleBasedStateMachine):
    """A breaker only moves as its table says, and lets one probe through at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.breaker = Breaker(BreakerSettings(min_requests=4, probe_timeout_s=5.0, open_max_s=4.0))
        self.state = BreakerState.CLOSED
        self.probes: list[int] = [0]

    def allowed(self) -> bool:
        return self.now_s >= self.breaker.blocked_until_s

    @rule(passed_s=st.sampled_from([0.1, 1.0, 6.0, 30.0]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule()
    def start(self) -> None:
        before = (self.breaker.state, self.breaker.blocked_until_s)
        allowed = self.allowed()
        try:
            probe = self.breaker.start(self.now_s)
        except IllegalTransition:
            assert not allowed
            assert (self.breaker.state, self.breaker.blocked_until_s) == before
            return
        assert allowed
        if self.breaker.state is BreakerState.HALF_OPEN:
            assert probe > max(self.probes)
            assert not self.allowed(), "the second of two at once is no probe"
            self.probes.append(probe)
        else:
            assert probe == 0

    @rule(data=st.data(), what=st.sampled_from(["success", "failure", "abandoned"]))
    def report(self, data: st.DataObject, what: str) -> None:
        probe = data.draw(st.sampled_from(self.probes))
        half_open = self.breaker.state is BreakerState.HALF_OPEN
        opened = self.breaker.state is BreakerState.OPEN
        getattr(self.breaker, what)(self.now_s, probe)
        if opened or (half_open and probe != max(self.probes)):
            assert self.breaker.state is self.state, "only the present probe's word counts"

    @invariant()
    def legal(self) -> None:
        new = self.breaker.state
        assert new is self.state or new in {
            target for (source, _), target in TRANSITIONS.items() if source is self.state
        }
        self.state = new
        if new is BreakerState.CLOSED:
            assert self.allowed()


class Traffic(RuleBasedStateMachine):
    """Routing, slots and the queue together, through snapshots, failures and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = NOW_S
        self.pick = 0
        self.running: list[RequestSlot] = []
        self.queued = 0

    @initialize(table=tables, first=endpoint_lists)
    def start(self, table: TierTable, first: list[Endpoint]) -> None:
        endpoint_table = EndpointTable(table)
        endpoint_table.apply(first)
        self.table = table
        self.plane = Dispatcher(endpoint_table, AdmissionQueue(AdmissionSettings(capacity=8)))

    def started(self, one: Started) -> None:
        assert one.slot.load is one.decision.load
        self.running.append(one.slot)

    @rule(request=requests, timeout_s=st.sampled_from([1.0, 60.0]))
    def submit(self, request: RouteRequest, timeout_s: float) -> None:
        self.pick += 1
        result = self.plane.submit(
            request, resolve(request, self.table), self.now_s, self.pick, deadline_s=self.now_s + timeout_s
        )
        if isinstance(result, Started):
            self.started(result)
        elif isinstance(result, WaitsInQueue):
            self.queued += 1 - (result.queued.evicted is not None)

    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "abandon", "first_token"]))
    def end(self, data: st.DataObject, how: str) -> None:
        if self.running:
            index = data.draw(st.integers(0, len(self.running) - 1))
            getattr(self.running[index], how)(self.now_s)
            if how != "first_token":
                self.running.pop(index)

    @rule(snapshot=endpoint_lists)
    def snapshot(self, snapshot: list[Endpoint]) -> None:
        self.plane.endpoint_table.apply(snapshot)
        self.queued -= len(self.plane.remove_unservable(self.now_s, self.pick))

    @rule(passed_s=st.sampled_from([0.1, 2.0, 7.0]))
    def pump(self, passed_s: float) -> None:
        self.now_s += passed_s
        for one in self.plane.pump(self.now_s, self.pick):
            assert one.ticket is not None
            assert one.ticket.deadline_s > self.now_s
            self.queued -= 1
            self.started(one)
        self.queued -= len(self.plane.queue.expire(self.now_s))
        assert self.plane.pump(self.now_s, self.pick) == []

    @invariant()
    def counts_and_limits_hold(self) -> None:
        if not hasattr(self, "plane"):
            return
        in_flight: dict[int, int] = {}
        for slot in self.running:
            in_flight[id(slot.load)] = in_flight.get(id(slot.load), 0) + 1
        for pool in self.plane.endpoint_table.pools:
            for load in pool.loads:
                assert load.in_flight == in_flight.get(id(load), 0)
                assert 0 <= load.awaiting_first <= load.in_flight
            ready = [load for load in pool.loads if load.ready]
            assert pool.in_flight == sum(load.in_flight for load in ready)
            assert pool.limit == sum(load.limit for load in ready)
        assert len(self.plane.queue) <= 8

    @invariant()
    def nobody_is_lost(self) -> None:
        if hasattr(self, "plane"):
            gone = len(self.plane.queue._expired)
            assert len(self.plane.queue) + gone == self.queued


def test_a_limit_is_never_exceeded_by_what_is_started() -> None:
    """Stated on its own, since a snapshot may lower a limit below what runs."""
    table = TierTable.build([TierPolicy("balanced", "m")])
    request = RouteRequest(priority=Priority.HIGH)
    route = resolve(request, table)

    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 4))
    def check(limits: list[int], count: int, gateways: int) -> None:
        running: dict[str, int] = {}
        for index in range(gateways):
            endpoint_table = EndpointTable(table)
            endpoint_table.apply(
                (
                    Endpoint(f"e{i}", "balanced", "m", "vllm", "http://x", EndpointState.READY, limit)
                    for i, limit in enumerate(limits)
                ),
                shard=GatewayShard(index, gateways),
            )
            plane = Dispatcher(endpoint_table, AdmissionQueue())
            for pick in range(count):
                result = plane.submit(request, route, NOW_S, pick, deadline_s=NOW_S + 1)
                if isinstance(result, Started):
                    name = result.slot.load.endpoint.endpoint_id
                    running[name] = running.get(name, 0) + 1
        assert all(running.get(f"e{i}", 0) <= limit for i, limit in enumerate(limits))
        if count >= sum(limits):
            assert sum(running.values()) == sum(limits), "and all of it is used"

    check()


BreakerLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBreakerLife = BreakerLife.TestCase
Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTraffic = Traffic.TestCase
