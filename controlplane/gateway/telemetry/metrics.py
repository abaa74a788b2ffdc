"""The gateway's Prometheus metrics.

Each gateway replica has its own registry. The replicas of a node share a port, so a scrape reaches any one of
them; :func:`merge_expositions` merges the expositions of all replicas and distinguishes them by the label
``gateway``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from controlplane.core.admission.queue import AdmissionQueue
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.domain.request import Priority, RequestOutcome
from controlplane.core.gpus.node_views import NodeView
from controlplane.core.routing.circuit_breaker import BreakerState
from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.errors import DeadlineExceeded
from controlplane.gateway.request_context import RequestContext
from controlplane.gateway.telemetry.request_log import RequestLog
from controlplane.gateway.telemetry.traffic import TrafficCounter

LATENCY_BUCKETS_S: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
TOKEN_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


# Attribute look-ups on an enum class cost more than on a module.
_OK: Final = RequestOutcome.OK
_TOO_LATE: Final = DeadlineExceeded.code
_BREAKER_LEVELS: Final = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 0.5, BreakerState.OPEN: 1.0}


class _Tally:
    """A counter's series that nearly every request adds to: a plain number until the registry is read,
    because each ``Counter.inc`` takes a lock and checks its arguments."""

    __slots__ = ("_series", "_value")

    def __init__(self, series: Counter) -> None:
        self._series = series
        self._value = 0.0

    def add(self, amount: float) -> None:
        """Add to the series; ``amount`` is not negative."""
        self._value += amount

    def flush(self) -> None:
        """Bring the series up to date."""
        if self._value:
            value, self._value = self._value, 0.0
            self._series.inc(value)


class _Tallies(Collector):
    """Registered before all metrics, so that reading the registry brings the counters up to date first."""

    def __init__(self) -> None:
        self._all: list[_Tally] = []

    def of(self, series: Counter) -> _Tally:
        """A tally for a series."""
        tally = _Tally(series)
        self._all.append(tally)
        return tally

    def describe(self) -> Iterable[Metric]:
        """It has no metrics of its own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """It has no metrics of its own."""
        for tally in self._all:
            tally.flush()
        return ()


class _TierSeries(NamedTuple):
    """The labelled series of one tier, looked up once."""

    total_s: Histogram
    ttft_s: Histogram
    prompt: _Tally
    generated: _Tally
    gpu_s: _Tally
    next_gpu_s: _Tally
    slo_judged: _Tally
    slo_missed: _Tally


