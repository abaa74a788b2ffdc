"""Takes samples of each tier and endpoint from the controller's state.

Every tick shows which instances can serve and which GPUs they hold. Requests are the difference of the
gateways' counts between two samples. While a gateway is silent, no requests are counted; when it reports
again, they are counted for the whole time. What ended at an endpoint in its last moments is counted
after it is gone. Counts that a lost gateway had not reported are lost, and the time since its last report is
not covered. A controller that has just started has no counts for comparison.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint, EndpointState
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import LeaseTable
from controlplane.core.placement.gangs import WHOLE_MILLI
from controlplane.core.reports.report import SUMS, Instance, InstanceKind, ReportSample
from controlplane.core.telemetry.engine import EngineTelemetry
from controlplane.core.traffic.counters import COUNTS, TrafficCounters, since
from controlplane.core.traffic.demand import SILENT_REPORTS, TierDemandTracker

GAP_S: Final = 10.0
"""If two ticks are further apart, the time between them was not observed."""


@dataclass(frozen=True, slots=True)
class SampledCluster:
    """The part of the controller's state from which samples are taken."""

    endpoints: Mapping[str, Endpoint]
    desired: Mapping[str, int]
    """Tier → desired replicas."""
    leases: LeaseTable
    fleet: GpuInventory
    engines: Mapping[str, EngineTelemetry]
    demand: TierDemandTracker
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class _CountedTraffic:
    """The gateways' counts of all subjects."""

    over_s: float = 0.0
    """Seconds that the counts cover."""
    by_subject: Mapping[str, TrafficCounters] = field(default_factory=dict)
    has_gauges: bool = False
    """Whether the numbers of requests that wait and are in flight now are known as well."""


@dataclass(slots=True)
class _WatchedInstance:
    """One instance's times, summed over the ticks since the last sample."""

    watched_s: float = 0.0
    up_s: float = 0.0
    gpu_s: float = 0.0


class ReportSampler:
    """Call :meth:`watch` every tick, and :meth:`sample` to take a round of samples."""

    def __init__(self) -> None:
        self._last_tick_s: float | None = None
        self._watched: dict[Instance, _WatchedInstance] = {}
        self._endpoints: dict[str, Instance] = {}
        """The endpoints whose requests are counted, those that are gone included."""
        self._base: dict[str, TrafficCounters] = {}
        self._base_s: float | None = None
        self._reported_s: dict[str, float] = {}
        """Gateways seen since the last round that counted requests → when each last reported."""

    def reset(self) -> None:
        """Start again. Call this while not all gateways and replicas are known, because later counts can't be
        compared with such a state."""
        self._last_tick_s = self._base_s = None
        self._watched, self._reported_s, self._endpoints = {}, {}, {}

    def watch(self, cluster: SampledCluster, now_s: float) -> None:
        """Record which endpoints can serve and which GPUs they hold."""
        if self._base_s is None and cluster.demand.ledger.reported_s:
            self._count(self._subjects(cluster), cluster, now_s)
        self._reported_s.update(cluster.demand.ledger.reported_s)
        before_s, self._last_tick_s = self._last_tick_s, now_s
        if before_s is None or not 0.0 < now_s - before_s <= GAP_S:
            return
        span_s = now_s - before_s
        ready: set[str] = set()
        held: dict[str, float] = dict.fromkeys(cluster.desired, 0.0)
        for endpoint in cluster.endpoints.values():
            gpus = _gpus_held(endpoint, cluster.leases)
            held[endpoint.tier] = held.get(endpoint.tier, 0.0) + gpus
            up = endpoint.state in SERVING
            if up:
                ready.add(endpoint.tier)
            leaves = endpoint.state in (EndpointState.DRAINING, EndpointState.STOPPED)
            self._see(_endpoint(endpoint), span_s, counts=not leaves, up=up, gpus=gpus)
        for tier, gpus in held.items():
            up = tier in ready
            counts = up or cluster.desired.get(tier, 0) > 0
            self._see(_tier(tier), span_s, counts=counts, up=up, gpus=gpus)

    def _see(self, instance: Instance, span_s: float, *, counts: bool, up: bool, gpus: float) -> None:
        seen = self._watched.setdefault(instance, _WatchedInstance())
        seen.watched_s += span_s if counts else 0.0
        seen.up_s += span_s if up else 0.0
        seen.gpu_s += gpus * span_s

    def sample(self, cluster: SampledCluster, now_s: float) -> dict[Instance, ReportSample]:
        """One sample of each instance since the last round; empty if nothing was observed."""
        watched, self._watched = self._watched, {}
        members: dict[str, list[Endpoint]] = {tier: [] for tier in cluster.desired}
        for endpoint in cluster.endpoints.values():
            members.setdefault(endpoint.tier, []).append(endpoint)
        counted = self._count(self._subjects(cluster), cluster, now_s)
        for instance in self._endpoints.values():
            count = counted.by_subject.get(instance.name)
            if instance not in watched and count is not None and count.served:
                watched[instance] = _WatchedInstance()
        found = {}
        for instance, seen in watched.items():
            is_tier = instance.kind is InstanceKind.TIER
            if is_tier:
                mine: Iterable[Endpoint] = members.get(instance.tier, ())
            else:
                mine = [cluster.endpoints[instance.name]] if instance.name in cluster.endpoints else ()
            count = counted.by_subject.get(instance.name)
            queue = _waiting(mine, cluster.engines, now_s)
            if is_tier:
                queue = count.waiting + (queue or 0.0) if count is not None and counted.has_gauges else None
            sample = ReportSample(
                seen.watched_s,
                seen.up_s,
                gpu_s=seen.gpu_s,
                queue=queue,
                in_flight=count.in_flight if count is not None and counted.has_gauges else None,
                gpu_ratio=_gpu_ratio(mine, cluster.fleet, now_s),
            )
            found[instance] = sample if count is None else _with_counts(sample, counted.over_s, count)
        return found

    def _subjects(self, cluster: SampledCluster) -> list[str]:
        """The tiers and endpoints whose requests are counted."""
        ledger = cluster.demand.ledger
        self._endpoints = {
            name: instance
            for name, instance in self._endpoints.items()
            if name in cluster.endpoints or ledger.knows(name)
        } | {name: _endpoint(endpoint) for name, endpoint in cluster.endpoints.items()}
        tiers = dict.fromkeys((*cluster.desired, *(item.tier for item in cluster.endpoints.values())))
        return [*tiers, *self._endpoints]

    def _count(self, subjects: Collection[str], cluster: SampledCluster, now_s: float) -> _CountedTraffic:
        """The counts of each subject since the last round."""
        ledger = cluster.demand.ledger
        reported_s = ledger.reported_s
        if any(now_s - at_s > SILENT_REPORTS * cluster.heartbeat_s for at_s in reported_s.values()):
            return _CountedTraffic()
        before_s, before = self._base_s, self._base
        if before_s is None and not reported_s:
            return _CountedTraffic()
        readings = {name: ledger.reading(name) for name in subjects}
        lost_s = [at_s for name, at_s in self._reported_s.items() if name not in reported_s]
        self._base, self._base_s = readings, (now_s if reported_s else None)
        self._reported_s = dict(reported_s)
        if before_s is None:
            return _CountedTraffic()
        counts = {name: _gained(reading, before.get(name)) for name, reading in readings.items()}
        return _CountedTraffic(max(0.0, min([now_s, *lost_s]) - before_s), counts, bool(reported_s))


