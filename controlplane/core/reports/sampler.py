"""What each tier and endpoint did since the last look, from what the controller knows anyway.

Whether something can serve and which GPUs it holds is seen every tick; requests are what the gateways
counted between two samples. While a gateway is silent nobody knows what is served: nothing is counted until
it is heard of again, and then for the whole time. One that is lost takes what it had not told along: the time
since then is not covered. A controller that has just started begins anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint, EndpointState
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.gpus.leases import WHOLE_MILLI, LeaseBook
from controlplane.core.reports.report import Instance, InstanceKind, ReportSample
from controlplane.core.telemetry.engine import EngineTelemetry
from controlplane.core.traffic.counters import TrafficCounters, since
from controlplane.core.traffic.demand import SILENT_REPORTS, TierDemandTracker

GAP_S: Final = 10.0
"""Between two looks further apart than this nothing was seen."""


@dataclass(frozen=True, slots=True)
class SampledCluster:
    """What there is to look at."""

    endpoints: Mapping[str, Endpoint]
    wanted: Mapping[str, int]
    """Tier → replicas that it is meant to have."""
    leases: LeaseBook
    fleet: GpuInventory
    engines: Mapping[str, EngineTelemetry]
    demand: TierDemandTracker
    heartbeat_s: float


@dataclass(frozen=True, slots=True)
class _CountedTraffic:
    """What gateways counted of everybody."""

    over_s: float = 0.0
    """For so long it is known."""
    by_subject: Mapping[str, TrafficCounters] = field(default_factory=dict)
    present: bool = False
    """Whether what waits and what is in flight is known, too."""


@dataclass(slots=True)
class _WatchedInstance:
    """What was seen of one instance since the last sample."""

    watched_s: float = 0.0
    up_s: float = 0.0
    gpu_s: float = 0.0


class ReportSampler:
    """Call :meth:`watch` every tick, and :meth:`take` for each sample."""

    def __init__(self) -> None:
        self._looked_s: float | None = None
        self._watched: dict[Instance, _WatchedInstance] = {}
        self._base: dict[str, TrafficCounters] = {}
        self._base_s: float | None = None
        self._heard: dict[str, float] = {}
        """Gateways since the last sample that counted: when each was last heard of."""

    def begin_anew(self) -> None:
        """Not everybody is known: what was seen so far is no base for what comes."""
        self._looked_s = self._base_s = None
        self._watched, self._heard = {}, {}

    def watch(self, scene: SampledCluster, now_s: float) -> None:
        """A look at who can serve."""
        if self._base_s is None and scene.demand.book.gateways:
            self._count(self._subjects(scene), scene, now_s)
        self._heard.update(scene.demand.book.gateways)
        before_s, self._looked_s = self._looked_s, now_s
        if before_s is None or not 0.0 < now_s - before_s <= GAP_S:
            return
        span_s = now_s - before_s
        ready: set[str] = set()
        held: dict[str, float] = dict.fromkeys(scene.wanted, 0.0)
        for endpoint in scene.endpoints.values():
            gpus = _gpus_held(endpoint, scene.leases)
            held[endpoint.tier] = held.get(endpoint.tier, 0.0) + gpus
            up = endpoint.state in SERVING
            if up:
                ready.add(endpoint.tier)
            leaves = endpoint.state in (EndpointState.DRAINING, EndpointState.STOPPED)
            self._see(_endpoint(endpoint), span_s, counts=not leaves, up=up, gpus=gpus)
        for tier, gpus in held.items():
            up = tier in ready
            counts = up or scene.wanted.get(tier, 0) > 0
            self._see(_tier(tier), span_s, counts=counts, up=up, gpus=gpus)

    def _see(self, instance: Instance, span_s: float, *, counts: bool, up: bool, gpus: float) -> None:
        seen = self._watched.setdefault(instance, _WatchedInstance())
        seen.watched_s += span_s if counts else 0.0
        seen.up_s += span_s if up else 0.0
        seen.gpu_s += gpus * span_s

    def take(self, scene: SampledCluster, now_s: float) -> dict[Instance, ReportSample]:
        """What everybody did since the last sample; nothing if nothing was seen."""
        watched, self._watched = self._watched, {}
        members: dict[str, list[Endpoint]] = {tier: [] for tier in scene.wanted}
        for endpoint in scene.endpoints.values():
            members.setdefault(endpoint.tier, []).append(endpoint)
        counted = self._count(self._subjects(scene), scene, now_s)
        found = {}
        for instance, seen in watched.items():
            is_tier = instance.kind is InstanceKind.TIER
            if is_tier:
                mine: Iterable[Endpoint] = members.get(instance.tier, ())
            else:
                mine = [scene.endpoints[instance.name]] if instance.name in scene.endpoints else ()
            count = counted.by_subject.get(instance.name)
            queue = _waiting(mine, scene.engines, now_s)
            if is_tier:
                queue = count.waiting + (queue or 0.0) if count is not None and counted.present else None
            sample = ReportSample(
                seen.watched_s,
                seen.up_s,
                gpu_s=seen.gpu_s,
                queue=queue,
                in_flight=count.in_flight if count is not None and counted.present else None,
                gpu_ratio=_gpu_ratio(mine, scene.fleet, now_s),
            )
            found[instance] = sample if count is None else _with_counts(sample, counted.over_s, count)
        return found

    def _subjects(self, scene: SampledCluster) -> list[str]:
        """The tiers and endpoints that anything may be counted of."""
        tiers = dict.fromkeys((*scene.wanted, *(item.tier for item in scene.endpoints.values())))
        return [*tiers, *scene.endpoints]

    def _count(self, subjects: Collection[str], scene: SampledCluster, now_s: float) -> _CountedTraffic:
        """What was counted of each subject since the last time."""
        book = scene.demand.book
        heard = book.gateways
        if any(now_s - at_s > SILENT_REPORTS * scene.heartbeat_s for at_s in heard.values()):
            return _CountedTraffic()
        before_s, before = self._base_s, self._base
        if before_s is None and not heard:
            return _CountedTraffic()
        readings = {name: book.reading(name) for name in subjects}
        lost_s = [at_s for name, at_s in self._heard.items() if name not in heard]
        self._base, self._base_s = readings, (now_s if heard else None)
        self._heard = dict(heard)
        if before_s is None:
            return _CountedTraffic()
        counts = {name: _gained(reading, before.get(name)) for name, reading in readings.items()}
        return _CountedTraffic(max(0.0, min([now_s, *lost_s]) - before_s), counts, bool(heard))


def _gained(reading: TrafficCounters, before: TrafficCounters | None) -> TrafficCounters:
    if before is None or reading.arrived < before.arrived or reading.served < before.served:
        before = TrafficCounters(reading.subject)  # the book began to count it anew
    return since(reading, before)


def _with_counts(sample: ReportSample, over_s: float, count: TrafficCounters) -> ReportSample:
    return replace(
        sample,
        counted_s=over_s,
        requests=count.served,
        answered=count.ok,
        errors=count.failed,
        shed=count.shed,
        retried=count.retried,
        resumed=count.resumed,
        arrived=count.arrived,
        spilled=count.away,
        judged=count.judged,
        missed=count.missed,
        prompt_tokens=count.prompt_tokens,
        generated_tokens=count.generated_tokens,
        latency_s=count.latency_s,
        latency_max_s=max(count.latency_max_s, count.latency_s / count.ok) if count.ok else None,
    )


def _tier(name: str) -> Instance:
    return Instance(InstanceKind.TIER, name, name)


def _endpoint(endpoint: Endpoint) -> Instance:
    return Instance(InstanceKind.ENDPOINT, endpoint.tier, endpoint.endpoint_id)


def _gpus_held(endpoint: Endpoint, book: LeaseBook) -> float:
    lease = book.leases.get(endpoint.endpoint_id)
    if lease is not None:
        return sum(part.milli for part in lease.parts) / WHOLE_MILLI
    return 0.0 if endpoint.state in ENDED else float(len(endpoint.gpu_uuids))


def _waiting(
    members: Iterable[Endpoint], engines: Mapping[str, EngineTelemetry], now_s: float
) -> float | None:
    """In the engines that say so freshly; None if none does."""
    known = [
        waiting
        for item in members
        if item.endpoint_id in engines
        and (waiting := engines[item.endpoint_id].load(now_s).waiting.fresh) is not None
    ]
    return sum(known) if known else None


def _gpu_ratio(members: Iterable[Endpoint], fleet: GpuInventory, now_s: float) -> float | None:
    """Mean over the members' GPUs of which it is freshly known; None if of none."""
    ratios = []
    for uuid in {uuid for item in members for uuid in item.gpu_uuids}:
        ratio = fleet.signals(uuid, now_s).gpu_ratio.fresh if uuid in fleet.records else None
        if ratio is not None:
            ratios.append(ratio)
    return sum(ratios) / len(ratios) if ratios else None
