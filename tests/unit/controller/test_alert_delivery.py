"""Delivery of alerts: signed, in order, repeated after failures, bounded; it never blocks the controller."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from controlplane.config.alerts import WebhookConfig
from controlplane.controller import alert_delivery
from controlplane.controller.alert_delivery import SIGNATURE, AlertDelivery, pause_s, signature
from controlplane.core.alerts.alert import Severity
from controlplane.core.alerts.views import AlertNotice, AlertTransition
from controlplane.core.json_values import StoredState
from tests.support.alerts import TIER_DOWN
from tests.support.waiting import forever, until_async

SECRET = "not for logs"


def notice(
    subject: str = "small", transition: AlertTransition = AlertTransition.FIRING, **fields: Any
) -> AlertNotice:
    return AlertNotice(transition, replace(TIER_DOWN, subject=subject, **fields))


@dataclass
class Receiver:
    """A webhook: answers with the given statuses, then 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    silent: bool = False
    """It takes a message and never answers."""
    calls: list[tuple[web.Request, bytes]] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.calls.append((request, body))
        if self.silent:
            await forever()
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            self.taken += json.loads(body)["alerts"]
        return web.Response(status=status, headers=self.headers if status != 200 else None)

    @property
    def subjects(self) -> list[str]:
        return [item["subject"] for item in self.taken]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hooks/s3cret-path", receiver.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    receiver.url = f"http://127.0.0.1:{port}/hooks/s3cret-path"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@asynccontextmanager
async def delivering(
    *webhooks: dict[str, Any], environ: dict[str, str] | None = None
) -> AsyncIterator[AlertDelivery]:
    configs = [WebhookConfig.model_validate(each) for each in webhooks]
    delivery = AlertDelivery(configs, environ or {}, "tierplane", pause_s=lambda attempt: 0.0)
    delivery.start()
    try:
        yield delivery
    finally:
        await delivery.close()