def _gained(reading: TrafficCounters, before: TrafficCounters | None) -> TrafficCounters:
    if before is None or reading.arrived < before.arrived or reading.served < before.served:
        before = TrafficCounters(reading.subject)  # the ledger started again at zero
    return since(reading, before)


def _with_counts(sample: ReportSample, over_s: float, count: TrafficCounters) -> ReportSample:
    return replace(
        sample,
        counted_s=over_s,
        requests=count.served,
        answered=count.ok,
        errors=count.failed,
        spilled=count.served_elsewhere,
        **{name: getattr(count, name) for name in COUNTS if name in SUMS},
        latency_counts=count.latency_counts,
        ttft_counts=count.ttft_counts,
        latency_max_s=max(count.latency_max_s, count.latency_s / count.ok) if count.ok else None,
    )


def _tier(name: str) -> Instance:
    return Instance(InstanceKind.TIER, name, name)


def _endpoint(endpoint: Endpoint) -> Instance:
    return Instance(InstanceKind.ENDPOINT, endpoint.tier, endpoint.endpoint_id)


def _gpus_held(endpoint: Endpoint, leases: LeaseTable) -> float:
    lease = leases.leases.get(endpoint.endpoint_id)
    if lease is not None:
        return sum(part.milli for part in lease.parts) / WHOLE_MILLI
    return 0.0 if endpoint.state in ENDED else float(len(endpoint.gpu_uuids))


def _waiting(
    members: Iterable[Endpoint], engines: Mapping[str, EngineTelemetry], now_s: float
) -> float | None:
    """Requests that wait in engines with a fresh signal; None if there is no such engine."""
    known = [
        waiting
        for item in members
        if item.endpoint_id in engines
        and (waiting := engines[item.endpoint_id].load(now_s).waiting.fresh) is not None
    ]
    return sum(known) if known else None


def _gpu_ratio(members: Iterable[Endpoint], fleet: GpuInventory, now_s: float) -> float | None:
    """Mean utilisation over the members' GPUs with a fresh signal; None if there is no such GPU."""
    ratios = []
    for uuid in {uuid for item in members for uuid in item.gpu_uuids}:
        ratio = fleet.signals(uuid, now_s).gpu_ratio.fresh if uuid in fleet.records else None
        if ratio is not None:
            ratios.append(ratio)
    return sum(ratios) / len(ratios) if ratios else None