class Metrics:
    """All series of one gateway replica. ``traffic`` counts the same requests for the controller."""

    def __init__(self, traffic: TrafficCounter | None = None) -> None:
        self.traffic = traffic
        self.registry = CollectorRegistry()
        self._tallies = _Tallies()
        self.registry.register(self._tallies)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        latency = partial(Histogram, buckets=LATENCY_BUCKETS_S, registry=self.registry)
        self.requests = counter(
            "tierplane_requests",
            "Requests that have ended, by tier that served them, outcome (ok, client_error, failed, shed, "
            "deadline, cancelled) and reason.",
            ["tier", "outcome", "reason"],
        )
        self.total_s = latency(
            "tierplane_request_seconds", "Time from a request's arrival to the end of its response.", ["tier"]
        )
        self.ttft_s = latency(
            "tierplane_time_to_first_token_seconds",
            "Time from a request's arrival to the first token of a streamed response.",
            ["tier"],
        )
        self.itl_s = Histogram(
            "tierplane_inter_token_seconds",
            "Mean time between the events of a streamed response; one observation per stream.",
            ["tier"],
            buckets=TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.tokens = counter(
            "tierplane_tokens", "Tokens of finished requests, by kind (prompt, generated).", ["tier", "kind"]
        )
        self.wrong_usage = counter(
            "tierplane_wrong_usage",
            "Responses whose usage can't be right: not a whole number of tokens, negative, over 10 million. "
            "Such figures are not counted.",
            ["tier"],
        )
        self.gpu_s = counter(
            "tierplane_gpu_seconds",
            "GPU time of requests, by processor sharing (device time for engines without a GPU).",
            ["tier"],
        )
        self.next_tier_gpu_s = counter(
            "tierplane_next_tier_gpu_seconds",
            "GPU time that the same tokens would have taken at the next more capable tier, where known.",
            ["tier"],
        )
        self.in_flight = gauge("tierplane_in_flight_requests", "Requests at the engines now.", ["tier"])
        self.slots = gauge(
            "tierplane_slots",
            "Requests that a gateway may have at a tier's engines at the same time.",
            ["tier"],
        )
        self.queued = gauge("tierplane_queued_requests", "Requests waiting for an engine now.", ["priority"])
        self.queue_wait_s = latency(
            "tierplane_queue_wait_seconds",
            "Time that requests waited for an engine; requests that did not wait are not counted.",
            ["priority"],
        )
        self.retries = counter(
            "tierplane_retries",
            "Attempts after the first, by tier and by the reason why the previous attempt failed; those of "
            "requests that were themselves to blame are not counted.",
            ["tier", "reason"],
        )
        self.resumes = counter(
            "tierplane_resumes",
            "Streams whose engine was lost, by how they were continued (continue, replay, finish, refused).",
            ["method"],
        )
        self.spills = counter(
            "tierplane_spills",
            "Requests served by a tier other than the intended one, by kind (spill, bridge).",
            ["from_tier", "to_tier", "kind"],
        )
        self.shed = counter(
            "tierplane_shed_requests", "Requests that were not admitted, by reason.", ["reason"]
        )
        self.endpoint_failures = counter(
            "tierplane_endpoint_failures",
            "Attempts that failed at an endpoint, by kind; request: the request itself was to blame.",
            ["tier", "kind"],
        )
        self.breaker_open = gauge(
            "tierplane_breaker_open",
            "1 while an endpoint's circuit breaker is open, 0.5 while it is half-open, 0 while it is closed.",
            ["tier", "endpoint"],
        )
        self.endpoints = gauge("tierplane_endpoints", "Endpoints by tier and state.", ["tier", "state"])

        self.due = gauge(
            "tierplane_due_replicas", "Replicas that a tier should have now: 0 while it is drained.", ["tier"]
        )
        self.alerts = gauge(
            "tierplane_alerts",
            "1 for each alert that is firing, as evaluated by the controller.",
            ["alert", "severity", "subject"],
        )
        self.slo_judged = counter(
            "tierplane_slo_judged_requests",
            "Requests that count for the SLO of the tier for which they were intended.",
            ["tier"],
        )
        self.slo_missed = counter(
            "tierplane_slo_missed_requests",
            "Requests counted in tierplane_slo_judged_requests that missed the SLO.",
            ["tier"],
        )
        self.slo_target = gauge(
            "tierplane_slo_target_ratio",
            "The share of a tier's requests that must meet its SLO (slo.attainment).",
            ["tier"],
        )
        self.target_replicas = gauge(
            "tierplane_target_replicas", "Target number of replicas of a tier.", ["tier"]
        )
        self.wanted_replicas = gauge(
            "tierplane_wanted_replicas",
            "Replicas that the scaling policy computes, whether or not its decision is applied.",
            ["tier"],
        )
        self.forecast_per_s = gauge(
            "tierplane_forecast_requests_per_second",
            "Requests per second expected at the time when a replica started now would be ready.",
            ["tier"],
        )
        self.recommendation = gauge(
            "tierplane_recommendation",
            "1 while a recommendation of this kind is active (scale_up, scale_out, scale_down, rebalance).",
            ["tier", "kind"],
        )
        self.node_cpu = gauge("tierplane_node_cpu_ratio", "Busy share of a node's CPUs, in [0, 1].", ["node"])
        self.node_load = gauge(
            "tierplane_node_load_1m",
            "Processes of a node that run or wait for a CPU, averaged over a minute.",
            ["node"],
        )
        self.node_memory_total = gauge("tierplane_node_memory_total_bytes", "A node's memory.", ["node"])
        self.node_memory_available = gauge(
            "tierplane_node_memory_available_bytes",
            "Memory of a node that is available to processes.",
            ["node"],
        )
        self.node_disk_total = gauge(
            "tierplane_node_disk_total_bytes",
            "Size of a node's file system that has the run folder, temporary files or models.",
            ["node", "path"],
        )
        self.node_disk_free = gauge(
            "tierplane_node_disk_free_bytes", "Free space of that file system.", ["node", "path"]
        )
        self.node_age = gauge(
            "tierplane_node_report_age_seconds", "Age of the node's figures above.", ["node"]
        )
        self.hedges = counter(
            "tierplane_hedges", "Hedged attempts, by whether they won against the first attempt.", ["outcome"]
        )
        self.on_finished: Callable[[RequestContext, RequestOutcome, str, float], None] | None = None
        """Called for each request that has ended, with its context, outcome, reason and end time
        (monotonic)."""
        self.request_log: RequestLog | None = None
        self._per_tier: dict[str, _TierSeries] = {}
        self._outcomes: dict[tuple[str, RequestOutcome, str], _Tally] = {}
        for tier, target in traffic.slo_targets.items() if traffic is not None else ():
            self.slo_target.labels(tier).set(target)

    def observe_nodes(self, nodes: Iterable[NodeView]) -> None:
        """Replace the figures of nodes. What is not known has no series."""
        for series in (
            *(self.node_cpu, self.node_load, self.node_memory_total, self.node_memory_available),
            *(self.node_disk_total, self.node_disk_free, self.node_age),
        ):
            series.clear()
        for node in nodes:
            for gauge, value in (
                (self.node_cpu, node.cpu_ratio),
                (self.node_load, node.load_1m),
                (self.node_memory_total, node.memory_total_bytes),
                (self.node_memory_available, node.memory_available_bytes),
                (self.node_age, node.age_s),
            ):
                if value is not None:
                    gauge.labels(node.node_id).set(value)
            for disk in node.disks:
                self.node_disk_total.labels(node.node_id, disk.path).set(disk.total_bytes)
                self.node_disk_free.labels(node.node_id, disk.path).set(disk.free_bytes)

    def finished(self, context: RequestContext, outcome: RequestOutcome, reason: str, now_s: float) -> None:
        """Count a request that has ended. ``reason`` is a detail of the outcome: an error's code, the HTTP
        status, ``stream`` or ``resumed``."""
        if reason == _TOO_LATE and self.traffic is not None and self.traffic.had_too_little_time(context):
            outcome = RequestOutcome.DEADLINE
        if self.on_finished is not None:
            self.on_finished(context, outcome, reason, now_s)
        if self.request_log is not None:
            self.request_log.add(context, outcome, reason, now_s)
        judged = self.traffic.ended(context, outcome, now_s) if self.traffic is not None else None
        if judged is not None:
            intended, missed = judged
            judging = self._series(intended)
            judging.slo_judged.add(1)
            if missed:
                judging.slo_missed.add(1)
        tier = context.tier
        key = (tier, outcome, reason)
        tally = self._outcomes.get(key)
        if tally is None:
            tally = self._outcomes[key] = self._tallies.of(self.requests.labels(*key))
        tally.add(1)
        if outcome is _OK:
            series = self._series(tier)
            series.total_s.observe(now_s - context.arrived_s)
            if context.stream:
                series.ttft_s.observe(context.first_byte_s - context.arrived_s)

    def used(
        self, context: RequestContext, tier: str, prompt: int, generated: int, next_gpu_s: float | None
    ) -> None:
        """Count the tokens and the GPU time of a request, before :meth:`finished`."""
        context.prompt_tokens = prompt
        if self.traffic is not None:
            self.traffic.used(context, tier, prompt, generated)
        series = self._series(tier)
        series.prompt.add(prompt)
        series.generated.add(generated)
        series.gpu_s.add(context.gpu_s)
        if next_gpu_s is not None:
            series.next_gpu_s.add(next_gpu_s)

    def _series(self, tier: str) -> _TierSeries:
        series = self._per_tier.get(tier)
        if series is None:
            tally = self._tallies.of
            series = self._per_tier[tier] = _TierSeries(
                self.total_s.labels(tier),
                self.ttft_s.labels(tier),
                tally(self.tokens.labels(tier, "prompt")),
                tally(self.tokens.labels(tier, "generated")),
                tally(self.gpu_s.labels(tier)),
                tally(self.next_tier_gpu_s.labels(tier)),
                tally(self.slo_judged.labels(tier)),
                tally(self.slo_missed.labels(tier)),
            )
        return series

    def observe(self, endpoint_table: EndpointTable, queue: AdmissionQueue) -> None:
        """Set the load gauges to their present values. Call this before they are read."""
        self.breaker_open.clear()
        self.endpoints.clear()
        for pool in endpoint_table.pools:
            self.in_flight.labels(pool.name).set(pool.in_flight)
            self.slots.labels(pool.name).set(pool.limit)
            for load in pool.loads:
                endpoint = load.endpoint
                self.endpoints.labels(pool.name, endpoint.state).inc()
                level = _BREAKER_LEVELS[load.breaker.state]
                self.breaker_open.labels(pool.name, endpoint.endpoint_id).set(level)
        for priority in Priority:
            self.queued.labels(priority).set(queue.depth(priority))

    def observe_snapshot(self, snapshot: ClusterSnapshot | None, configured: Mapping[str, int]) -> None:
        """Set the gauges of the data that the controller publishes. ``configured`` is tier → replicas; it is
        used for tiers that the snapshot does not mention."""
        self.alerts.clear()
        for alert in snapshot.alerts if snapshot is not None else ():
            self.alerts.labels(alert.rule, alert.severity, alert.subject).set(1)
        self.recommendation.clear()
        for item in snapshot.scaling if snapshot is not None else ():
            self.target_replicas.labels(item.tier).set(item.target)
            self.wanted_replicas.labels(item.tier).set(item.wanted)
            self.forecast_per_s.labels(item.tier).set(item.forecast_per_s)
            if item.recommendation:
                self.recommendation.labels(item.tier, item.recommendation).set(1)
        due = dict(snapshot.due) if snapshot is not None else {}
        for tier, replicas in configured.items():
            self.due.labels(tier).set(due.get(tier, replicas))

    def text(self) -> str:
        """This replica's metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()


def merge_expositions(expositions: Iterable[tuple[str, str]]) -> str:
    """Join several ``(gateway id, text)`` into one exposition; every sample gets a ``gateway`` label."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for gateway_id, text in expositions:
        label = f'gateway="{gateway_id}"'
        head: list[str] = []
        samples: list[str] = []
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
                if name != family:
                    family = name
                    head, samples = families.setdefault(family, ([], []))
                if line not in head and len(head) < 2:
                    head.append(line)
            elif line:
                samples.append(_labelled(line, label))
    lines: list[str] = []
    for head, samples in families.values():
        lines += head + samples
    return "\n".join(lines) + "\n"


def _labelled(sample: str, label: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
