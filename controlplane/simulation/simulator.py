"""Arrivals through the production dispatcher onto a fake fleet, scaled by a policy, under a virtual clock.

What is production code here: :class:`controlplane.core.routing.dispatcher.Dispatcher` with routing, scoring,
circuit breakers and the admission queue, with the policy ``tierplane``
:class:`controlplane.core.autoscaling.round.ScalingRound`, and, where nodes are given, the placement
(:mod:`.cluster`).
One gateway replica is simulated, and it sees endpoints at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from controlplane.core.admission.queue import AdmissionQueue, AdmissionSettings, Ticket
from controlplane.core.autoscaling.decision import EngineObservation, ScalingDecision, TierObservation
from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.placement.topology import Node
from controlplane.core.recommendations.rules import LATENCY_MS
from controlplane.core.routing.dispatcher import Dispatcher, DispatchRefused, Started, WaitsInQueue
from controlplane.core.routing.endpoint_table import EndpointTable, LoadSettings
from controlplane.core.routing.tier_table import RouteRequest, TierPolicy, TierTable, resolve
from controlplane.core.telemetry.series import known_now, missing
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.cluster import Cluster
from controlplane.simulation.engine import EngineJob
from controlplane.simulation.fleet import ReplicaModel, TierFleet
from controlplane.simulation.outages import OutageModel, Outages
from controlplane.simulation.recommendations import RecommendationSettings, SimulatedRecommendations
from controlplane.simulation.request import RequestInFlight
from controlplane.simulation.results import (
    START_UNIX_S,
    ClusterResult,
    RecordedDecision,
    SimulationResult,
    TierRecord,
    TierResult,
    TierSample,
)
from controlplane.simulation.traces import Arrival

MOST_DECISIONS: Final = 1000
"""That a result keeps."""
_SAMPLES: Final = 600
_SCRAPE_S: Final = 1.0
"""How often engine metrics reach the gateway."""


@dataclass(frozen=True, slots=True)
class TierScenario:
    """One tier: what it routes, what its replicas are like, how it scales."""

    policy: TierPolicy
    replica: ReplicaModel
    rule: ScalingRule
    replicas: int = 1
    """Ready when the trace begins."""
    tensor_parallel: int = 1
    latency_limit_ms: float = LATENCY_MS
    """Above it a recommendation calls the tier slow, if no threshold is set."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything but the arrivals and the policy."""

    tiers: tuple[TierScenario, ...]
    default_tier: str | None = None
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    fleet: LoadSettings = field(default_factory=LoadSettings)
    deadline_s: float = 600.0
    max_attempts: int = 3
    gpus: float | None = None
    """That all tiers together may hold; None: as many as ``nodes`` have."""
    nodes: tuple[Node, ...] | None = None
    """Where replicas run; None: there is always room."""
    outages: OutageModel | None = None
    """None: no node fails."""
    seed: int = 0
    recommendations: RecommendationSettings = field(default_factory=RecommendationSettings)


@dataclass(frozen=True, slots=True)
class PolicyInput:
    """What a scaling policy is shown: what tierplane's own sees, and what the others go by."""

    observation: TierObservation
    ongoing: float
    """Requests that ran or waited, averaged over the interval."""
    busy_ratio: float
    """Share of the interval in which a replica's GPU worked, averaged over the ready ones."""
    slots: int
    """Requests that the ready replicas may run at once."""


class ScalingPolicy(Protocol):
    """Decides how many replicas each tier has."""

    period_s: float

    def decide(self, seen: Sequence[PolicyInput], gpus: float | None) -> Sequence[ScalingDecision]:
        """The targets from now on, in the order of the tiers that were seen. ``gpus`` is what all of them
        together may hold; None: nobody counts."""

    def learned(self, tier: str) -> TierScaler | None:
        """What it knows of a tier's engines, for recommendations; None: it does not measure how fast they
        are."""


