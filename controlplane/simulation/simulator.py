"""Replays arrivals through the production dispatcher on a simulated fleet, under a virtual clock.

Production code: :class:`controlplane.core.routing.dispatcher.Dispatcher` with routing, scoring, circuit
breakers and the admission queue; with the policy ``tierplane``
:class:`controlplane.core.autoscaling.round.ScalingRound`; and, if the scenario has nodes, the placement
(:mod:`.cluster`). One gateway replica is simulated, and it learns of endpoints without delay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from controlplane.core.admission.queue import AdmissionQueue, Ticket
from controlplane.core.autoscaling.decision import ScalingDecision
from controlplane.core.routing.dispatcher import Dispatcher, DispatchRefused, Started, WaitsInQueue
from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.core.routing.tier_table import RouteRequest, TierTable, resolve
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.cluster import Cluster
from controlplane.simulation.engine import EngineJob
from controlplane.simulation.fleet import TierFleet
from controlplane.simulation.outages import Outages
from controlplane.simulation.policies import MakePolicy
from controlplane.simulation.recommendations import SimulatedRecommendations
from controlplane.simulation.request import RequestInFlight
from controlplane.simulation.results import (
    START_UNIX_S,
    ClusterResult,
    RecordedDecision,
    SimulationResult,
    TierResult,
)
from controlplane.simulation.scenario import Scenario, TierScenario
from controlplane.simulation.tier import SimulatedTier
from controlplane.simulation.trace_rows import Arrival

MAX_DECISIONS: Final = 1000
"""Maximum number of decisions in a result."""
_SAMPLES: Final = 600
_SCRAPE_S: Final = 1.0
"""Interval at which the gateway gets the engines' metrics."""