async def test_a_message_has_the_documented_format_and_a_valid_signature() -> None:
    environ = {"HOOK_SECRET": SECRET}
    async with receiving() as receiver:
        async with delivering(
            {"url": receiver.url, "secret_env": "HOOK_SECRET"}, environ=environ
        ) as delivery:
            delivery.deliver([notice()])
            await until_async(lambda: receiver.taken)
            await until_async(lambda: delivery.views[0].delivered == 1)
    request, body = receiver.calls[0]
    unix_s, _, mac = request.headers[SIGNATURE].removeprefix("t=").partition(",v1=")
    wanted = hmac.new(SECRET.encode(), f"{unix_s}.".encode() + body, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(mac, wanted)
    assert abs(int(unix_s) - time.time()) < 60
    assert request.content_type == "application/json"
    message = json.loads(body)
    assert (message["version"], message["plane"]) == (1, "tierplane")
    [item] = message["alerts"]
    assert item.pop("id").startswith("TierplaneTierDown/small/1000.000/firing/")
    assert item == {
        "event": "firing",
        "rule": "TierplaneTierDown",
        "severity": "critical",
        "kind": "tier",
        "subject": "small",
        "summary": "Tier small has no ready endpoint.",
        "detail": "small-1 is failed",
        "action": "tierplane status says why.",
        "state": "firing",
        "value": 0.0,
        "current": None,
        "threshold": 1.0,
        "since_unix_s": 1000.0,
    }


def test_a_signature_changes_with_everything_that_it_covers() -> None:
    made = signature("secret", b"{}", 100)
    assert made == signature("secret", b"{}", 100)
    assert made.startswith("t=100,v1=")
    others = {
        signature("secret", b"{ }", 100),
        signature("Secret", b"{}", 100),
        signature("secret", b"{}", 101),
    }
    assert made not in others
    assert len(others) == 3


async def test_without_a_secret_nothing_is_signed() -> None:
    async with receiving() as receiver, delivering({"url": receiver.url}) as delivery:
        delivery.deliver([notice()])
        await until_async(lambda: receiver.taken)
        assert SIGNATURE not in receiver.calls[0][0].headers


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_message_that_is_not_accepted_is_sent_again_in_order(status: int) -> None:
    async with receiving() as receiver, delivering({"url": receiver.url}) as delivery:
        receiver.statuses = [status, status]
        delivery.deliver([notice("a")])
        await until_async(lambda: receiver.calls)
        delivery.deliver([notice("b"), notice("a", AlertTransition.RESOLVED)])
        await until_async(lambda: len(receiver.taken) == 3)
        assert receiver.subjects == ["a", "b", "a"]
        assert [item["event"] for item in receiver.taken] == ["firing", "firing", "resolved"]
        await until_async(lambda: delivery.views[0].waiting == 0)
        assert (delivery.views[0].failed, delivery.views[0].problem) == (0, "")
        bodies = [body for _, body in receiver.calls[:3]]
        assert bodies[0] == bodies[1] == bodies[2], "the same message each time"


@pytest.mark.parametrize("status", [400, 404, 302])
async def test_a_message_that_can_never_be_accepted_is_given_up_at_once_and_logged(status: int) -> None:
    async with receiving() as receiver:
        receiver.statuses = [status]
        receiver.headers = {"location": receiver.url}
        with capture_logs() as logs:
            async with delivering({"url": receiver.url}) as delivery:
                delivery.deliver([notice("a")])
                await until_async(lambda: delivery.views[0].failed == 1)
                assert delivery.views[0].problem == f"it answered {status}"
                delivery.deliver([notice("b")])
                await until_async(lambda: receiver.subjects == ["b"])
                await until_async(lambda: delivery.views[0].problem == "")
        [line] = [line for line in logs if "given up" in line["event"]]
        assert line["log_level"] == "error"
        assert "TierplaneTierDown/a" in line["alerts"][0]
    assert len(receiver.calls) == 2


async def test_attempts_are_limited(free_port: Callable[[], int]) -> None:
    url = f"http://127.0.0.1:{free_port()}/x?token=s3cret"
    with capture_logs() as logs:
        async with delivering({"url": url, "max_attempts": 3}) as delivery:
            delivery.deliver([notice()])
            await until_async(lambda: delivery.views[0].failed == 1)
    assert len([line for line in logs if "wait for a webhook" in line["event"]]) == 2
    assert "can't be reached" in delivery.views[0].problem
    assert "s3cret" not in repr(logs) + repr(delivery.views)


async def test_a_receiver_that_does_not_answer_times_out() -> None:
    async with receiving() as receiver:
        receiver.silent = True
        async with delivering({"url": receiver.url, "timeout_s": 0.05, "max_attempts": 2}) as delivery:
            delivery.deliver([notice()])
            await until_async(lambda: delivery.views[0].failed == 1)
            assert delivery.views[0].problem == "no answer in 0.05 s"


async def test_a_receiver_may_ask_for_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    async with receiving() as receiver:
        receiver.statuses = [429, 429]
        receiver.headers = {"retry-after": "7"}
        async with delivering({"url": receiver.url}) as delivery:
            monkeypatch.setattr(asyncio, "sleep", sleep)
            delivery.deliver([notice()])
            await until_async(lambda: receiver.taken)
            monkeypatch.undo()
    assert [each for each in slept if each > 1] == [7.0, 7.0]


def test_pauses_grow_and_are_bounded() -> None:
    for attempt in range(1, 30):
        longest = min(60.0, 2.0 ** (attempt - 1))
        assert all(longest / 2 <= pause_s(attempt) <= longest for _ in range(20))


async def test_a_full_queue_drops_the_oldest_and_logs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_delivery, "QUEUE_LIMIT", 5)
    with capture_logs() as logs:
        async with receiving() as receiver:
            async with delivering({"url": receiver.url}) as delivery:
                delivery.deliver([notice(f"s{i}") for i in range(8)])
                assert delivery.views[0].dropped == 3
                await until_async(lambda: len(receiver.taken) == 5)
    assert receiver.subjects == ["s3", "s4", "s5", "s6", "s7"]
    [line] = [line for line in logs if "too many wait" in line["event"]]
    assert (line["log_level"], line["dropped"]) == ("error", 1)


async def test_many_alerts_are_sent_in_few_messages() -> None:
    async with receiving() as receiver, delivering({"url": receiver.url}) as delivery:
        delivery.deliver([notice(f"s{i}") for i in range(250)])
        await until_async(lambda: len(receiver.taken) == 250)
        assert receiver.subjects == [f"s{i}" for i in range(250)]
        assert len(receiver.calls) == 3


