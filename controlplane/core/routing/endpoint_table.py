"""What one gateway knows about the endpoints' load: its own requests exactly, the rest from snapshots.

An :class:`EndpointTable` has one :class:`TierPool` per tier, a pool has one :class:`EndpointLoad` per engine
process, and each request holds a :class:`RequestSlot` of an endpoint. This mutable state is the input to the
decisions of :mod:`controlplane.core.routing.router`; every method that needs the time takes it as ``now_s``
(monotonic). Only one event loop uses it, so there are no locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final
from zlib import crc32

from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.request import Priority
from controlplane.core.routing.circuit_breaker import Breaker, BreakerSettings
from controlplane.core.routing.tier_table import ALL_INPUTS, TierTable, api_bits

_ALPHA: Final = 0.2
"""Weight of a new sample in an endpoint's moving averages."""
_POOL_ALPHA: Final = 0.05
"""The same for a tier, which has more samples."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Settings for judging the load of endpoints."""

    stale_after_s: float = 10.0
    """An endpoint whose engine metrics are older than this counts as saturated when endpoints are compared.
    It stays usable."""
    latency_memory_s: float = 30.0
    """A latency average is ignored once its last sample is older than this."""
    silent_after_s: float = 2.0
    """An endpoint with requests that wait for their first token is suspected of being half-alive if it showed
    no activity for this long and for four times its usual time to first token."""
    reserved_ratio: float = 0.1
    """Share of a tier's slots that is reserved for high priority while such requests arrive: otherwise a
    high-priority request would wait until a lower one has finished."""
    reserve_memory_s: float = 30.0
    """Slots are reserved for this long after the last high-priority request arrived."""
    breaker: BreakerSettings = field(default_factory=BreakerSettings)


def shard_share(limit: int, index: int, count: int, offset: int = 0) -> int:
    """The part of ``limit`` that gateway ``index`` of ``count`` may use; the parts sum to ``limit``.

    Each part is at least 1 only if ``limit >= count``. The remainder of the division goes to the gateways
    from ``offset`` on: offsets differ between endpoints, so that no gateway always gets more.
    """
    if limit < 0 or count < 1 or not 0 <= index < count:
        raise ValueError(f"no share {index} of {count} in {limit}")
    each, left = divmod(limit, count)
    return each + (1 if (index - offset) % count < left else 0)


@dataclass(frozen=True, slots=True)
class GatewayShard:
    """This gateway's position among all gateway replicas."""

    index: int = 0
    count: int = 1


def gateway_shard(
    snapshot: ClusterSnapshot, gateway_id: str, last: GatewayShard | None = None
) -> GatewayShard:
    """This gateway's shard among the snapshot's gateways. A controller that is warming up may not know all
    of them yet; until then the ``last`` shard is used, because a larger share would exceed the limits."""
    if snapshot.warming and last is not None:
        return last
    ids = sorted({gateway_id, *(gateway.gateway_id for gateway in snapshot.gateways)})
    return GatewayShard(ids.index(gateway_id), len(ids))


