"""The state of every tier over the last minutes, as input of the recommendation rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from controlplane.controller.controller import Controller
from controlplane.core.autoscaling.round import ScalingRound
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import ENDED, SERVING, Endpoint
from controlplane.core.recommendations.rules import GPU_LOAD, SLOT_LOAD, TierCondition
from controlplane.core.telemetry.series import Freshness, Signal, missing
from controlplane.core.traffic.counters import TierFigures

OBSERVED_WINDOWS: Final = 2.0
"""A tier counts as idle only after it was observed with its replicas for this many windows."""


def conditions(
    controller: Controller,
    specs: Iterable[TierSpec],
    scalers: ScalingRound,
    window_s: float,
    now_s: float,
    observed_since_s: float,
) -> dict[str, TierCondition]:
    """By tier, over ``window_s``. ``scalers`` has what was learned about each tier's engines;
    ``observed_since_s`` is when the controller began to observe."""
    figures = controller.traffic_figures(window_s)
    found = {}
    for spec in specs:
        condition = _condition(controller, spec, scalers, figures[spec.name], now_s)
        ages_s = [
            controller.unix_s() - item.since_unix_s
            for item in controller.endpoints_of(spec.name)
            if item.state not in ENDED
        ]
        observed_s = min([now_s - observed_since_s, *ages_s])
        found[spec.name] = replace(
            condition, observed_s=observed_s, min_observed_s=OBSERVED_WINDOWS * window_s
        )
    return found


def _condition(
    controller: Controller, spec: TierSpec, scalers: ScalingRound, figures: TierFigures, now_s: float
) -> TierCondition:
    plan, scaler, latency = spec.plan, scalers.scaler(spec.name), figures.latency_p95_s
    endpoints = controller.endpoints_of(spec.name)
    load, memory, load_name = _highest_load(controller, endpoints, figures, spec)
    return TierCondition(
        tier=spec.name,
        replicas=sum(item.state not in ENDED for item in endpoints),
        min_replicas=plan.rule.min_replicas,
        max_replicas=plan.rule.max_replicas,
        gpus_per_replica=plan.rule.gpus_per_replica,
        tensor_parallel=plan.tensor_parallel,
        gpu_ratio=load,
        load_name=load_name,
        memory_ratio=memory,
        kv_ratio=_highest_kv_ratio(controller, endpoints, now_s),
        latency_ms=replace(latency, value=None if latency.value is None else latency.value * 1000),
        latency_limit_ms=plan.latency_limit_ms,
        queue=figures.waiting,
        error_ratio=figures.failed_ratio,
        requests_per_s=figures.arrivals_per_s,
        attainment=figures.attainment,
        goal=plan.rule.slo.attainment,
        capacity=scaler.capacity,
        mean_request=scaler.mean_request,
        bounds=scaler.bounds,
    )


def _highest_load(
    controller: Controller, endpoints: Sequence[Endpoint], figures: TierFigures, spec: TierSpec
) -> tuple[Signal, Signal, str]:
    """The highest utilisation and memory use among the tier's GPUs, in [0, 1], and what the first one
    measures. For a tier without GPUs, the share of its slots in use, and MISSING."""
    uuids = {uuid for endpoint in endpoints for uuid in endpoint.gpu_uuids}
    signals = [found for uuid in uuids if (found := controller.gpu_signals(uuid)) is not None]
    if signals:
        return (
            _highest([item.gpu_ratio for item in signals]),
            _highest([item.memory_used_ratio for item in signals]),
            GPU_LOAD,
        )
    slots = spec.concurrency_limit * sum(item.state in SERVING for item in endpoints)
    in_flight = figures.in_flight
    if uuids or not slots or in_flight.value is None:
        unknown = missing("its GPUs are not measured")
        return unknown, unknown, GPU_LOAD
    return replace(in_flight, value=in_flight.value / slots), missing("it has no GPU"), SLOT_LOAD


def _highest_kv_ratio(controller: Controller, endpoints: Iterable[Endpoint], now_s: float) -> Signal:
    return _highest(
        [
            engine.load(now_s).kv_usage_ratio
            for item in endpoints
            if (engine := controller.engine_telemetry.get(item.endpoint_id)) is not None
        ]
    )


def _highest(signals: Iterable[Signal]) -> Signal:
    """The highest of the fresh ones; MISSING if there is none."""
    fresh = [item for item in signals if item.freshness is Freshness.FRESH and item.value is not None]
    return max(fresh, key=lambda item: item.value or 0.0) if fresh else missing("no fresh reading")
