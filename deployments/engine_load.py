"""The engines' own load (queue and KV cache), which a gateway replica reads to choose between endpoints.

This runs in the background; no request waits for it. If an engine can't be read, its last values remain
until routing counts them as stale.
"""

from __future__ import annotations

import asyncio
from typing import Final, NoReturn

from controlplane.engines.metrics_scraper import EngineScraper, scrape_targets
from controlplane.gateway.gateway import Gateway

INTERVAL_S: Final = 2.0
SIGNALS: Final = ("kv_usage_ratio", "waiting")


async def watch_engines(gateway: Gateway) -> NoReturn:
    """Read the metrics of every ready endpoint every :data:`INTERVAL_S`, and pass them to the gateway."""
    async with EngineScraper() as scraper:
        while True:
            for sample in await scraper.scrape_all(scrape_targets(gateway.ready_endpoints(), SIGNALS)):
                if not sample.error:
                    gauges = dict(sample.gauges)
                    gateway.observe(
                        sample.endpoint_id,
                        sample.generation,
                        kv_usage_ratio=gauges.get("kv_usage_ratio"),
                        waiting=gauges.get("waiting"),
                    )
            await asyncio.sleep(INTERVAL_S)