class EndpointLoad:
    """One engine process and what this gateway knows about its load. A new process of the same replica (a new
    ``generation``) is a new ``EndpointLoad``: requests to the old process no longer count."""

    __slots__ = (
        "api_bits",
        "awaiting_first",
        "breaker",
        "doubted_s",
        "doubts",
        "endpoint",
        "held_since_s",
        "held_until_s",
        "in_flight",
        "key",
        "kv_usage_ratio",
        "last_sign_s",
        "latency_s",
        "limit",
        "observed_s",
        "others_in_flight",
        "pool",
        "proved_s",
        "ready",
        "sampled_s",
        "seed",
        "ttft_s",
        "waiting",
    )

    def __init__(self, endpoint: Endpoint, pool: TierPool | None, breaker: BreakerSettings) -> None:
        self.endpoint = endpoint
        self.pool = pool
        """The tier's pool; None once the process is gone or replaced."""
        self.key = load_key(endpoint)
        self.seed = _mix(crc32(endpoint.endpoint_id.encode()))
        self.breaker = Breaker(breaker)
        self.api_bits = api_bits(endpoint.capabilities)
        self.ready = endpoint.state is EndpointState.READY
        self.limit = endpoint.concurrency_limit
        """This gateway's share of the endpoint's limit."""
        self.in_flight = 0
        """This gateway's requests."""
        self.others_in_flight = 0
        """Requests of the other gateways, as of the last snapshot."""
        self.awaiting_first = 0
        """Requests of this gateway that have no first token yet."""
        self.ttft_s: float | None = None
        """Moving average of the time to first token."""
        self.latency_s: float | None = None
        """Moving average of the time until a response is complete."""
        self.sampled_s = -inf
        """When ``ttft_s`` got its last sample."""
        self.last_sign_s = -inf
        """When it last sent a token or response, or, if later, when requests began to wait for a first
        token."""
        self.kv_usage_ratio: float | None = None
        self.waiting: float | None = None
        """Requests in the engine's own queue."""
        self.observed_s = -inf
        """When ``kv_usage_ratio`` and ``waiting`` were measured."""
        self.held_until_s = -inf
        """The engine asked for no more requests until then (429, 503, 529): others are preferred."""
        self.held_since_s = -inf
        self.proved_s = -inf
        """When a check by the gateway itself last showed that the engine answers."""
        self.doubts = 0
        """Requests in a row that it refused as another endpoint did, with no answer in between."""
        self.doubted_s = -inf
        """When it refused the last of them."""

    def observe(self, now_s: float, *, kv_usage_ratio: float | None, waiting: float | None) -> None:
        """Stores the engine's own metrics as of ``now_s``; None for a metric that the engine does not
        report."""
        self.kv_usage_ratio = kv_usage_ratio
        self.waiting = waiting
        self.observed_s = now_s

    def begin(self, now_s: float) -> RequestSlot:
        """Starts a request at this endpoint. Raises IllegalTransition if the breaker forbids it."""
        probe = self.breaker.start(now_s)
        self.in_flight += 1
        if not self.awaiting_first:
            self.last_sign_s = now_s
        self.awaiting_first += 1
        if self.pool is not None and self.ready:
            self.pool.in_flight += 1
        return RequestSlot(self, now_s, probe)


