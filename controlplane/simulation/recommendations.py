"""The recommendations that would have been issued during a run, computed by the production code from the
simulation's figures.

:data:`UPDATES` times per window the tiers' conditions are computed as in
:mod:`controlplane.controller.scaling.conditions`: counts and latencies over the window; queue, requests in
flight and KV cache usage at that time. There is no GPU to measure, so utilisation is the share of the window
in which the busiest engine worked, and memory is missing. Recommendations don't affect the run.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

import numpy as np

from controlplane.core.autoscaling.policy import TierScaler
from controlplane.core.domain.request import RequestShape
from controlplane.core.recommendations.cycle import Recommender
from controlplane.core.recommendations.log import IssuedRecommendation, RecommendationLog, TrackRecord
from controlplane.core.recommendations.rules import GPU_LOAD, SLOT_LOAD, TierCondition
from controlplane.core.routing.endpoint_table import TierPool
from controlplane.core.telemetry.series import Signal, known_now, missing
from controlplane.simulation.fleet import TierFleet
from controlplane.simulation.results import TierRecord
from controlplane.simulation.scenario import RecommendationSettings, TierScenario

MAX_RECOMMENDATIONS: Final = 1000
"""Maximum number of recommendations in a result; the last ones are included."""
UPDATES: Final = 5
"""Updates per window. A live controller updates every tick, which here would take a fifth of the run's
time."""

_NOTHING: Final[Mapping[str, float]] = MappingProxyType({})
_NO_END: Final = missing("no request ended in the window")
_NOT_READY: Final = missing("no replica is ready")
_NO_MEMORY: Final = missing("the simulation has no GPU memory")


class ObservedTier(Protocol):
    """The parts of a simulated tier from which its condition is computed."""

    scenario: TierScenario
    fleet: TierFleet
    record: TierRecord
    ended_total: int
    queued: int


class _CountedPoint(NamedTuple):
    """A tier's counters at one time."""

    at_s: float
    arrived: int
    ended: int
    within_slo: int
    lost: int
    responses: int
    worked_s: Mapping[str, float]
    """Busy time of each engine, by endpoint id."""


class _TierWindow:
    """The condition of one tier over the window."""

    def __init__(self, tier: ObservedTier, pool: TierPool, scaler: TierScaler, window_s: float) -> None:
        self.name = tier.scenario.policy.name
        self._tier = tier
        self._pool = pool
        self._scaler = scaler
        self._window_s = window_s
        self._figures: tuple[object, ...] = ()
        self._condition = TierCondition(self.name, 0)
        """Computed from ``_figures``."""
        self._points = deque([_CountedPoint(0.0, 0, 0, 0, 0, 0, _NOTHING)], maxlen=UPDATES + 2)

    def condition(self, now_s: float) -> TierCondition:
        """The tier's condition now."""
        tier, points = self._tier, self._points
        while len(points) > 1 and points[1].at_s <= now_s - self._window_s + 1e-6:
            points.popleft()
        base, now = points[0], self._point(now_s)
        points.append(now)
        figures = (
            now_s - base.at_s,
            now.arrived - base.arrived,
            now.ended - base.ended,
            now.within_slo - base.within_slo,
            now.lost - base.lost,
            now.responses - base.responses,
            tier.queued,
            len(tier.fleet.endpoints()),
            self._gpu_ratio(base, now) if tier.scenario.replica.gpus else self._slot_ratio(),
            self._kv_ratio(),
            self._scaler.mean_request,
        )
        # The condition of an idle tier doesn't change.
        if figures != self._figures or now.responses > base.responses:
            self._figures = figures
            self._condition = self._computed(*figures)
        return self._condition

    def _computed(
        self,
        over_s: float,
        arrived: int,
        ended: int,
        within_slo: int,
        lost: int,
        responses: int,
        queued: int,
        replicas: int,
        load_ratio: float | None,
        kv_ratio: float | None,
        mean_request: RequestShape,
    ) -> TierCondition:
        scenario, scaler, total_s = self._tier.scenario, self._scaler, self._tier.record.total_s
        gpus, rule = scenario.replica.gpus, scenario.rule
        return TierCondition(
            tier=self.name,
            replicas=replicas,
            min_replicas=rule.min_replicas,
            max_replicas=rule.max_replicas,
            gpus_per_replica=gpus,
            tensor_parallel=scenario.tensor_parallel,
            gpu_ratio=_NOT_READY if load_ratio is None else known_now(load_ratio),
            load_name=GPU_LOAD if gpus else SLOT_LOAD,
            memory_ratio=_NO_MEMORY,
            kv_ratio=_NOT_READY if kv_ratio is None else known_now(kv_ratio),
            latency_ms=_p95_ms(total_s[len(total_s) - responses :]),
            latency_limit_ms=scenario.latency_limit_ms,
            queue=known_now(queued),
            error_ratio=known_now(lost / ended) if ended else _NO_END,
            requests_per_s=known_now(arrived / over_s),
            attainment=known_now(within_slo / ended) if ended else _NO_END,
            goal=rule.slo.attainment,
            capacity=scaler.capacity,
            mean_request=mean_request,
            bounds=scaler.bounds,
        )

    def _point(self, now_s: float) -> _CountedPoint:
        tier, record = self._tier, self._tier.record
        worked_s: Mapping[str, float] = _NOTHING
        if tier.scenario.replica.gpus:
            worked_s = {
                name: replica.engine.worked_s
                for name, replica in tier.fleet.replicas.items()
                if replica.engine is not None
            }
        responses = len(record.total_s)
        return _CountedPoint(
            now_s, record.arrived, tier.ended_total, record.within_slo, record.lost, responses, worked_s
        )

    def _gpu_ratio(self, base: _CountedPoint, now: _CountedPoint) -> float | None:
        found = []
        for name, worked_s in now.worked_s.items():
            ready_s = self._tier.fleet.replicas[name].ready_s
            # If the engine started within the window, only the time since then counts.
            before_s = base.worked_s.get(name, 0.0) if ready_s <= base.at_s else 0.0
            alive_s = now.at_s - max(base.at_s, ready_s)
            if alive_s > 0:
                found.append((worked_s - before_s) / alive_s)
        return max(found, default=None)

    def _slot_ratio(self) -> float | None:
        pool = self._pool
        return pool.in_flight / pool.limit if pool.limit else None

    def _kv_ratio(self) -> float | None:
        engines = [replica.engine for replica in self._tier.fleet.replicas.values()]
        return max((engine.kv_usage_ratio for engine in engines if engine is not None), default=None)