async def test_delivering_never_waits() -> None:
    async with receiving() as receiver:
        receiver.silent = True
        async with delivering({"url": receiver.url}) as delivery:
            began_s = time.monotonic()
            for _ in range(20):
                delivery.deliver([notice()])
            assert time.monotonic() - began_s < 1.0
            await until_async(lambda: receiver.calls)


async def test_each_webhook_has_its_own_limit_and_pace() -> None:
    async with receiving() as slow, receiving() as quick:
        slow.silent = True
        async with delivering(
            {"url": slow.url, "min_severity": "info"}, {"url": quick.url, "min_severity": "critical"}
        ) as delivery:
            delivery.deliver([notice("a", severity=Severity.WARNING), notice("b")])
            await until_async(lambda: [view.waiting for view in delivery.views] == [2, 0])
            assert quick.subjects == ["b"]


async def test_a_missing_secret_is_logged_and_nothing_is_sent_unsigned() -> None:
    async with receiving() as receiver:
        with capture_logs() as logs:
            async with delivering({"url": receiver.url, "secret_env": "HOOK_SECRET"}) as delivery:
                delivery.deliver([notice()])
                assert delivery.views[0].waiting == 1
                assert "HOOK_SECRET is not set" in delivery.views[0].problem
                waiting = delivery.checkpoint()
        assert receiver.calls == []
        [line] = [line for line in logs if line["log_level"] == "critical"]
        assert line["variable"] == "HOOK_SECRET"
        environ = {"HOOK_SECRET": SECRET}
        webhook = {"url": receiver.url, "secret_env": "HOOK_SECRET"}
        with capture_logs() as logs:
            async with delivering(webhook, environ=environ) as delivery:
                delivery.restore(StoredState(json.loads(json.dumps(waiting))))
                await until_async(lambda: receiver.subjects == ["small"])
        assert SECRET not in repr(logs)
        assert "s3cret-path" not in repr(logs) + repr(waiting)


async def test_queued_alerts_survive_a_restart_in_order() -> None:
    async with receiving() as receiver:
        receiver.silent = True
        async with delivering({"url": receiver.url}) as delivery:
            delivery.deliver([notice("a")])
            await until_async(lambda: receiver.calls)
            delivery.deliver([notice("b")])
            waiting = delivery.checkpoint()
        assert delivery.checkpoint() == waiting, "closing loses nothing"
        receiver.silent = False
        async with delivering({"url": receiver.url}) as again:
            again.restore(StoredState(json.loads(json.dumps(waiting))))
            again.deliver([notice("c")])
            await until_async(lambda: receiver.subjects[-3:] == ["a", "b", "c"])
            await until_async(lambda: again.checkpoint() == {})


async def test_queued_alerts_of_a_webhook_that_stays_survive_a_change_of_webhooks() -> None:
    async with receiving() as stays, receiving() as goes, receiving() as comes:
        stays.silent = goes.silent = True
        async with delivering({"url": stays.url}, {"url": goes.url}) as delivery:
            delivery.deliver([notice("a")])
            await until_async(lambda: stays.calls and goes.calls)
            stays.silent = False
            changed = [{"url": comes.url}, {"url": stays.url, "min_severity": "info"}]
            delivery.configure([WebhookConfig.model_validate(each) for each in changed])
            delivery.deliver([notice("b", severity=Severity.INFO), notice("c")])
            await until_async(lambda: stays.subjects == ["a", "b", "c"])
            await until_async(lambda: comes.subjects == ["c"])
            assert goes.subjects == []


def test_alerts_are_logged_at_a_level_by_severity() -> None:
    delivery = AlertDelivery([], {}, "tierplane")
    with capture_logs() as logs:
        delivery.deliver(
            [
                notice(),
                notice(severity=Severity.WARNING),
                notice(severity=Severity.INFO),
                notice(transition=AlertTransition.REPEATED),
                notice(transition=AlertTransition.RESOLVED),
            ]
        )
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("alert", "error"),
        ("alert", "warning"),
        ("alert", "info"),
        ("alert still fires", "error"),
        ("alert over", "info"),
    ]
    assert logs[0]["detail"] == "small-1 is failed"