class RequestSlot:
    """One of an endpoint's concurrent requests, held by one request. It ends with :meth:`succeed`,
    :meth:`fail` or :meth:`abandon`; further calls of these do nothing."""

    __slots__ = ("ended", "first_token_came", "load", "probe", "started_s")

    def __init__(self, load: EndpointLoad, started_s: float, probe: int) -> None:
        self.load = load
        self.started_s = started_s
        self.probe = probe
        self.first_token_came = False
        self.ended = False

    def first_token(self, now_s: float) -> None:
        """Records that the first token of a stream, or the first byte of the response, arrived."""
        if self.first_token_came or self.ended:
            return
        self.first_token_came = True
        load = self.load
        load.awaiting_first -= 1
        load.last_sign_s = load.sampled_s = now_s
        ttft_s = now_s - self.started_s
        average_s = load.ttft_s
        load.ttft_s = ttft_s if average_s is None else average_s + _ALPHA * (ttft_s - average_s)
        pool = load.pool
        if pool is not None:
            usual_s = pool.ttft_s
            pool.ttft_s = ttft_s if usual_s is None else usual_s + _POOL_ALPHA * (ttft_s - usual_s)
        load.breaker.success(now_s, self.probe)
        if load.held_until_s > now_s and self.started_s > load.held_since_s:
            load.held_until_s = now_s  # it takes requests again

    def succeed(self, now_s: float) -> None:
        """Records that the whole response arrived."""
        if self.ended:
            return
        if not self.first_token_came:
            self.first_token(now_s)
        load = self.load
        held_s = now_s - self.started_s
        average_s = load.latency_s
        load.latency_s = held_s if average_s is None else average_s + _ALPHA * (held_s - average_s)
        load.last_sign_s = now_s
        self._release(held_s)

    def fail(self, now_s: float, weight: int = 1) -> None:
        """Records that the request failed. ``weight`` is that of :meth:`Breaker.failure`; 0 if it was not the
        endpoint's fault (the request was invalid, or the engine is only busy). That says nothing about
        whether the engine can compute: an engine that rejects a request has not tried to."""
        if self.ended:
            return
        if weight:
            self.load.breaker.failure(now_s, self.probe, weight)
        else:
            self.load.breaker.abandoned(now_s, self.probe)
            self.load.last_sign_s = now_s
        self._release(None)

    def hold(self, now_s: float, hold_s: float) -> None:
        """Records that the engine is too busy for the request: others are preferred for ``hold_s``."""
        if not self.ended:
            self.load.held_since_s, self.load.held_until_s = now_s, now_s + hold_s
        self.fail(now_s, 0)

    def end_unjudged(self, now_s: float) -> None:
        """Records that the request failed, and that it is not known yet whether through the endpoint's fault.
        The caller that finds out calls the breaker's ``failure`` or ``abandoned`` with
        :attr:`probe`."""
        if not self.ended:
            self.load.last_sign_s = now_s
            self._release(None)

    def abandon(self, now_s: float) -> None:
        """Records that the client disconnected."""
        if self.ended:
            return
        if not self.first_token_came:
            self.load.breaker.abandoned(now_s, self.probe)
        self._release(now_s - self.started_s)

    def _release(self, held_s: float | None) -> None:
        self.ended = True
        load = self.load
        load.in_flight -= 1
        if not self.first_token_came:
            load.awaiting_first -= 1
        pool = load.pool
        if pool is None:
            return
        if load.ready:
            pool.in_flight -= 1
        if held_s is not None:
            usual_s = pool.service_time_s
            pool.service_time_s = held_s if usual_s is None else usual_s + _POOL_ALPHA * (held_s - usual_s)


class TierPool:
    """One tier's endpoints."""

    __slots__ = (
        "api_bits",
        "in_flight",
        "limit",
        "loads",
        "name",
        "open_limit",
        "rank",
        "service_time_s",
        "ttft_s",
    )

    def __init__(self, rank: int, name: str) -> None:
        self.rank = rank
        self.name = name
        self.loads: list[EndpointLoad] = []
        self.in_flight = 0
        """This gateway's requests at ready endpoints."""
        self.limit = 0
        """This gateway's share of the ready endpoints' limits."""
        self.open_limit = 0
        """The part of ``limit`` that low and normal priority may use while slots are reserved."""
        self.api_bits = 0
        """Bits of all APIs that its endpoints have ever served; 0 if it never had an endpoint."""
        self.ttft_s: float | None = None
        """Moving average of the time to first token."""
        self.service_time_s: float | None = None
        """Moving average of how long a request holds its slot."""

    @property
    def load_ratio(self) -> float:
        """In flight over the limit; 1 if the limit is 0."""
        return self.in_flight / self.limit if self.limit else 1.0

    def rate_per_s(self, priority: Priority) -> float | None:
        """How many requests per second the tier finishes when all slots open to ``priority`` are taken, by
        Little's law: slots over service time. None if unknown. A count of finished requests would make an
        idle tier look slow."""
        slots = self.limit if priority is Priority.HIGH else self.open_limit
        if self.service_time_s is None or not slots:
            return None
        return slots / max(self.service_time_s, 1e-6)

    def recount(self, reserved_ratio: float) -> None:
        """Sums up the ready endpoints' requests and limits."""
        ready = [load for load in self.loads if load.ready]
        self.in_flight = sum(load.in_flight for load in ready)
        self.limit = sum(load.limit for load in ready)
        reserved = int(self.limit * reserved_ratio + 0.5)
        self.open_limit = self.limit - reserved
        for load in self.loads:
            self.api_bits |= load.api_bits


