from __future__ import annotations

from dataclasses import asdict

from controlplane.core.telemetry.engine import COUNTERS, GAUGES, EngineTelemetry
from controlplane.core.telemetry.samples import EngineSample
from controlplane.core.telemetry.series import Freshness, FreshnessLimits
from controlplane.engines.base import MetricNames

LIMITS = FreshnessLimits()


def engine(generation: int = 1, **values: float) -> EngineSample:
    return EngineSample(
        endpoint_id="light-0",
        generation=generation,
        unix_s=0.0,
        scrape_s=0.001,
        gauges=tuple((name, values[name]) for name in GAUGES if name in values),
        counters=tuple((name, values[name]) for name in COUNTERS if name in values),
    )


def test_every_metric_name_of_an_engine_has_a_signal() -> None:
    assert set(asdict(MetricNames())) == {*GAUGES, *COUNTERS}


def test_signals_of_an_engine() -> None:
    telemetry = EngineTelemetry(LIMITS)
    telemetry.observe(
        engine(
            running=3, waiting=1, generation_tokens_total=100, prefix_hits_total=0, prefix_queries_total=0
        ),
        0,
    )
    sample = engine(
        running=4, waiting=0, generation_tokens_total=600, prefix_hits_total=30, prefix_queries_total=40
    )
    telemetry.observe(sample, 10)
    telemetry.observe(sample, 20)
    load = telemetry.load(20)
    assert (load.running.value, load.waiting.value) == (4, 0)
    assert load.generation_tokens_per_s.value == 25
    assert telemetry.prefix_hit_ratio(20).value == 0.75
    assert load.kv_usage_ratio.freshness is Freshness.MISSING
    assert load.kv_usage_ratio.reason == "the engine does not offer it"


def test_a_new_process_inherits_nothing() -> None:
    telemetry = EngineTelemetry(LIMITS)
    telemetry.observe(engine(running=9, generation_tokens_total=0), 0)
    telemetry.observe(engine(running=9, generation_tokens_total=100), 1)
    telemetry.observe(EngineSample("light-0", 2, 0.0, 0.0, error="connection refused"), 2)
    load = telemetry.load(2)
    assert (load.running.freshness, load.running.reason) == (Freshness.MISSING, "connection refused")
    assert load.generation_tokens_per_s.freshness is Freshness.MISSING
    telemetry.observe(engine(running=5), 3)
    assert telemetry.load(3).running.freshness is Freshness.MISSING, "a late scrape of the old process"


def test_signals_become_stale_then_missing_while_scrapes_fail() -> None:
    telemetry = EngineTelemetry(LIMITS)
    telemetry.observe(engine(running=9), 0)
    failed = EngineSample("light-0", 1, 0.0, 0.0, error="no answer within 2 s")
    telemetry.observe(failed, 6)
    running = telemetry.load(6).running
    assert (running.freshness, running.value) == (Freshness.STALE, 9)
    telemetry.observe(failed, 31)
    assert telemetry.load(31).running.reason == "no answer within 2 s"
    assert telemetry.load(31).running.value is None


def test_the_prefix_hit_ratio_without_queries_is_missing() -> None:
    telemetry = EngineTelemetry(LIMITS)
    for at_s in (0, 1):
        telemetry.observe(engine(prefix_hits_total=5, prefix_queries_total=9), at_s)
    assert telemetry.prefix_hit_ratio(1).freshness is Freshness.MISSING
