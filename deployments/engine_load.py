"""The engines' own load (queue and KV cache), which a gateway replica reads to choose between endpoints.

This runs in the background; no request waits for it. If an engine can't be read, its last values stay, and
routing gives them less weight as they age.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Final, NoReturn

from controlplane.config import PlaneConfig
from controlplane.core.domain.endpoint import Endpoint
from controlplane.engines import engine_for
from controlplane.engines.metrics_scraper import EngineScraper, ScrapeTarget
from controlplane.gateway.gateway import Gateway

INTERVAL_S: Final = 2.0
SIGNALS: Final = ("kv_usage_ratio", "waiting")


async def watch_engines(gateway: Gateway, config: PlaneConfig) -> NoReturn:
    """Read the metrics of every ready endpoint every :data:`INTERVAL_S`, and pass them to the gateway."""
    names = {tier.name: _names(asdict(engine_for(tier).metric_names)) for tier in config.tiers}
    paths = {tier.name: engine_for(tier).metrics_path for tier in config.tiers}
    async with EngineScraper() as scraper:
        while True:
            targets = [
                _target(endpoint, paths[endpoint.tier], names[endpoint.tier])
                for endpoint in gateway.ready_endpoints()
                if paths.get(endpoint.tier) and names[endpoint.tier]
            ]
            for sample in await scraper.scrape_all(targets):
                if not sample.error:
                    gauges = dict(sample.gauges)
                    gateway.observe(
                        sample.endpoint_id,
                        sample.generation,
                        kv_usage_ratio=gauges.get("kv_usage_ratio"),
                        waiting=gauges.get("waiting"),
                    )
            await asyncio.sleep(INTERVAL_S)


def _names(all_names: dict[str, str]) -> dict[str, str]:
    return {signal: name for signal, name in all_names.items() if signal in SIGNALS and name}


def _target(endpoint: Endpoint, path: str, names: dict[str, str]) -> ScrapeTarget:
    return ScrapeTarget(
        endpoint.endpoint_id, endpoint.generation, endpoint.base_url + path, names, endpoint.secret
    )