class EndpointTable:
    """All tiers' endpoints, as one gateway sees them."""

    __slots__ = ("by_endpoint_id", "high_seen_s", "pools", "settings", "shard", "takes_all", "tier_table")

    def __init__(self, tier_table: TierTable, settings: LoadSettings | None = None) -> None:
        self.tier_table = tier_table
        self.settings = settings or LoadSettings()
        self.pools = tuple(TierPool(rank, policy.name) for rank, policy in enumerate(tier_table.policies))
        self.by_endpoint_id: dict[str, EndpointLoad] = {}
        self.takes_all = True
        """No endpoint is known to lack an input (:data:`INPUT_BITS`)."""
        self.shard: GatewayShard | None = None
        self.high_seen_s = -inf
        """When the last high-priority request arrived; while that is recent, slots are reserved."""

    def apply(
        self,
        endpoints: Iterable[Endpoint],
        *,
        shard: GatewayShard = GatewayShard(),
        others_in_flight: Mapping[str, int] | None = None,
    ) -> None:
        """Replaces the endpoints by a snapshot's. The load of processes that are still there is preserved,
        that of a new generation starts from zero, and endpoints of unknown tiers are left out.

        ``shard`` decides this gateway's share of every limit (:func:`shard_share`); ``others_in_flight`` is
        endpoint id → requests of the other gateways.
        """
        before = self.by_endpoint_id
        after: dict[str, EndpointLoad] = {}
        loads: list[list[EndpointLoad]] = [[] for _ in self.pools]
        for endpoint in endpoints:
            rank = self.tier_table.rank_of.get(endpoint.tier)
            if rank is None:
                continue
            known = before.get(endpoint.endpoint_id)
            if known is not None and known.key == load_key(endpoint) and known.pool is self.pools[rank]:
                load = known
                load.endpoint = endpoint
                load.ready = endpoint.state is EndpointState.READY
                load.api_bits = api_bits(endpoint.capabilities)
            else:
                load = EndpointLoad(endpoint, self.pools[rank], self.settings.breaker)
            load.limit = shard_share(endpoint.concurrency_limit, shard.index, shard.count, load.seed)
            load.others_in_flight = (others_in_flight or {}).get(endpoint.endpoint_id, 0)
            after[endpoint.endpoint_id] = load
            loads[rank].append(load)
        for endpoint_id, load in before.items():
            if after.get(endpoint_id) is not load:
                load.pool = None
        self.by_endpoint_id = after
        self.takes_all = all(load.api_bits & ALL_INPUTS == ALL_INPUTS for load in after.values())
        for pool, members in zip(self.pools, loads, strict=True):
            pool.loads = members
            pool.recount(self.settings.reserved_ratio)

    def apply_snapshot(self, snapshot: ClusterSnapshot, gateway_id: str) -> None:
        """Applies a snapshot, as merged by :func:`controlplane.core.cluster.snapshot.merge`: its endpoints,
        this gateway's shard, and the other gateways' requests."""
        self.shard = gateway_shard(snapshot, gateway_id, self.shard)
        others: dict[str, int] = {}
        for gateway in snapshot.gateways:
            if gateway.gateway_id != gateway_id:
                for endpoint_id, count in gateway.in_flight_by_endpoint:
                    others[endpoint_id] = others.get(endpoint_id, 0) + count
        self.apply(snapshot.endpoints, shard=self.shard, others_in_flight=others)

    def reserves(self, now_s: float) -> bool:
        """Whether slots are reserved for high priority now."""
        return now_s - self.high_seen_s < self.settings.reserve_memory_s


def load_key(endpoint: Endpoint) -> str:
    """Identifies one engine process. A request excludes the processes that it tried, not their replicas, so
    that it may go to the same replica again after a restart."""
    return f"{endpoint.endpoint_id}#{endpoint.generation}"


def _mix(value: int) -> int:
    """Spreads the bits of a 32-bit checksum over 64 bits (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
