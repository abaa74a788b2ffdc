"""The last minutes of every tier, for advice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from controlplane.controller.controller import Controller
from controlplane.core.autoscaling.round import ScalingRound
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint
from controlplane.core.recommendations.rules import GPU_LOAD, SLOT_LOAD, TierCondition
from controlplane.core.telemetry.series import Freshness, Signal, missing
from controlplane.core.traffic.counters import TierFigures


def conditions(
    controller: Controller, specs: Iterable[TierSpec], scalers: ScalingRound, window_s: float, now_s: float
) -> dict[str, TierCondition]:
    """By tier, over ``window_s``. ``scalers`` has what was learned of each tier's engines."""
    figures = controller.demand.figures(now_s, controller.heartbeat_s, window_s)
    return {spec.name: _condition(controller, spec, scalers, figures[spec.name], now_s) for spec in specs}


def _condition(
    controller: Controller, spec: TierSpec, scalers: ScalingRound, seen: TierFigures, now_s: float
) -> TierCondition:
    plan, scaler, latency = spec.plan, scalers.scaler(spec.name), seen.latency_p95_s
    mine = [item for item in controller.registry.endpoints.values() if item.tier == spec.name]
    gpu, memory, name = _busiest(controller, mine, seen, spec, now_s)
    return TierCondition(
        tier=spec.name,
        replicas=sum(item.state not in ENDED for item in mine),
        min_replicas=plan.rule.settings.min_replicas,
        max_replicas=plan.rule.settings.max_replicas,
        gpus_per_replica=plan.rule.gpus_per_replica,
        tensor_parallel=plan.tensor_parallel,
        gpu_ratio=gpu,
        load_name=name,
        memory_ratio=memory,
        kv_ratio=_fullest(controller, mine, now_s),
        latency_ms=replace(latency, value=None if latency.value is None else latency.value * 1000),
        latency_limit_ms=plan.latency_limit_ms,
        queue=seen.waiting,
        error_ratio=seen.failed_ratio,
        requests_per_s=seen.arrivals_per_s,
        attainment=seen.attainment,
        goal=plan.rule.settings.slo.attainment,
        capacity=scaler.capacity,
        work=scaler.work,
        bounds=scaler.bounds,
    )


def _busiest(
    controller: Controller, endpoints: Sequence[Endpoint], seen: TierFigures, spec: TierSpec, now_s: float
) -> tuple[Signal, Signal, str]:
    """Utilisation and memory of the tier's busiest and fullest GPU; without GPUs, the used share of its slots
    and nothing."""
    fleet = controller.fleet
    uuids = {uuid for endpoint in endpoints for uuid in endpoint.gpu_uuids}
    signals = [fleet.signals(uuid, now_s) for uuid in uuids if uuid in fleet.records]
    if signals:
        return (
            _highest([item.gpu_ratio for item in signals]),
            _highest([item.memory_used_ratio for item in signals]),
            GPU_LOAD,
        )
    slots = spec.concurrency_limit * sum(item.state in SERVING for item in endpoints)
    busy = seen.in_flight
    if uuids or not slots or busy.value is None:
        nothing = missing("its GPUs are not measured")
        return nothing, nothing, GPU_LOAD
    return replace(busy, value=busy.value / slots), missing("it has no GPU"), SLOT_LOAD


def _fullest(controller: Controller, endpoints: Iterable[Endpoint], now_s: float) -> Signal:
    engines = controller.engines
    return _highest(
        [
            engines[item.endpoint_id].load(now_s).kv_usage_ratio
            for item in endpoints
            if item.endpoint_id in engines
        ]
    )


def _highest(signals: Iterable[Signal]) -> Signal:
    """The highest of the fresh ones; MISSING if there is none."""
    fresh = [item for item in signals if item.freshness is Freshness.FRESH and item.value is not None]
    return max(fresh, key=lambda item: item.value or 0.0) if fresh else missing("nothing fresh is known")
