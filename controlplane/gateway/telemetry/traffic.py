"""What one gateway replica counts of each tier and endpoint, for the controller
(:mod:`controlplane.core.traffic.counters`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final

from controlplane.core.admission.queue import AdmissionQueue
from controlplane.core.domain.slo import Slo
from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.core.routing.tier_table import TierTable
from controlplane.core.traffic.counters import LATENCY_BOUNDS_S, TrafficCounters, within_slo
from controlplane.gateway.proxy.request_context import RequestContext

MAX_SLOT_S: Final = 10.0
"""A largest latency is told for so long, and up to twice that."""


ASLEEP_AGAIN_S: Final = 0.25


def _nobody() -> None:
    """Nobody wants to know."""


class _SubjectCounts:
    """One subject's figures, while they grow."""

    __slots__ = (
        *("arrived", "judged", "missed", "away", "ok", "failed", "shed", "retried", "resumed"),
        *("prompt_tokens", "generated_tokens", "gpu_s", "latency_s", "latency", "ttft"),
        *("max_s", "max_before_s", "max_since_s"),
    )

    def __init__(self) -> None:
        self.arrived = self.judged = self.missed = self.away = 0
        self.ok = self.failed = self.shed = self.retried = self.resumed = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.gpu_s = self.latency_s = 0.0
        self.latency = [0] * len(LATENCY_BOUNDS_S)
        self.ttft = [0] * len(LATENCY_BOUNDS_S)
        self.max_s = self.max_before_s = self.max_since_s = 0.0

    def served(self, call: RequestContext, outcome: str, total_s: float, now_s: float) -> None:
        self.retried += max(0, call.attempts - 1)
        if outcome == "ok":
            self.ok += 1
            self.resumed += call.resumed
            self.latency_s += total_s
            self.latency[bisect_left(LATENCY_BOUNDS_S, total_s)] += 1
            if call.stream:
                self.ttft[bisect_left(LATENCY_BOUNDS_S, call.first_byte_s - call.arrived_s)] += 1
            self._turn(now_s)
            self.max_s = max(self.max_s, total_s)
        elif outcome == "failed":
            self.failed += 1
        elif outcome == "shed":
            self.shed += 1

    def _turn(self, now_s: float) -> None:
        """Begin a new slot of the largest latency, if it is time."""
        if now_s - self.max_since_s >= MAX_SLOT_S:
            self.max_before_s = self.max_s if now_s - self.max_since_s < 2 * MAX_SLOT_S else 0.0
            self.max_s = 0.0
            self.max_since_s = now_s

    def reading(self, subject: str, waiting: int, in_flight: int, now_s: float) -> TrafficCounters:
        self._turn(now_s)
        return TrafficCounters(
            subject,
            arrived=self.arrived,
            judged=self.judged,
            missed=self.missed,
            away=self.away,
            ok=self.ok,
            failed=self.failed,
            shed=self.shed,
            retried=self.retried,
            resumed=self.resumed,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            gpu_s=self.gpu_s,
            latency_s=self.latency_s,
            latency_counts=tuple(self.latency),
            ttft_counts=tuple(self.ttft),
            waiting=waiting,
            in_flight=in_flight,
            latency_max_s=max(self.max_s, self.max_before_s),
        )


class TrafficCounter:
    """Counts one gateway replica's requests."""

    def __init__(self, table: TierTable, slos: Mapping[str, Slo]) -> None:
        self._table = table
        self._slos = slos
        self._names = [policy.name for policy in table.policies]
        self._tiers = {name: _SubjectCounts() for name in self._names}
        self._endpoints: dict[str, _SubjectCounts] = {}
        self.on_asleep: Callable[[], None] = _nobody
        """Called when a request is meant for a tier without an endpoint, every now and then."""
        self._asleep_s = 0.0

    @property
    def slo_targets(self) -> Mapping[str, float]:
        """Tier → the share of its requests that must keep its SLO."""
        return {tier: slo.attainment for tier, slo in self._slos.items()}

    def arrived(self, rank: int, *, asleep: bool = False) -> None:
        """A request came that is meant for the tier of that rank; ``asleep``: it has no endpoint."""
        self._tiers[self._names[rank]].arrived += 1
        if asleep and (now_s := monotonic()) - self._asleep_s >= ASLEEP_AGAIN_S:
            self._asleep_s = now_s
            self.on_asleep()

    def used(self, call: RequestContext, tier: str, prompt: int, generated: int) -> None:
        """What a call that is about to end took."""
        call.generated_tokens = generated
        for counts in self._of(tier, call):
            counts.prompt_tokens += prompt
            counts.generated_tokens += generated
            counts.gpu_s += call.gpu_s

    def ended(self, call: RequestContext, outcome: str, now_s: float) -> tuple[str, bool] | None:
        """A call ended: with outcome ``ok``, ``client_error``, ``failed``, ``shed`` or ``cancelled``. The
        tier that it was meant for and whether it missed that tier's SLO; None: it does not count for one."""
        total_s = now_s - call.arrived_s
        for counts in self._of(call.tier, call):
            counts.served(call, outcome, total_s, now_s)
        if call.route is None or not call.route.order or outcome in ("client_error", "cancelled"):
            return None
        meant = self._names[call.route.order[0]]
        counts = self._tiers[meant]
        counts.judged += 1
        counts.away += bool(call.tier) and call.tier != meant and outcome == "ok"
        missed = outcome != "ok" or not self._kept(call, meant, total_s)
        counts.missed += missed
        return meant, missed

    def _kept(self, call: RequestContext, tier: str, total_s: float) -> bool:
        tokens = call.generated_tokens
        if not call.stream:
            return within_slo(self._slos[tier], ttft_s=None, itl_s=None, total_s=total_s, tokens=tokens)
        ttft_s = call.first_byte_s - call.arrived_s
        itl_s = (total_s - ttft_s) / (tokens - 1) if tokens > 1 else None
        return within_slo(self._slos[tier], ttft_s=ttft_s, itl_s=itl_s, total_s=total_s, tokens=tokens)

    def _of(self, tier: str, call: RequestContext) -> list[_SubjectCounts]:
        """The tier and the endpoint that serve a call."""
        found = [self._tiers[tier]] if tier in self._tiers else []
        load = call.decision.load if call.decision is not None else None
        if load is not None:
            name = load.endpoint.endpoint_id
            counts = self._endpoints.get(name)
            if counts is None:
                counts = self._endpoints[name] = _SubjectCounts()
            found.append(counts)
        return found

    def read(self, fleet: EndpointTable, queue: AdmissionQueue) -> tuple[TrafficCounters, ...]:
        """Every tier, and every endpoint that is there; those that are gone are forgotten."""
        now_s = monotonic()
        waiting = [0] * len(self._names)
        for ticket in queue.waiting():
            waiting[ticket.payload.route.order[0]] += 1
        found = [
            self._tiers[pool.name].reading(pool.name, waiting[pool.rank], pool.in_flight, now_s)
            for pool in fleet.pools
        ]
        for name in self._endpoints.keys() - fleet.by_endpoint_id.keys():
            del self._endpoints[name]
        for name, load in fleet.by_endpoint_id.items():
            counts = self._endpoints.get(name)
            if counts is not None:
                found.append(counts.reading(name, 0, load.in_flight, now_s))
        return tuple(found)
