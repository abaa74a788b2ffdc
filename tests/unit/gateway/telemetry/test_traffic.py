"""What a gateway counts of the requests that went through it, for the controller."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from controlplane.config.scaling import SloConfig
from controlplane.core.traffic.counters import TrafficCounters
from controlplane.gateway.telemetry import traffic
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.waiting import until_async

FAST: dict[str, Any] = {"ttft_ms": 1, "itl_ms": 0.1, "tokens": 8}


def read(rig: Rig) -> dict[str, TrafficCounters]:
    return {item.subject: item for item in rig.gateway.info().traffic}


async def test_responses_are_counted_for_their_tier_and_endpoint() -> None:
    async with running() as rig:
        await rig.engine("b1", **FAST)
        await rig.post(CHAT, chat_body())
        streamed = await rig.stream(chat_body())
        assert streamed.done
        found = read(rig)
        tier = found["balanced"]
        assert (tier.arrived, tier.judged, tier.missed, tier.ok) == (2, 2, 0, 2)
        assert tier.generated_tokens == 18  # the end is a token, too
        assert tier.prompt_tokens > 0
        assert sum(tier.latency_counts) == 2
        assert sum(tier.ttft_counts) == 1
        assert 0 < tier.latency_max_s < tier.latency_s
        endpoint = found["b1"]
        assert (endpoint.arrived, endpoint.ok, endpoint.generated_tokens) == (0, 2, 18)


async def test_the_last_requests_of_an_endpoint_that_is_gone_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as rig:
        await rig.engine("b1", **{**FAST, "itl_ms": 20})
        await rig.post(CHAT, chat_body())
        running_request = asyncio.ensure_future(rig.post(CHAT, chat_body()))
        await until_async(lambda: rig.served_by("b1"))
        del rig.endpoints["b1"]
        rig.publish()
        assert read(rig)["b1"].ok == 1
        await running_request
        for _ in range(3):
            assert read(rig)["b1"].ok == 2
        monkeypatch.setattr(traffic, "KEEP_GONE_S", 0.0)
        assert "b1" not in read(rig)


async def test_the_endpoints_that_are_gone_and_still_reported_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traffic, "MAX_GONE", 2)
    async with running() as rig:
        for number in range(5):
            await rig.engine(f"b{number}", **FAST)
            await rig.post(CHAT, chat_body())
            del rig.endpoints[f"b{number}"]
            rig.publish()
            read(rig)
        assert set(read(rig)) == {"balanced", "b3", "b4"}


async def test_a_request_served_by_another_tier_counts_for_the_intended_one() -> None:
    tiers = {"name": "small", "concurrency_limit": 1}, {"name": "large"}
    async with running(plane(*tiers)) as rig:
        await rig.engine("s1", "small", limit=1, **{**FAST, "itl_ms": 30})
        await rig.engine("l1", "large", **FAST)
        first = asyncio.ensure_future(rig.post(CHAT, {**chat_body(), "model": "small"}))
        await until_async(lambda: rig.gateway.endpoint_table.pools[0].in_flight)
        _, headers, _ = await rig.post(CHAT, {**chat_body(), "model": "small"})
        assert headers["x-tier"] == "large"
        await first
        found = read(rig)
        assert (found["small"].arrived, found["small"].served_elsewhere, found["small"].ok) == (2, 1, 1)
        assert (found["large"].arrived, found["large"].served_elsewhere, found["large"].ok) == (0, 0, 1)
        assert found["small"].judged == 2


async def test_what_is_slow_fails_or_is_shed_misses_the_slo_and_bad_requests_do_not_count() -> None:
    """The limits are ones that no request can meet or every request meets, however busy the machine is."""
    tiers = (
        {"name": "late", "slo": SloConfig(ttft_s=1e-6, itl_s=60.0)},
        {"name": "slow", "slo": SloConfig(ttft_s=60.0, itl_s=1e-6)},
        {"name": "fine", "slo": SloConfig(ttft_s=60.0, itl_s=60.0)},
    )
    async with running(plane(*tiers, retry={"max_attempts": 1})) as rig:
        for tier in ("late", "slow", "fine"):
            await rig.engine(f"{tier}-1", tier, **FAST)
            await rig.stream({**chat_body(), "model": tier})
        found = read(rig)
        assert [(found[tier].judged, found[tier].missed) for tier in ("late", "slow", "fine")] == [
            (1, 1),
            (1, 1),
            (1, 0),
        ]
        bad = {**chat_body(), "model": "fine", "metadata": {"priority": "odd"}}
        assert (await rig.post(CHAT, bad))[0] == 400
        assert (await rig.post(CHAT, {**chat_body(), "model": "nobody"}))[0] == 404
        assert read(rig)["fine"].judged == 1
        for tier in ("late", "slow", "fine"):
            rig.kill(f"{tier}-1")
        assert (await rig.post(CHAT, {**chat_body(), "model": "fine"}))[0] >= 500
        counted = read(rig)["fine"]
        assert (counted.judged, counted.missed, counted.failed) == (2, 1, 1)


async def test_waiting_requests_are_counted_for_the_intended_tier() -> None:
    async with running(plane({"name": "small", "scaling": None}, {"name": "large"})) as rig:
        waiting = asyncio.ensure_future(rig.post(CHAT, {**chat_body(), "model": "small"}))
        await until_async(lambda: read(rig)["small"].waiting)
        assert read(rig)["large"].waiting == 0
        await rig.engine("s1", "small", **FAST)
        assert (await waiting)[0] == 200
        assert (read(rig)["small"].waiting, read(rig)["small"].ok) == (0, 1)


async def test_a_clients_own_short_deadline_is_no_fault_of_the_tier() -> None:
    """One client gives every request 0.2 s, of a tier that promises a first token in a minute."""
    tier = {"name": "slow", "slo": SloConfig(ttft_s=60.0, itl_s=60.0)}
    async with running(plane(tier, retry={"max_attempts": 1})) as rig:
        await rig.engine("slow-1", "slow", ttft_ms=60_000, itl_ms=1, tokens=4)
        body = {**chat_body(), "model": "slow"}
        status, _, _ = await rig.post(CHAT, body, x_request_timeout_seconds="0.2")
        assert status == 408
        found = read(rig)["slow"]
        assert (found.arrived, found.judged, found.missed, found.failed, found.shed) == (1, 0, 0, 0, 0)
        text = await (await rig.client.get(f"{rig.base}/metrics")).text()
        assert 'outcome="deadline"' in text


async def test_a_deadline_longer_than_the_slo_counts() -> None:
    tier = {"name": "slow", "slo": SloConfig(ttft_s=0.01, itl_s=0.001)}
    async with running(plane(tier, retry={"max_attempts": 1})) as rig:
        await rig.engine("slow-1", "slow", ttft_ms=60_000, itl_ms=1, tokens=4)
        body = {**chat_body(), "model": "slow"}
        assert (await rig.post(CHAT, body, x_request_timeout_seconds="0.3"))[0] == 408
        found = read(rig)["slow"]
        assert (found.judged, found.missed) == (1, 1)
