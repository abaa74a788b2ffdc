"""Scrapes of a real HTTP server on the loopback address, with pages as prometheus_client writes them."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from controlplane.engines.base import MetricNames
from controlplane.engines.metrics_scraper import EngineScraper, ScrapeTarget, metric_sum, parse
from tests.support.waiting import forever

NAMES = asdict(
    MetricNames(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_usage_ratio="vllm:kv_cache_usage_perc",
        generation_tokens_total="vllm:generation_tokens_total",
        success_total="vllm:request_success_total",
    )
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def page() -> bytes:
    registry = CollectorRegistry()
    labels = ["engine", "model_name"]
    running = Gauge("vllm:num_requests_running", "…", labels, registry=registry)
    usage = Gauge("vllm:kv_cache_usage_perc", "…", labels, registry=registry)
    tokens = Counter("vllm:generation_tokens", "…", labels, registry=registry)
    success = Counter("vllm:request_success", "…", [*labels, "finished_reason"], registry=registry)
    ttft = Histogram("vllm:time_to_first_token_seconds", "…", labels, buckets=(0.1, 1.0), registry=registry)
    other = Histogram("vllm:time_to_first_token_seconds_old", "…", registry=registry)
    for rank, (requests, used, made) in enumerate([(3, 0.25, 100), (4, 0.75, 200)]):
        who = (str(rank), 'a "model"\nwith odd \\ letters')
        running.labels(*who).set(requests)
        usage.labels(*who).set(used)
        tokens.labels(*who).inc(made)
        success.labels(*who, "stop").inc(10)
        success.labels(*who, "length").inc(1)
        for value in (0.05, 0.5, 5.0):
            ttft.labels(*who).observe(value)
    other.observe(1)
    return generate_latest(registry)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[str]]]:
    runners: list[web.AppRunner] = []

    async def begin(handler: Handler) -> str:
        app = web.Application()
        app.router.add_get("/metrics", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"

    yield begin
    for runner in runners:
        await runner.cleanup()


def target(url: str, **settings: Any) -> ScrapeTarget:
    return ScrapeTarget(endpoint_id="light-0", generation=2, url=url, names=NAMES, **settings)


def responds(body: bytes, **settings: Any) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, **settings)

    return handler


async def test_a_page_of_two_ranks(serve: Callable[[Handler], Awaitable[str]]) -> None:
    seen: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(body=page())

    url = await serve(handler)
    async with EngineScraper() as scraper:
        sample = await scraper.scrape(target(url, secret="hush"))
    assert (sample.error, sample.endpoint_id, sample.generation) == ("", "light-0", 2)
    assert dict(sample.gauges) == {"running": 7, "kv_usage_ratio": 0.75}
    assert dict(sample.counters) == {"generation_tokens_total": 300, "success_total": 22}
    assert seen == ["Bearer hush"]
    assert "hush" not in repr(target(url, secret="hush"))


async def silent(request: web.Request) -> web.StreamResponse:
    await forever()


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"# never ends\n")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        pytest.param(responds(b"", status=503), "returned status 503", id="status"),
        pytest.param(
            responds(b"", status=302, headers={"Location": "http://other.example/"}),
            "returned status 302",
            id="redirect",
        ),
        pytest.param(silent, "no response within 0.3 s", id="silent"),
        pytest.param(dripping, "no response within 0.3 s", id="endless"),
        pytest.param(responds(b"x" * 20_000), "sent more than 10000 bytes", id="large"),
        pytest.param(
            responds(gzip.compress(b"x" * 10**7), headers={"Content-Encoding": "gzip"}),
            "sent more than 10000 bytes",
            id="bomb",
        ),
        pytest.param(responds(b"\xff\xfe"), "none of the engine's metrics", id="bytes"),
        pytest.param(
            responds(b"vllm:num_requests_running many\n"), "did not send Prometheus text", id="no number"
        ),
        pytest.param(responds(b"<html>hello</html>"), "none of the engine's metrics", id="html"),
        pytest.param(responds(b""), "none of the engine's metrics", id="empty"),
    ],
)
async def test_what_can_go_wrong(
    serve: Callable[[Handler], Awaitable[str]], handler: Handler, error: str
) -> None:
    url = await serve(handler)
    async with EngineScraper(timeout_s=0.3, max_bytes=10_000) as scraper:
        sample = await scraper.scrape(target(url))
    assert error in sample.error
    assert (sample.gauges, sample.counters) == ((), ())


async def test_nobody_listens() -> None:
    async with EngineScraper() as scraper:
        samples = await scraper.scrape_all([target("http://127.0.0.1:9/metrics"), target("no address")])
    assert all(sample.error for sample in samples)


async def test_values_that_are_no_number_are_missing(serve: Callable[[Handler], Awaitable[str]]) -> None:
    url = await serve(responds(b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 0\n"))
    async with EngineScraper() as scraper:
        sample = await scraper.scrape(target(url))
    assert dict(sample.gauges) == {"waiting": 0}


async def test_one_slow_engine_delays_no_other(serve: Callable[[Handler], Awaitable[str]]) -> None:
    good, bad = await serve(responds(page())), await serve(silent)
    async with EngineScraper(timeout_s=0.5) as scraper:
        samples = await scraper.scrape_all([target(bad), *[target(good)] * 8])
    assert [bool(sample.error) for sample in samples] == [True] + [False] * 8
    assert max(sample.scrape_s for sample in samples[1:]) < 0.5


async def test_outside_its_context_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await EngineScraper().scrape(target("http://127.0.0.1:9/metrics"))


def test_metrics_are_summed_over_their_labels_and_not_mixed_up() -> None:
    text = '# TYPE a gauge\na{x="1"} 2\na{x="2"} 3.5\na_total 9\nb 1\n'
    assert metric_sum(text, "a") == 5.5
    assert metric_sum(text, "a_total") == 9
    assert metric_sum(text, "c") is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1", "1e16", "1e308", "9" * 400])
def test_values_that_can_not_be_right_are_ignored(value: str) -> None:
    target = ScrapeTarget("small-1", 1, "http://x/metrics", NAMES)
    text = (
        f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc {value}\n"
        f'vllm:generation_tokens_total{{a="1"}} {value}\nvllm:generation_tokens_total{{a="2"}} 7\n'
    )
    sample = parse(target, text, 0.0, 0.0)
    assert sample.gauges == (("waiting", 2.0),)
    assert sample.counters == (("generation_tokens_total", 7.0),)
    assert metric_sum(text, "vllm:num_requests_running") is None
    assert metric_sum(text, "vllm:generation_tokens_total") == 7.0


async def test_a_page_that_can_not_be_parsed_is_an_error_of_its_sample(
    serve: Callable[[Handler], Awaitable[str]],
) -> None:
    texts = [
        "vllm:num_requests_running",
        "vllm:num_requests_running{",
        'vllm:num_requests_running{a="',
        "vllm:num_requests_running{a} 1",
        "vllm:num_requests_running many",
        "vllm:num_requests_running{} {} {}",
        'vllm:num_requests_running{a="1"',
        "vllm:num_requests_running\x00 1",
    ]
    left = list(texts)

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text=left.pop())

    target = ScrapeTarget("small-1", 1, await serve(handler), NAMES)
    async with EngineScraper() as scraper:
        for _ in texts:
            sample = await scraper.scrape(target)
            assert sample.error and not sample.gauges
    assert metric_sum("x{} many\nx", "x") is None