class SimulatedRecommendations:
    """The recommendations of one run."""

    def __init__(
        self,
        settings: RecommendationSettings,
        tiers: Sequence[ObservedTier],
        pools: Sequence[TierPool],
        learned: Callable[[str], TierScaler | None],
        *,
        start_unix_s: float,
    ) -> None:
        """``tiers`` and ``pools`` are in the same order. ``learned`` returns the scaler that measured a
        tier's engines, or None if the policy has none; then their assumed speed is used. ``start_unix_s`` is
        when the run begins."""
        self.every_s = settings.window_s / UPDATES
        self._rules = settings.rules
        self._start_unix_s = start_unix_s
        self._recommender = Recommender(RecommendationLog(MAX_RECOMMENDATIONS))
        self._tiers = [
            _TierWindow(
                tier,
                pool,
                learned(tier.scenario.policy.name) or TierScaler(tier.scenario.rule),
                settings.window_s,
            )
            for tier, pool in zip(tiers, pools, strict=True)
        ]
        self._count = self._judged = self._right = 0
        self._sum = 0.0

    def update(self, now_s: float, gpus: float | None) -> None:
        """Call this every :attr:`every_s`. ``gpus`` is the number that all tiers together may use; None means
        the total is unknown."""
        conditions = {tier.name: tier.condition(now_s) for tier in self._tiers}
        unix_s = self._start_unix_s + now_s
        changes = self._recommender.update(conditions, self._rules, gpus, now_s=now_s, unix_s=unix_s)
        self._count += len(changes.issued)
        scores = [item.score for item in changes.scored if item.score is not None]
        self._judged += len(scores)
        self._right += sum(score.right for score in scores)
        self._sum += sum(score.value for score in scores)

    @property
    def issued(self) -> tuple[IssuedRecommendation, ...]:
        """The last recommendations, oldest first."""
        return self._recommender.log.issued

    @property
    def record(self) -> TrackRecord:
        """How well all recommendations of the run turned out."""
        mean = self._sum / self._judged if self._judged else None
        return TrackRecord(self._count, self._judged, self._right, mean)


def _p95_ms(responses_s: array[float]) -> Signal:
    count = len(responses_s)
    if not count:
        return _NO_END
    rank = math.ceil(0.95 * count) - 1
    values = np.array(responses_s, np.float32)
    values.partition(rank)
    return known_now(float(values[rank]) * 1000)