MakePolicy = Callable[[Scenario], ScalingPolicy]


class _TierCounters:
    """A tier's counters between two observations."""

    def __init__(self, scenario: TierScenario, fleet: TierFleet) -> None:
        self.scenario = scenario
        self.fleet = fleet
        self.record = TierRecord(scenario.policy.name)
        self.samples: list[TierSample] = []
        self.ongoing = 0
        self.queued = 0
        self.ongoing_s = 0.0
        self.changed_s = 0.0
        self.seen_s = 0.0
        self.arrivals = self.finished = self.missed = 0
        self.prompt = self.answer = self.ended = 0
        self.sampled = (0.0, 0, 0, 0)
        """Time, arrived, kept, ended at the last sample."""
        self.ended_total = 0
        self.short_rounds = 0
        """Decisions that the budget cut."""
        self.noted_shortfall = 0
        """Replicas that it took from what the tier wanted, when that was last told."""

    def change(self, by: int, now_s: float) -> None:
        """One more or less that runs or waits."""
        self.ongoing_s += self.ongoing * (now_s - self.changed_s)
        self.changed_s = now_s
        self.ongoing += by


class Simulator:
    """One run; call :meth:`run` once."""

    def __init__(self, scenario: Scenario, make_policy: MakePolicy, *, span_s: float = 0.0) -> None:
        """``span_s`` is about how long the trace is, for the spacing of samples; 0: a minute each."""
        self.scenario = scenario
        self.clock = VirtualClock()
        policies = [tier.policy for tier in scenario.tiers]
        self.table = TierTable.build(policies, scenario.default_tier)
        self.fleet = EndpointTable(self.table, scenario.fleet)
        self.queue = AdmissionQueue(scenario.admission)
        self.dispatcher = Dispatcher(self.fleet, self.queue)
        self._waiting: dict[Ticket, RequestInFlight] = {}
        self._picks = 0
        self._sample_s = span_s / _SAMPLES if span_s else 60.0
        self._decisions: list[RecordedDecision] = []
        self._decided = 0
        self._over = False
        self._policy = make_policy(scenario)
        shapes = [tier.replica.shape for tier in scenario.tiers for _ in range(max(1, tier.replicas))]
        self.cluster = Cluster(self.clock, scenario.nodes, (shape for shape in shapes if shape is not None))
        self._outages: Outages | None = None
        self.tiers = tuple(_TierCounters(tier, self._tier_fleet(tier)) for tier in scenario.tiers)
        self._recommendations = SimulatedRecommendations(
            *(scenario.recommendations, self.tiers, self.fleet.pools, self._policy.learned),
            start_unix_s=START_UNIX_S,
        )

    def _tier_fleet(self, tier: TierScenario) -> TierFleet:
        return TierFleet(
            tier.policy.name,
            tier.replica,
            self.clock,
            self.cluster,
            seed=self.scenario.seed,
            on_first=self._first,
            on_done=self._done,
            on_lost=self._lost,
            on_change=self._changed,
            in_flight=self._in_flight,
        )

    def run(
        self,
        arrivals: Iterable[Arrival],
        *,
        policy: str = "",
        progress: Callable[[float, int], None] | None = None,
    ) -> SimulationResult:
        """Everything that comes, until the last request has ended. ``progress`` gets the simulated seconds
        and the requests so far, every now and then."""
        clock = self.clock
        for tier in self.tiers:
            tier.fleet.begin(tier.scenario.replicas)
        self.cluster.open()
        self._changed()
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
        end_s = clock.now_s
        held = [(tier.fleet.replica_hours(), tier.fleet.room_record()) for tier in self.tiers]
        cluster = None if self.cluster.nodes is None else self._cluster_result(gpus)
        recommendations, record = self._recommendations.issued, self._recommendations.record
        while any(tier.ongoing for tier in self.tiers) and clock.now_s < end_s + self.scenario.deadline_s * 2:
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
                room,
                tier.short_rounds,
            )
            for tier, (hours, room) in zip(self.tiers, held, strict=True)
        ]
        # GPU hours are those of the trace: the time in which the last answers are finished is not counted,
        # and nothing is recommended in it.
        return SimulationResult(
            *(policy, self.scenario.seed, end_s, tuple(results)),
            *(tuple(self._decisions), self._decided),
            *(recommendations, record),
            *(budget, cluster),
        )

    @property
    def _gpus(self) -> float | None:
        """What all tiers together may hold: as the scenario says, or those that there are."""
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
        self._changed()
        for job in lost:
            self._lost(job)

    # Requests.

    def _arrive(self, arrival: Arrival) -> None:
        now_s = self.clock.now_s
        blocks = arrival.blocks
        request = RouteRequest(
            model=arrival.tier or "auto",
            complexity=arrival.complexity,
            priority=arrival.priority,
            session_key=arrival.session,
            # As the gateway's key: of the prompt's beginning, past what all prompts begin with.
            prefix_key=hash(blocks[:2]) if blocks else None,
        )
        flight = RequestInFlight(arrival, request, resolve(request, self.table), now_s)
        tier = self.tiers[flight.rank]
        tier.arrivals += 1
        record = tier.record
        record.arrived += 1
        record.prompt_tokens += arrival.input_tokens
        tier.change(1, now_s)
        self._submit(flight)

    def _submit(self, flight: RequestInFlight) -> None:
        now_s = self.clock.now_s
        self._picks += 7919
        answer = self.dispatcher.submit(
            flight.request,
            flight.route,
            now_s,
            self._picks,
            deadline_s=flight.arrived_s + self.scenario.deadline_s,
            arrived_s=flight.arrived_s,
        )
        if isinstance(answer, Started):
            self._start(flight, answer)
        elif isinstance(answer, WaitsInQueue):
            self.tiers[flight.rank].queued += 1
            self._waiting[answer.ticket] = flight
            if answer.queued.evicted is not None:
                evicted = self._waiting.pop(answer.queued.evicted)
                self.tiers[evicted.rank].queued -= 1
                self._refuse(evicted)
        elif isinstance(answer, DispatchRefused):
            self._refuse(flight)

    def _start(self, flight: RequestInFlight, started: Started) -> None:
        now_s = self.clock.now_s
        load = started.decision.load
        assert load is not None
        flight.slot = started.slot
        flight.attempts += 1
        tier = self.tiers[flight.rank]
        if flight.started_s is None:
            flight.started_s = now_s
            tier.record.wait_s.append(now_s - flight.arrived_s)
            if load.pool is not None and load.pool.rank != flight.rank:
                tier.record.spilled += 1
        arrival = flight.arrival
        made = flight.made
        job = EngineJob(arrival.input_tokens + made, arrival.output_tokens - made, arrival.blocks, flight)
        served = self.tiers[load.pool.rank] if load.pool is not None else tier
        served.fleet.engine(load.endpoint.endpoint_id).submit(job)

    def _first(self, job: EngineJob) -> None:
        flight: RequestInFlight = job.payload
        assert flight.slot is not None
        flight.slot.first_token(self.clock.now_s)
        if flight.first_s is None:
            flight.first_s = self.clock.now_s

    def _done(self, job: EngineJob) -> None:
        now_s = self.clock.now_s
        flight: RequestInFlight = job.payload
        slot = flight.slot
        assert slot is not None
        slot.succeed(now_s)
        tier = self.tiers[flight.rank]
        record = tier.record
        arrival = flight.arrival
        first_s = flight.first_s if flight.first_s is not None else now_s
        ttft_s = first_s - flight.arrived_s
        itl_s = (now_s - first_s) / (arrival.output_tokens - 1) if arrival.output_tokens > 1 else 0.0
        record.ttft_s.append(ttft_s)
        record.itl_s.append(itl_s)
        total_s = now_s - flight.arrived_s
        record.total_s.append(total_s)
        record.output_tokens += arrival.output_tokens
        record.computed_tokens += job.computed_tokens
        tier.prompt += job.computed_tokens
        tier.answer += arrival.output_tokens
        tier.ended += 1
        slo = tier.scenario.rule.slo
        in_time = ttft_s <= slo.ttft_s and itl_s <= slo.itl_s and total_s <= slo.total_s
        self._end(tier, kept=in_time)
        load = slot.load
        if not load.ready:
            rank = self.table.rank_of[load.endpoint.tier]
            self.tiers[rank].fleet.settle()
        self._pump()

    def _lost(self, job: EngineJob) -> None:
        """The engine died under it: go on elsewhere with what the client has."""
        flight: RequestInFlight = job.payload
        slot = flight.slot
        assert slot is not None
        slot.fail(self.clock.now_s)
        tier = self.tiers[flight.rank]
        flight.made = min(flight.made + job.made, flight.arrival.output_tokens - 1)
        if flight.attempts >= self.scenario.max_attempts:
            tier.record.lost += 1
            self._end(tier, kept=False)
            return
        tier.record.retried += 1
        flight.request = flight.request._replace(exclude=flight.request.exclude | {slot.load.key})
        self._submit(flight)

    def _refuse(self, flight: RequestInFlight) -> None:
        tier = self.tiers[flight.rank]
        tier.record.refused += 1
        self._end(tier, kept=False)

    def _end(self, tier: _TierCounters, *, kept: bool) -> None:
        tier.finished += 1
        tier.ended_total += 1
        if kept:
            tier.record.kept += 1
        else:
            tier.missed += 1
        tier.change(-1, self.clock.now_s)

    def _pump(self) -> None:
        if not self.queue:
            return
        self._picks += 7919
        for started in self.dispatcher.pump(self.clock.now_s, self._picks):
            assert started.ticket is not None
            flight = self._waiting.pop(started.ticket)
            self.tiers[flight.rank].queued -= 1
            self._start(flight, started)

    def _changed(self) -> None:
        """The fleet changed: what the controller's snapshot would say."""
        endpoints = [endpoint for tier in self.tiers for endpoint in tier.fleet.endpoints()]
        self.fleet.apply(endpoints)
        self._pump()

    def _in_flight(self, endpoint_id: str) -> int:
        load = self.fleet.by_endpoint_id.get(endpoint_id)
        return load.in_flight if load is not None else 0

    # What repeats.

    def _scrape(self, _: Any) -> None:
        """Engine metrics to the gateway, and the queue's deadlines."""
        now_s = self.clock.now_s
        for tier in self.tiers:
            for endpoint_id, replica in tier.fleet.replicas.items():
                engine = replica.engine
                load = self.fleet.by_endpoint_id.get(endpoint_id)
                if engine is not None and load is not None:
                    load.observe(now_s, kv_usage_ratio=engine.kv_usage_ratio, waiting=len(engine.waiting))
        if self.queue:
            for ticket in self.queue.expire(now_s):
                flight = self._waiting.pop(ticket)
                tier = self.tiers[flight.rank]
                tier.queued -= 1
                tier.record.expired += 1
                self._end(tier, kept=False)
            self._pump()
        if not self._over:
            self.clock.at(now_s + _SCRAPE_S, self._scrape)

    def _decide(self, _: Any) -> None:
        now_s = self.clock.now_s
        seen = [self._observe(tier) for tier in self.tiers]
        decisions = self._policy.decide(seen, self._gpus)
        for tier, decision in zip(self.tiers, decisions, strict=True):
            moves = decision.target != tier.fleet.target
            if moves or decision.shortfall > tier.noted_shortfall:
                self._note(decision)
                tier.noted_shortfall = decision.shortfall
            tier.short_rounds += decision.shortfall > 0
            if moves:
                tier.fleet.scale_to(decision.target)
        if not self._over:
            self.clock.at(now_s + self._policy.period_s, self._decide)

    def _recommend(self, _: Any) -> None:
        self._recommendations.update(self.clock.now_s, self._gpus)
        if not self._over:
            self.clock.at(self.clock.now_s + self._recommendations.every_s, self._recommend)

    def _note(self, decision: ScalingDecision) -> None:
        self._decided += 1
        if len(self._decisions) < MOST_DECISIONS:
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

    def _observe(self, tier: _TierCounters) -> PolicyInput:
        now_s = self.clock.now_s
        interval_s = now_s - tier.seen_s
        tier.change(0, now_s)
        engines: list[EngineObservation] = []
        busy = 0.0
        ready = 0
        for replica in tier.fleet.replicas.values():
            engine = replica.engine
            if engine is None:
                continue
            meter = engine.read()
            alive_s = min(interval_s, now_s - replica.ready_s)
            if alive_s <= 0:
                continue
            if replica.endpoint.state is EndpointState.READY:
                ready += 1
                busy += meter.busy_s / alive_s
            if meter.busy_s > 0:
                engines.append(
                    EngineObservation(
                        meter.generated / alive_s,
                        meter.prompted / alive_s,
                        meter.batch_s / meter.busy_s,
                        meter.busy_s / alive_s,
                    )
                )
        rank = self.table.rank_of[tier.scenario.policy.name]
        pool = self.fleet.pools[rank]
        nothing = missing("no request ended in the interval")
        ended = tier.ended
        observation = TierObservation(
            tier=tier.scenario.policy.name,
            now_s=now_s,
            unix_s=START_UNIX_S + now_s,
            target=tier.fleet.target,
            ready=tier.fleet.ready,
            interval_s=interval_s,
            arrivals=known_now(tier.arrivals),
            in_flight=known_now(pool.in_flight),
            queued=known_now(tier.queued),
            input_tokens=known_now(tier.prompt / ended) if ended else nothing,
            output_tokens=known_now(tier.answer / ended) if ended else nothing,
            finished=tier.finished,
            missed=tier.missed,
            engines=tuple(engines),
        )
        seen = PolicyInput(
            observation,
            ongoing=tier.ongoing_s / interval_s if interval_s > 0 else float(tier.ongoing),
            busy_ratio=busy / ready if ready else 0.0,
            slots=pool.limit,
        )
        tier.seen_s = now_s
        tier.ongoing_s = 0.0
        tier.arrivals = tier.finished = tier.missed = 0
        tier.prompt = tier.answer = tier.ended = 0
        return seen

    def _sample(self, _: Any) -> None:
        now_s = self.clock.now_s
        for tier, pool in zip(self.tiers, self.fleet.pools, strict=True):
            record = tier.record
            at_s, arrived, kept, ended = tier.sampled
            span_s = now_s - at_s
            done = tier.ended_total - ended
            tier.samples.append(
                TierSample(
                    now_s,
                    (record.arrived - arrived) / span_s if span_s > 0 else 0.0,
                    tier.fleet.holding,
                    tier.fleet.ready,
                    pool.in_flight,
                    tier.queued,
                    (record.kept - kept) / done if done else 1.0,
                    tier.fleet.waiting,
                )
            )
            tier.sampled = (now_s, record.arrived, record.kept, tier.ended_total)
        if not self._over:
            self.clock.at(now_s + self._sample_s, self._sample)


def replay(
    scenario: Scenario,
    make_policy: MakePolicy,
    arrivals: Sequence[Arrival],
    policy: str = "",
) -> SimulationResult:
    """One run over arrivals that are held in memory."""
    span_s = arrivals[-1].at_s if arrivals else 0.0
    return Simulator(scenario, make_policy, span_s=span_s).run(arrivals, policy=policy)
