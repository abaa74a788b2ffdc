"""What is worth keeping of each look: one figure per series; what is not known has no point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.domain.endpoint import SERVING, Endpoint
from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.telemetry.engine import EngineTelemetry


def points(
    endpoints: Iterable[Endpoint],
    gateways: Iterable[GatewayInfo],
    engines: Mapping[str, EngineTelemetry],
    fleet: GpuInventory,
    now_s: float,
) -> dict[str, float]:
    """Series name → figure.

    ``tier/NAME/…``: ``replicas``, ``serving``, ``in_flight``, and of the engines that say it
    ``running``, ``waiting``, ``kv_usage_ratio`` (mean), ``tokens_per_s``; ``gateways/in_flight``,
    ``gateways/queued``; ``gpus/STATE`` counts, ``gpus/gpu_ratio`` (mean), ``gpus/power_w`` (sum).
    """
    found: dict[str, float] = {}
    tiers: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        tiers.setdefault(endpoint.tier, []).append(endpoint)
    in_flight: dict[str, int] = {}
    gateways = tuple(gateways)
    for gateway in gateways:
        for endpoint_id, count in gateway.in_flight_by_endpoint:
            in_flight[endpoint_id] = in_flight.get(endpoint_id, 0) + count
    if gateways:
        found["gateways/in_flight"] = sum(gateway.in_flight for gateway in gateways)
        found["gateways/queued"] = sum(gateway.queued for gateway in gateways)
    for tier, members in tiers.items():
        found[f"tier/{tier}/replicas"] = len(members)
        found[f"tier/{tier}/serving"] = sum(item.state in SERVING for item in members)
        found[f"tier/{tier}/in_flight"] = sum(in_flight.get(item.endpoint_id, 0) for item in members)
        found |= _engines(tier, members, engines, now_s)
    return found | _gpus(fleet, now_s)


def _engines(
    tier: str, members: Iterable[Endpoint], engines: Mapping[str, EngineTelemetry], now_s: float
) -> dict[str, float]:
    known = [engines[item.endpoint_id].load(now_s) for item in members if item.endpoint_id in engines]
    series = {
        "running": [signals.running.fresh for signals in known],
        "waiting": [signals.waiting.fresh for signals in known],
        "tokens_per_s": [signals.generation_tokens_per_s.fresh for signals in known],
        "kv_usage_ratio": [signals.kv_usage_ratio.fresh for signals in known],
    }
    found = {}
    for name, readings in series.items():
        values = [value for value in readings if value is not None]
        if values:
            count = len(values) if name == "kv_usage_ratio" else 1
            found[f"tier/{tier}/{name}"] = sum(values) / count
    return found


def _gpus(fleet: GpuInventory, now_s: float) -> dict[str, float]:
    found: dict[str, float] = {}
    found |= {
        f"gpus/{state}": count
        for state, count in Counter(record.health.state for record in fleet.records.values()).items()
    }
    loads = [load for node in fleet.nodes.values() for load in node.gpus.loads(now_s)]
    ratios = [ratio for ratio, _ in loads if ratio is not None]
    powers = [power for _, power in loads if power is not None]
    if ratios:
        found["gpus/gpu_ratio"] = sum(ratios) / len(ratios)
    if powers:
        found["gpus/power_w"] = sum(powers)
    return found
