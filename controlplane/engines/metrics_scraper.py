"""Scrapes engines' Prometheus metrics into engine samples.

Each kind of engine names its metrics (``MetricNames``), and only their lines are parsed. A scrape never
raises and is bounded in time and size: a sample without readings has the reason in ``error``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.telemetry.engine import COUNTERS, GAUGES
from controlplane.core.telemetry.samples import EngineSample
from controlplane.http.fetch import MAX_PAGE_BYTES, fetch

_UNREADABLE: Final = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What the parser raises for a page that is not Prometheus text."""
CONCURRENCY: Final = 32
"""Scrapes at the same time."""
MAX_VALUE: Final = 1e15
"""Larger values, negative ones, infinity and NaN are ignored as if the engine had not sent them."""
MAX_RATIO: Final = 1.01
"""The same for ratios."""
_LARGEST: Final = frozenset({"kv_usage_ratio"})
"""Gauges whose largest series counts, not the sum; there is one series per data-parallel rank."""


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """The address and the names of one engine's metrics."""

    endpoint_id: str
    generation: int
    url: str
    """URL of the metrics page."""
    names: Mapping[str, str]
    """Signal → the engine's name for it (empty: not available):
    ``dataclasses.asdict(engine.metric_names)``."""
    secret: str = field(default="", repr=False)


def scrape_targets(
    endpoints: Iterable[Endpoint], signals: Container[str] | None = None
) -> list[ScrapeTarget]:
    """Where the engines that are ready have their metrics; ``signals`` are those to read, None means all."""
    targets = []
    for endpoint in endpoints:
        names = {key: name for key, name in endpoint.metric_names if signals is None or key in signals}
        if endpoint.state is EndpointState.READY and endpoint.metrics_path and names:
            url = endpoint.base_url + endpoint.metrics_path
            targets.append(
                ScrapeTarget(endpoint.endpoint_id, endpoint.generation, url, names, endpoint.secret)
            )
    return targets


class EngineScraper:
    """Scrapes engines in the event loop in which it was entered with ``async with``."""

    def __init__(self, *, timeout_s: float = 2.0, max_bytes: int = MAX_PAGE_BYTES) -> None:
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._gate = asyncio.Semaphore(CONCURRENCY)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineScraper:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def scrape_all(self, targets: Iterable[ScrapeTarget]) -> list[EngineSample]:
        """One sample per target, in the order of the targets."""
        return list(await asyncio.gather(*(self.scrape(target) for target in targets)))

    async def scrape(self, target: ScrapeTarget) -> EngineSample:
        """The target's sample; never raises."""
        if self._session is None:
            raise RuntimeError("EngineScraper is used as 'async with EngineScraper() as scraper'")
        async with self._gate:
            began_s = time.perf_counter()
            page = await fetch(
                target.url,
                secret=target.secret,
                timeout_s=self._timeout_s,
                max_bytes=self._max_bytes,
                session=self._session,
            )
            scrape_s = time.perf_counter() - began_s
            error = f"{target.url}: {page}"
            if page.ok:
                try:
                    return parse(target, page.text, time.time(), scrape_s)
                except _UNREADABLE as problem:
                    error = f"{target.url} did not send Prometheus text: {problem}"
            return EngineSample(target.endpoint_id, target.generation, time.time(), scrape_s, error)


def parse(target: ScrapeTarget, text: str, unix_s: float, scrape_s: float) -> EngineSample:
    """Read the target's metrics from a page; raises one of several errors if it is not Prometheus text.

    Series that differ only in labels (ranks, finish reasons, models of one process) are added up, except for
    ``kv_usage_ratio``, where the largest counts. Values outside of 0 to :data:`MAX_VALUE` are ignored.
    """
    wanted = {name: signal for signal, name in target.names.items() if name}
    series: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(_only(text, tuple(wanted))):
        for sample in family.samples:
            limit = MAX_RATIO if wanted.get(sample.name) in _LARGEST else MAX_VALUE
            if 0.0 <= sample.value <= limit:
                series.setdefault(sample.name, []).append(sample.value)
    gauges, counters = [], []
    for name, signal in wanted.items():
        values = series.get(name)
        if not values:
            continue
        if signal in GAUGES:
            gauges.append((signal, max(values) if signal in _LARGEST else math.fsum(values)))
        elif signal in COUNTERS:
            counters.append((signal, math.fsum(values)))
    found_none = wanted and not gauges and not counters
    return EngineSample(
        endpoint_id=target.endpoint_id,
        generation=target.generation,
        unix_s=unix_s,
        scrape_s=scrape_s,
        error=f"{target.url} has none of the engine's metrics" if found_none else "",
        gauges=tuple(gauges),
        counters=tuple(counters),
    )


def _only(text: str, names: tuple[str, ...]) -> str:
    """The lines of the metrics ``names``. The parser takes longer for one line than this takes for a page."""
    if not names:
        return ""
    return "\n".join(line for line in text.splitlines() if line.startswith(names)) + "\n"


def metric_sum(text: str, name: str) -> float | None:
    """The sum of a metric's samples over all labels, in Prometheus' text format; None without samples. It
    ignores the values that :func:`parse` ignores."""
    values = []
    for line in text.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " "):
            try:
                value = float(line.rsplit(" ", 1)[1])
            except ValueError:
                continue
            if 0.0 <= value <= MAX_VALUE:
                values.append(value)
    return sum(values) if values else None
