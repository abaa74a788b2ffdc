"""What each tier did between two ticks: the input of scaling decisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controlplane.controller.controller import Controller
from controlplane.core.autoscaling.capacity import EngineObservation
from controlplane.core.autoscaling.decision import TierObservation
from controlplane.core.autoscaling.overrides import Overrides
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import SERVING, Endpoint, EndpointState
from controlplane.core.telemetry.series import missing
from controlplane.core.traffic.counters import TrafficCounters, since


class TierObserver:
    """Compares the counters with those of the previous tick."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._before: dict[str, TrafficCounters] = {}
        self._before_s: float | None = None

    def observe(
        self, specs: Iterable[TierSpec], overrides: Overrides, now_s: float, unix_s: float
    ) -> list[TierObservation]:
        """One observation per tier of ``specs``, about the time since the last call."""
        base_targets = self._controller.base_targets()
        interval_s = 0.0 if self._before_s is None else now_s - self._before_s
        counters = {spec.name: self._controller.traffic_counters(spec.name) for spec in specs}
        signal = self._controller.traffic_signal
        observations = []
        for tier, counted in counters.items():
            gained, override = self._gained(counted), overrides.of(tier)
            endpoints = self._controller.endpoints_of(tier)
            hit_ratio = self._prefix_hit_ratio(endpoints, now_s)
            arrivals, finished, missed = missing("first tick"), 0, 0
            input_tokens = output_tokens = missing("no request ended in the interval")
            if gained is not None:
                arrivals, finished, missed = signal(gained.arrived), gained.judged, gained.missed
                if gained.ok:
                    input_tokens = signal(gained.prompt_tokens / gained.ok * (1.0 - hit_ratio))
                    output_tokens = signal(gained.generated_tokens / gained.ok)
            observation = TierObservation(
                tier=tier,
                now_s=now_s,
                unix_s=unix_s,
                target=base_targets[tier],
                ready=sum(item.state in SERVING for item in endpoints),
                interval_s=interval_s,
                arrivals=arrivals,
                in_flight=signal(counted.in_flight),
                queued=signal(counted.waiting),
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                finished=finished,
                missed=missed,
                engines=tuple(self._engines(endpoints, now_s, hit_ratio)),
                override=override.replicas if override is not None else None,
            )
            observations.append(observation)
        self._before, self._before_s = counters, now_s
        return observations

    def _gained(self, counted: TrafficCounters) -> TrafficCounters | None:
        """The counters since the last call; None if there was none, or if counting began anew."""
        before = self._before.get(counted.subject)
        gained = since(counted, before) if before is not None else None
        if gained is not None and (gained.arrived < 0 or gained.served < 0):
            return None
        return gained

    def _prefix_hit_ratio(self, endpoints: Sequence[Endpoint], now_s: float) -> float:
        """Mean share of prompt tokens found in the prefix caches; 0 if no engine reports it."""
        ratios = [
            value
            for endpoint in endpoints
            if (engine := self._controller.engine_telemetry.get(endpoint.endpoint_id)) is not None
            and (value := engine.prefix_hit_ratio(now_s).fresh) is not None
        ]
        return min(1.0, sum(ratios) / len(ratios)) if ratios else 0.0

    def _engines(
        self, endpoints: Iterable[Endpoint], now_s: float, hit_ratio: float
    ) -> Iterable[EngineObservation]:
        for endpoint in endpoints:
            telemetry = self._controller.engine_telemetry.get(endpoint.endpoint_id)
            if telemetry is None or endpoint.state is not EndpointState.READY:
                continue
            load, busy = telemetry.load(now_s), telemetry.busy(now_s)
            generated, prompted = load.generation_tokens_per_s.fresh, load.prompt_tokens_per_s.fresh
            if busy is None or generated is None or prompted is None:
                continue
            yield EngineObservation(generated, prompted * (1.0 - hit_ratio), busy.batch, busy.ratio)
