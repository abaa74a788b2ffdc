"""The gateway's part of the log of requests."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from controlplane.core.access.principal import ANONYMOUS, Principal
from controlplane.core.domain.request import RequestOutcome
from controlplane.core.traffic.request_log import OTHERS, LoggedRequest
from controlplane.gateway.telemetry.request_log import (
    MAX_BATCH_KEYS,
    MAX_BATCH_SESSIONS,
    MAX_REQUESTS,
    MAX_SUMS,
    RequestLog,
)
from tests.support.gateway import CHAT, Rig, chat_body, plane, running
from tests.support.waiting import until_async

TIERS = ("small", "large")
OK, FAILED = RequestOutcome.OK, RequestOutcome.FAILED


def context(
    number: int,
    tier: str = "small",
    session: str = "",
    gpu_s: float = 0.5,
    principal: Principal = ANONYMOUS,
) -> Any:
    return SimpleNamespace(
        request_id=f"r{number}",
        session=session,
        route=SimpleNamespace(order=(TIERS.index(tier),)),
        decision=None,
        tier=tier,
        request=SimpleNamespace(model="auto"),
        api="chat",
        stream=False,
        prompt_tokens=10,
        generated_tokens=2,
        queued_s=0.0,
        first_byte_s=0.0,
        arrived_s=0.0,
        attempts=1,
        resumed=0,
        gpu_s=gpu_s,
        next_gpu_s=2 * gpu_s,
        principal=principal,
    )


def times(requests: tuple[LoggedRequest, ...], tier: str, outcome: str = "ok") -> list[float]:
    return [each.total_s for each in requests if (each.tier, each.outcome) == (tier, outcome)]


def test_little_traffic_is_logged_whole() -> None:
    log = RequestLog(TIERS)
    for number in range(10):
        log.add(context(number), OK, "200", 1.0 + number)
    batch = log.batch()
    assert batch.ended == 10
    assert sorted(each.request_id for each in batch.requests) == [f"r{number}" for number in range(10)]


def test_of_much_traffic_the_slowest_and_the_failed_of_each_tier_and_a_sample_are_logged() -> None:
    log = RequestLog(TIERS)
    for number in range(5000):
        log.add(context(number), OK, "200", float(number * 7919 % 5000))
        log.add(context(number, "large"), OK, "200", 10_000.0 + number)
        if number % 10 == 0:
            log.add(context(number), FAILED, "engine_failed", 1.0)
    batch = log.batch()
    assert batch.ended == 10_500
    assert len(batch.requests) <= MAX_REQUESTS
    small = times(batch.requests, "small")
    assert sorted(small)[-20:] == [float(n) for n in range(4980, 5000)]
    assert min(small) < 2500  # from the sample
    assert len(times(batch.requests, "small", "failed")) >= 20
    assert max(times(batch.requests, "large")) == 14_999.0


def test_a_batch_stays_until_it_is_delivered_and_nothing_is_lost_meanwhile() -> None:
    log = RequestLog(TIERS)
    log.add(context(1), OK, "200", 1.0)
    first = log.batch()
    log.add(context(2), OK, "200", 1.0)
    assert log.batch() is first
    log.delivered(first.number + 1)
    assert log.batch() is first
    log.delivered(first.number)
    second = log.batch()
    assert (second.number, [each.request_id for each in second.requests]) == (first.number + 1, ["r2"])


def test_sessions_are_bounded_and_the_sums_are_whole() -> None:
    log = RequestLog(TIERS)
    for number in range(MAX_SUMS + 500):
        log.add(context(number, session=f"s{number}", gpu_s=float(number % 1000)), OK, "200", 1.0)
    log.add(context(0, session="x" * 500, gpu_s=0.0), FAILED, "engine_failed", 1.0)
    usage = log.batch().usage
    assert len(usage) == MAX_BATCH_SESSIONS + 2
    assert [each.session for each in usage[MAX_BATCH_SESSIONS:]] == [OTHERS, OTHERS]
    assert sum(each.requests for each in usage) == MAX_SUMS + 501
    assert sum(each.failed for each in usage) == 1
    assert usage[0].gpu_s == 999.0


def test_keys_are_bounded_and_their_sums_are_whole() -> None:
    log = RequestLog(TIERS)
    for number in range(MAX_SUMS + 10):
        sender = Principal(f"id{number}", f"key {number}", team=f"team {number % 3}")
        log.add(context(number, principal=sender), OK, "200", 1.0)
    usage = log.batch().usage
    assert len(usage) == MAX_BATCH_KEYS + 1
    assert sum(each.requests for each in usage) == MAX_SUMS + 10
    assert sum(each.next_tier_gpu_s for each in usage) == MAX_SUMS + 10
    assert (usage[0].key, usage[0].key_name, usage[0].team) == ("id0", "key 0", "team 0")
    assert {each.key for each in usage if each.requests > 1} == {OTHERS}
    assert log.batch().requests[0].key == "id0"


def test_a_long_session_is_logged_as_its_digest() -> None:
    log = RequestLog(TIERS)
    log.add(context(0, session="x" * 500), OK, "200", 1.0)
    batch = log.batch()
    assert batch.usage[0].session == batch.requests[0].session
    assert batch.usage[0].session.startswith("sha256:")
    assert len(batch.usage[0].session) < 128


async def logged(rig: Rig, count: int) -> tuple[LoggedRequest, ...]:
    await until_async(lambda: rig.gateway.request_log._ended == count)
    info = rig.gateway.info()
    assert info.ended is not None
    return info.ended.requests


async def test_a_request_is_logged_with_what_it_took_and_without_content() -> None:
    async with running() as rig:
        await rig.engine("e1")
        await rig.post(
            CHAT, chat_body("secret words", model="balanced"), x_session_id="s1", x_request_id="r1"
        )
        await rig.stream(chat_body("secret words"), x_request_id="r2")
        whole, streamed = sorted(await logged(rig, 2), key=lambda each: each.request_id)
    assert (whole.request_id, whole.session, whole.tier, whole.asked) == ("r1", "s1", "balanced", "balanced")
    assert (whole.model, whole.endpoint, whole.api, whole.outcome) == ("balanced", "e1", "chat", "ok")
    assert whole.prompt_tokens > 0
    assert whole.generated_tokens > 0
    assert (whole.stream, whole.ttft_s) == (False, None)
    assert whole.gpu_s > 0
    assert streamed.ttft_s is not None
    assert 0 < streamed.ttft_s <= streamed.total_s
    assert "secret" not in json.dumps([asdict(whole), asdict(streamed)])


async def test_a_request_that_waited_and_was_refused_says_how_long_and_why() -> None:
    async with running(plane(queue={"timeout_s": 0.2})) as rig:
        await rig.engine("e1", limit=1, itl_ms=200.0)
        async with rig.client.post(rig.base + CHAT, json=chat_body(stream=True)) as response:
            await response.content.readany()
            status, _, _ = await rig.post(CHAT, chat_body(), x_request_id="late")
            assert status == 408
            (late,) = await logged(rig, 1)
    assert (late.request_id, late.outcome, late.reason) == ("late", "shed", "deadline_exceeded")
    assert late.queued_s > 0.1
    assert late.attempts == 0
