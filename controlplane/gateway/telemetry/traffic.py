"""One gateway replica's counters of each tier and endpoint, which the controller reads
(:mod:`controlplane.core.traffic.counters`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final

from controlplane.core.admission.queue import AdmissionQueue
from controlplane.core.domain.request import RequestOutcome
from controlplane.core.domain.slo import Slo
from controlplane.core.routing.dispatcher import QueuedRequest
from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.core.routing.tier_table import TierTable
from controlplane.core.traffic.counters import COUNTS, LATENCY_BOUNDS_S, TrafficCounters, within_slo
from controlplane.core.traffic.gone_subjects import GoneSubjects
from controlplane.gateway.request_context import RequestContext

LARGEST_SLOT_S: Final = 10.0
"""A maximum latency is reported for at least this long, and at most twice as long."""
KEEP_GONE_S: Final = 600.0
"""The counts of an endpoint that is gone are reported for this long: its last requests end after it went, and
reports may be lost."""
MAX_GONE: Final = 256
"""Endpoints that are gone and whose counts are reported; beyond that, the first that went are dropped."""

# Attribute look-ups on an enum class cost more than on a module.
_OK: Final = RequestOutcome.OK
_FAILED: Final = RequestOutcome.FAILED
_SHED: Final = RequestOutcome.SHED
_NOT_JUDGED: Final = frozenset(
    {RequestOutcome.CLIENT_ERROR, RequestOutcome.CANCELLED, RequestOutcome.DEADLINE}
)

ASLEEP_INTERVAL_S: Final = 0.25
"""Minimum time between two calls of ``on_asleep``."""


def _do_nothing() -> None:
    """The default of ``on_asleep``."""


class _SubjectCounts:
    """The counters of one tier or endpoint."""

    __slots__ = (
        "arrived",
        "failed",
        "generated_tokens",
        "judged",
        "latency",
        "latency_s",
        "max_before_s",
        "max_s",
        "max_since_s",
        "missed",
        "ok",
        "prompt_tokens",
        "resumed",
        "retried",
        "served_elsewhere",
        "shed",
        "ttft",
    )  # fmt: skip

    def __init__(self) -> None:
        self.arrived = self.judged = self.missed = self.served_elsewhere = 0
        self.ok = self.failed = self.shed = self.retried = self.resumed = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.latency_s = 0.0
        self.latency = [0] * len(LATENCY_BOUNDS_S)
        self.ttft = [0] * len(LATENCY_BOUNDS_S)
        self.max_s = self.max_before_s = self.max_since_s = 0.0

    def served(self, context: RequestContext, outcome: RequestOutcome, total_s: float, now_s: float) -> None:
        if context.attempts > 1 and outcome is not RequestOutcome.CLIENT_ERROR:
            self.retried += context.attempts - 1
        if outcome is _OK:
            self.ok += 1
            self.resumed += context.resumed
            self.latency_s += total_s
            self.latency[bisect_left(LATENCY_BOUNDS_S, total_s)] += 1
            if context.stream:
                self.ttft[bisect_left(LATENCY_BOUNDS_S, context.first_byte_s - context.arrived_s)] += 1
            self._begin_slot_if_due(now_s)
            self.max_s = max(self.max_s, total_s)
        elif outcome is _FAILED:
            self.failed += 1
        elif outcome is _SHED:
            self.shed += 1

    def _begin_slot_if_due(self, now_s: float) -> None:
        """Begin a new slot of the maximum latency if the current one is over."""
        if now_s - self.max_since_s >= LARGEST_SLOT_S:
            self.max_before_s = self.max_s if now_s - self.max_since_s < 2 * LARGEST_SLOT_S else 0.0
            self.max_s = 0.0
            self.max_since_s = now_s

    def reading(self, subject: str, waiting: int, in_flight: int, now_s: float) -> TrafficCounters:
        self._begin_slot_if_due(now_s)
        return TrafficCounters(
            subject,
            **{name: getattr(self, name) for name in COUNTS},
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
        self._gone = GoneSubjects()
        """Counted endpoint that is gone → since when, in this order."""
        self.on_asleep: Callable[[], None] = _do_nothing
        """Called when a request arrives for a tier without endpoints, at most every ``ASLEEP_INTERVAL_S``."""
        self._asleep_s = 0.0

    @property
    def slo_targets(self) -> Mapping[str, float]:
        """Tier → the share of its requests that must meet its SLO."""
        return {tier: slo.attainment for tier, slo in self._slos.items()}

    def arrived(self, rank: int, *, asleep: bool = False) -> None:
        """Count a request that has arrived for the tier of ``rank``; ``asleep``: the tier has no
        endpoints."""
        self._tiers[self._names[rank]].arrived += 1
        if asleep and (now_s := monotonic()) - self._asleep_s >= ASLEEP_INTERVAL_S:
            self._asleep_s = now_s
            self.on_asleep()

    def used(self, context: RequestContext, tier: str, prompt: int, generated: int) -> None:
        """Count the tokens and the GPU time of a request, before :meth:`ended`."""
        context.generated_tokens = generated
        for counts in self._of(tier, context):
            counts.prompt_tokens += prompt
            counts.generated_tokens += generated

    def ended(
        self, context: RequestContext, outcome: RequestOutcome, now_s: float
    ) -> tuple[str, bool] | None:
        """Count a request that has ended.

        Returns the tier for which it was intended and whether it missed that tier's SLO; None if it does not
        count for an SLO.
        """
        total_s = now_s - context.arrived_s
        tier = context.tier
        for counts in self._of(tier, context):
            counts.served(context, outcome, total_s, now_s)
        if context.route is None or not context.route.order or outcome in _NOT_JUDGED:
            return None
        intended = self._names[context.route.order[0]]
        counts = self._tiers[intended]
        counts.judged += 1
        counts.served_elsewhere += outcome is _OK and tier != intended and bool(tier)
        missed = outcome is not _OK or not self._within_slo(context, intended, total_s)
        counts.missed += missed
        return intended, missed

    def had_too_little_time(self, context: RequestContext) -> bool:
        """Whether the request's own deadline allowed less time than the SLO of the tier for which it was
        intended."""
        if context.route is None or not context.route.order:
            return False
        slo = self._slos[self._names[context.route.order[0]]]
        promised_s = min(slo.total_s, slo.ttft_s + slo.itl_s * max(context.generated_tokens - 1, 0))
        return context.deadline_s - context.arrived_s < promised_s

    def _within_slo(self, context: RequestContext, tier: str, total_s: float) -> bool:
        tokens = context.generated_tokens
        if not context.stream:
            return within_slo(self._slos[tier], ttft_s=None, itl_s=None, total_s=total_s, tokens=tokens)
        ttft_s = context.first_byte_s - context.arrived_s
        itl_s = (total_s - ttft_s) / (tokens - 1) if tokens > 1 else None
        return within_slo(self._slos[tier], ttft_s=ttft_s, itl_s=itl_s, total_s=total_s, tokens=tokens)

    def _of(self, tier: str, context: RequestContext) -> list[_SubjectCounts]:
        """The counters of the tier and of the endpoint that serve a request."""
        found = [self._tiers[tier]] if tier in self._tiers else []
        load = context.decision.load if context.decision is not None else None
        if load is not None:
            name = load.endpoint.endpoint_id
            counts = self._endpoints.get(name)
            if counts is None:
                counts = self._endpoints[name] = _SubjectCounts()
            found.append(counts)
        return found

    def read(self, endpoint_table: EndpointTable, queue: AdmissionQueue) -> tuple[TrafficCounters, ...]:
        """The counters of every tier, of every endpoint in the table, and of those that went less than
        :data:`KEEP_GONE_S` ago."""
        now_s = monotonic()
        waiting = [0] * len(self._names)
        for ticket in queue.waiting():
            queued: QueuedRequest = ticket.payload
            waiting[queued.route.order[0]] += 1
        found = [
            self._tiers[pool.name].reading(pool.name, waiting[pool.rank], pool.in_flight, now_s)
            for pool in endpoint_table.pools
        ]
        self._drop_gone(endpoint_table, now_s)
        for name, counts in self._endpoints.items():
            load = endpoint_table.by_endpoint_id.get(name)
            found.append(counts.reading(name, 0, load.in_flight if load is not None else 0, now_s))
        return tuple(found)

    def _drop_gone(self, endpoint_table: EndpointTable, now_s: float) -> None:
        gone = self._endpoints.keys() - endpoint_table.by_endpoint_id.keys()
        for name in self._gone.take_expired(gone, now_s, keep_s=KEEP_GONE_S, most=MAX_GONE):
            del self._endpoints[name]