class Simulator:
    """One run; call :meth:`run` once."""

    def __init__(self, scenario: Scenario, make_policy: MakePolicy, *, span_s: float = 0.0) -> None:
        """``span_s`` is the approximate length of the trace, which determines the interval of samples; if it
        is 0, the interval is a minute."""
        self.scenario = scenario
        self.clock = VirtualClock()
        policies = [tier.policy for tier in scenario.tiers]
        self.table = TierTable.build(policies, scenario.default_tier)
        self.endpoints = EndpointTable(self.table, scenario.load)
        self.queue = AdmissionQueue(scenario.admission)
        self.dispatcher = Dispatcher(self.endpoints, self.queue)
        self._queued: dict[Ticket, RequestInFlight] = {}
        self._picks = 0
        self._sample_s = span_s / _SAMPLES if span_s else 60.0
        self._decisions: list[RecordedDecision] = []
        self._decision_count = 0
        self._over = False
        self._policy = make_policy(scenario)
        shapes = [tier.replica.shape for tier in scenario.tiers for _ in range(max(1, tier.replicas))]
        self.cluster = Cluster(self.clock, scenario.nodes, (shape for shape in shapes if shape is not None))
        self._outages: Outages | None = None
        self.tiers = tuple(SimulatedTier(tier, self._fleet(tier)) for tier in scenario.tiers)
        self._recommendations = SimulatedRecommendations(
            *(scenario.recommendations, self.tiers, self.endpoints.pools, self._policy.learned),
            start_unix_s=START_UNIX_S,
        )

    def _fleet(self, tier: TierScenario) -> TierFleet:
        return TierFleet(
            tier.policy.name,
            tier.replica,
            self.clock,
            self.cluster,
            seed=self.scenario.seed,
            on_first=self._first_token,
            on_done=self._done,
            on_lost=self._lost,
            on_change=self._fleet_changed,
            in_flight=self._in_flight,
        )

    def run(
        self,
        arrivals: Iterable[Arrival],
        *,
        policy: str = "",
        progress: Callable[[float, int], None] | None = None,
    ) -> SimulationResult:
        """Replay ``arrivals`` until the last request has ended. ``progress`` is called now and then with the
        simulated seconds and the number of requests so far."""
        clock = self.clock
        for tier in self.tiers:
            tier.fleet.begin(tier.scenario.replicas)
        self.cluster.open()
        self._fleet_changed()
        self._begin_outages()
        budget, gpus = self._gpus, self.cluster.gpus or 0.0
        clock.at(self._policy.period_s, self._decide)
        clock.at(_SCRAPE_S, self._scrape)
        clock.at(self._sample_s, self._sample)
        clock.at(self._recommendations.every_s, self._recommend)
        for count, arrival in enumerate(arrivals, 1):
            if clock.next_s <= arrival.at_s:
                clock.run_until(arrival.at_s)
            else:
                clock.now_s = max(clock.now_s, arrival.at_s)
            self._arrive(arrival)
            if progress is not None and not count & 0xFFF:
                progress(clock.now_s, count)
        # GPU hours, placements and recommendations are those until the last arrival.
        end_s = clock.now_s
        fleets = [(tier.fleet.replica_hours(), tier.fleet.placement_record()) for tier in self.tiers]
        cluster = None if self.cluster.nodes is None else self._cluster_result(gpus)
        recommendations, record = self._recommendations.issued, self._recommendations.record
        latest_s = end_s + self.scenario.deadline_s * 2
        while any(tier.unfinished for tier in self.tiers) and clock.now_s < latest_s:
            clock.run_until(clock.now_s + 1.0)
        self._over = True
        results = [
            TierResult(
                tier.record,
                hours * tier.scenario.replica.gpus,
                hours,
                hours * tier.scenario.replica.gpus * tier.scenario.replica.cost_per_gpu_hour,
                tier.fleet.starts,
                tier.fleet.failures,
                tuple(tier.samples),
                placement,
                tier.limited_decisions,
            )
            for tier, (hours, placement) in zip(self.tiers, fleets, strict=True)
        ]
        return SimulationResult(
            policy=policy,
            seed=self.scenario.seed,
            simulated_s=end_s,
            tiers=tuple(results),
            decisions=tuple(self._decisions),
            decisions_total=self._decision_count,
            recommendations=recommendations,
            record=record,
            gpu_budget=budget,
            cluster=cluster,
        )

    @property
    def _gpus(self) -> float | None:
        """GPUs that all tiers together may use: the scenario's setting, or the cluster's usable GPUs."""
        return self.scenario.gpus if self.scenario.gpus is not None else self.cluster.gpus

    def _cluster_result(self, gpus: float) -> ClusterResult:
        failures = self._outages.failures if self._outages is not None else 0
        return ClusterResult(self.cluster.nodes or 0, gpus, self.cluster.most_gpus, failures)

    def _begin_outages(self) -> None:
        scenario = self.scenario
        if scenario.outages is not None:
            self._outages = Outages(
                self.clock,
                scenario.outages,
                [node.node_id for node in scenario.nodes or () if not node.unavailable],
                seed=scenario.seed,
                on_lost=self._node_lost,
                on_back=self.cluster.restore,
            )

    def _node_lost(self, node_id: str) -> None:
        gone = frozenset(self.cluster.lose(node_id))
        lost = [job for tier in self.tiers for job in tier.fleet.lose(gone)]
        for tier in self.tiers:
            tier.fleet.scale_to(tier.fleet.target)
        self._fleet_changed()
        for job in lost:
            self._lost(job)

    # Requests.

    def _arrive(self, arrival: Arrival) -> None:
        now_s = self.clock.now_s
        blocks = arrival.blocks
        route_request = RouteRequest(
            model=arrival.tier or "auto",
            complexity=arrival.complexity,
            priority=arrival.priority,
            session_key=arrival.session,
            # Like the gateway's key, from the beginning of the prompt, but longer than the common system
            # prompt.
            prefix_key=hash(blocks[:2]) if blocks else None,
        )
        request = RequestInFlight(arrival, route_request, resolve(route_request, self.table), now_s)
        self.tiers[request.rank].count_arrival(arrival.input_tokens, now_s)
        self._submit(request)

    def _submit(self, request: RequestInFlight) -> None:
        now_s = self.clock.now_s
        self._picks += 7919
        result = self.dispatcher.submit(
            request.route_request,
            request.route,
            now_s,
            self._picks,
            deadline_s=request.arrived_s + self.scenario.deadline_s,
            arrived_s=request.arrived_s,
        )
        if isinstance(result, Started):
            self._start(request, result)
        elif isinstance(result, WaitsInQueue):
            self.tiers[request.rank].queued += 1
            self._queued[result.ticket] = request
            if result.queued.evicted is not None:
                evicted = self._queued.pop(result.queued.evicted)
                self.tiers[evicted.rank].queued -= 1
                self._refuse(evicted)
        elif isinstance(result, DispatchRefused):
            self._refuse(request)

    def _start(self, request: RequestInFlight, started: Started) -> None:
        now_s = self.clock.now_s
        load = started.decision.load
        assert load is not None
        request.slot = started.slot
        request.attempts += 1
        tier = self.tiers[request.rank]
        if request.started_s is None:
            request.started_s = now_s
            tier.record.wait_s.append(now_s - request.arrived_s)
            if load.pool is not None and load.pool.rank != request.rank:
                tier.record.spilled += 1
        arrival = request.arrival
        generated = request.generated_tokens
        job = EngineJob(
            arrival.input_tokens + generated, arrival.output_tokens - generated, arrival.blocks, request
        )
        serving = self.tiers[load.pool.rank] if load.pool is not None else tier
        serving.fleet.engine(load.endpoint.endpoint_id).submit(job)

    def _first_token(self, job: EngineJob) -> None:
        request: RequestInFlight = job.payload
        assert request.slot is not None
        request.slot.first_token(self.clock.now_s)
        if request.first_token_s is None:
            request.first_token_s = self.clock.now_s

    def _done(self, job: EngineJob) -> None:
        now_s = self.clock.now_s
        request: RequestInFlight = job.payload
        slot = request.slot
        assert slot is not None
        slot.succeed(now_s)
        tier = self.tiers[request.rank]
        output_tokens = request.arrival.output_tokens
        first_s = request.first_token_s if request.first_token_s is not None else now_s
        ttft_s = first_s - request.arrived_s
        itl_s = (now_s - first_s) / (output_tokens - 1) if output_tokens > 1 else 0.0
        total_s = now_s - request.arrived_s
        tier.count_response(
            ttft_s=ttft_s,
            itl_s=itl_s,
            total_s=total_s,
            output_tokens=output_tokens,
            computed_tokens=job.computed_tokens,
        )
        slo = tier.scenario.rule.slo
        within_slo = ttft_s <= slo.ttft_s and itl_s <= slo.itl_s and total_s <= slo.total_s
        tier.count_end(now_s, within_slo=within_slo)
        load = slot.load
        if not load.ready:
            rank = self.table.rank_of[load.endpoint.tier]
            self.tiers[rank].fleet.stop_drained()
        self._pump()

    def _lost(self, job: EngineJob) -> None:
        """Continue a request whose engine died on another endpoint, with the tokens that the client already
        has."""
        request: RequestInFlight = job.payload
        slot = request.slot
        assert slot is not None
        slot.fail(self.clock.now_s)
        tier = self.tiers[request.rank]
        request.generated_tokens = min(
            request.generated_tokens + job.generated_tokens, request.arrival.output_tokens - 1
        )
        if request.attempts >= self.scenario.max_attempts:
            tier.record.lost += 1
            tier.count_end(self.clock.now_s, within_slo=False)
            return
        tier.record.retried += 1
        excluded = request.route_request.exclude | {slot.load.key}
        request.route_request = request.route_request._replace(exclude=excluded)
        self._submit(request)

    def _refuse(self, request: RequestInFlight) -> None:
        tier = self.tiers[request.rank]
        tier.record.refused += 1
        tier.count_end(self.clock.now_s, within_slo=False)

    def _pump(self) -> None:
        if not self.queue:
            return
        self._picks += 7919
        for started in self.dispatcher.pump(self.clock.now_s, self._picks):
            assert started.ticket is not None
            request = self._queued.pop(started.ticket)
            self.tiers[request.rank].queued -= 1
            self._start(request, started)

    def _fleet_changed(self) -> None:
        """Apply the endpoints that the controller's snapshot would now list."""
        endpoints = [endpoint for tier in self.tiers for endpoint in tier.fleet.endpoints()]
        self.endpoints.apply(endpoints)
        self._pump()

    def _in_flight(self, endpoint_id: str) -> int:
        load = self.endpoints.by_endpoint_id.get(endpoint_id)
        return load.in_flight if load is not None else 0

    # Periodic events.

    def _scrape(self, _: Any) -> None:
        """Pass the engines' metrics to the gateway, and end requests whose deadline has passed in the
        queue."""
        now_s = self.clock.now_s
        for tier in self.tiers:
            for endpoint_id, replica in tier.fleet.replicas.items():
                engine = replica.engine
                load = self.endpoints.by_endpoint_id.get(endpoint_id)
                if engine is not None and load is not None:
                    load.observe(now_s, kv_usage_ratio=engine.kv_usage_ratio, waiting=len(engine.waiting))
        if self.queue:
            for ticket in self.queue.expire(now_s):
                request = self._queued.pop(ticket)
                tier = self.tiers[request.rank]
                tier.queued -= 1
                tier.record.expired += 1
                tier.count_end(now_s, within_slo=False)
            self._pump()
        if not self._over:
            self.clock.at(now_s + _SCRAPE_S, self._scrape)

    def _decide(self, _: Any) -> None:
        now_s = self.clock.now_s
        inputs = [tier.observe(now_s, self.endpoints.pools[rank]) for rank, tier in enumerate(self.tiers)]
        decisions = self._policy.decide(inputs, self._gpus)
        for tier, decision in zip(self.tiers, decisions, strict=True):
            changes = decision.target != tier.fleet.target
            if changes or decision.shortfall > tier.recorded_shortfall:
                self._record(decision)
                tier.recorded_shortfall = decision.shortfall
            tier.limited_decisions += decision.shortfall > 0
            if changes:
                tier.fleet.scale_to(decision.target)
        if not self._over:
            self.clock.at(now_s + self._policy.period_s, self._decide)

    def _record(self, decision: ScalingDecision) -> None:
        self._decision_count += 1
        if len(self._decisions) < MAX_DECISIONS:
            self._decisions.append(
                RecordedDecision(
                    self.clock.now_s,
                    decision.tier,
                    str(decision.direction),
                    decision.before,
                    decision.target,
                    decision.reason,
                    decision.confidence,
                )
            )

    def _recommend(self, _: Any) -> None:
        self._recommendations.update(self.clock.now_s, self._gpus)
        if not self._over:
            self.clock.at(self.clock.now_s + self._recommendations.every_s, self._recommend)

    def _sample(self, _: Any) -> None:
        now_s = self.clock.now_s
        for tier, pool in zip(self.tiers, self.endpoints.pools, strict=True):
            tier.sample(now_s, pool)
        if not self._over:
            self.clock.at(now_s + self._sample_s, self._sample)


def replay(
    scenario: Scenario, make_policy: MakePolicy, arrivals: Sequence[Arrival], policy: str = ""
) -> SimulationResult:
    """One run over arrivals that are in memory."""
    span_s = arrivals[-1].at_s if arrivals else 0.0
    return Simulator(scenario, make_policy, span_s=span_s).run(arrivals, policy=policy)
