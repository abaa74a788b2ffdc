"""What a tier is seen to do between two looks, for the decision how many replicas it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controlplane.controller.controller import Controller
from controlplane.core.autoscaling.overrides import Overrides
from controlplane.core.autoscaling.policy import EngineObservation, TierObservation
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import SERVING, Endpoint, EndpointState
from controlplane.core.telemetry.series import Signal, missing, signal_of
from controlplane.core.traffic.counters import TrafficCounters, since


class TierObserver:
    """Remembers the look before."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._before: dict[str, TrafficCounters] = {}
        self._before_s: float | None = None

    def look(
        self, specs: Iterable[TierSpec], overrides: Overrides, now_s: float, unix_s: float
    ) -> list[TierObservation]:
        """All tiers that have replicas here, since the last look."""
        controller = self._controller
        base_targets = controller.base_targets()
        interval_s = 0.0 if self._before_s is None else now_s - self._before_s
        readings = {spec.name: controller.demand.ledger.reading(spec.name) for spec in specs}
        found = []
        for tier, reading in readings.items():
            override = overrides.of(tier)
            found.append(
                self._of_tier(
                    *(tier, reading, now_s, unix_s, interval_s),
                    target=base_targets[tier],
                    override=override.replicas if override is not None else None,
                )
            )
        self._before, self._before_s = readings, now_s
        return found

    def _of_tier(
        self,
        tier: str,
        reading: TrafficCounters,
        now_s: float,
        unix_s: float,
        interval_s: float,
        *,
        target: int,
        override: int | None,
    ) -> TierObservation:
        controller = self._controller
        gained = self._gained(reading)
        reported_s = controller.demand.ledger.oldest_report_s()
        limits = controller.demand.limits(controller.heartbeat_s)

        def now(value: float) -> Signal:
            return signal_of(
                value, reported_s, now_s, limits, "" if reported_s is not None else "no gateway has reported"
            )

        nothing = missing("no request ended in the interval")
        ok = gained.ok if gained is not None else 0
        mine = [item for item in controller.registry.endpoints.values() if item.tier == tier]
        hit = self._prefix_hit_ratio(mine, now_s)
        return TierObservation(
            tier=tier,
            now_s=now_s,
            unix_s=unix_s,
            target=target,
            ready=sum(item.state in SERVING for item in mine),
            interval_s=interval_s,
            arrivals=missing("first look") if gained is None else now(gained.arrived),
            in_flight=now(reading.in_flight),
            queued=now(reading.waiting),
            input_tokens=now(gained.prompt_tokens / ok * (1.0 - hit)) if gained and ok else nothing,
            output_tokens=now(gained.generated_tokens / ok) if gained and ok else nothing,
            finished=gained.judged if gained is not None else 0,
            missed=gained.missed if gained is not None else 0,
            engines=tuple(self._engines(mine, now_s, hit)),
            override=override,
        )

    def _gained(self, reading: TrafficCounters) -> TrafficCounters | None:
        """Since the last look; None: there was none, or the counting began anew."""
        before = self._before.get(reading.subject)
        gained = since(reading, before) if before is not None else None
        if gained is not None and (gained.arrived < 0 or gained.served < 0):
            return None
        return gained

    def _prefix_hit_ratio(self, endpoints: Sequence[Endpoint], now_s: float) -> float:
        """Share of prompt tokens that prefix caches had; 0 where engines don't say."""
        engines = self._controller.engines
        ratios = [
            value
            for endpoint in endpoints
            if (engine := engines.get(endpoint.endpoint_id)) is not None
            and (value := engine.prefix_hit_ratio(now_s).fresh) is not None
        ]
        return min(1.0, sum(ratios) / len(ratios)) if ratios else 0.0

    def _engines(
        self, endpoints: Iterable[Endpoint], now_s: float, hit: float
    ) -> Iterable[EngineObservation]:
        for endpoint in endpoints:
            telemetry = self._controller.engines.get(endpoint.endpoint_id)
            if telemetry is None or endpoint.state is not EndpointState.READY:
                continue
            load, busy = telemetry.load(now_s), telemetry.busy(now_s)
            generated, prompted = load.generation_tokens_per_s.fresh, load.prompt_tokens_per_s.fresh
            if busy is None or generated is None or prompted is None:
                continue
            yield EngineObservation(generated, prompted * (1.0 - hit), busy.batch, busy.ratio)
