"""Sends alert notifications to the log and to webhooks (the format of a message is in
``controlplane/core/alerts/alerts.md``).

Nothing here delays the control loop: :meth:`AlertDelivery.deliver` only puts notices into bounded queues, and
each webhook has a task that posts the queued alerts in order. A message that is not accepted (no response,
429, 5xx) is tried again after ever longer pauses; alerts that can't be delivered are logged. Queued alerts
survive a restart of the controller, so that each arrives at least once or is logged as given up.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import structlog

from controlplane.config.alerts import WebhookConfig
from controlplane.core.alerts.alert import Severity
from controlplane.core.alerts.views import AlertNotice, AlertTransition, WebhookView
from controlplane.core.json_values import StoredState

log = structlog.stdlib.get_logger(__name__)

VERSION: Final = 1
"""Version of the message format."""
QUEUE_LIMIT: Final = 1000
"""The most alerts that may wait for one webhook; beyond that the oldest is dropped."""
BATCH: Final = 100
"""The most alerts in one message."""
MAX_PAUSE_S: Final = 60.0
SIGNATURE: Final = "X-Tierplane-Signature"
_KEY: Final = "webhook/"
"""Prefix of the keys in a checkpoint."""

Item = dict[str, Any]
"""An alert in a message."""


def signature(secret: str, body: bytes, unix_s: int) -> str:
    """The value of the header :data:`SIGNATURE`: HMAC-SHA256 of time, full stop, body."""
    mac = hmac.new(secret.encode(), f"{unix_s}.".encode() + body, hashlib.sha256)
    return f"t={unix_s},v1={mac.hexdigest()}"


def pause_s(attempt: int) -> float:
    """The pause after attempt number ``attempt``, from 1: doubled each time, with jitter so that many
    webhooks don't retry at once."""
    return min(MAX_PAUSE_S, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def item_of(notice: AlertNotice) -> Item:
    """An alert as messages carry it."""
    alert = notice.alert
    return {
        "id": f"{alert.rule}/{alert.subject}/{alert.since_unix_s:.3f}/{notice.transition}/{time.time():.3f}",
        "event": notice.transition.value,
        "rule": alert.rule,
        "severity": alert.severity.value,
        "kind": alert.kind.value,
        "subject": alert.subject,
        "summary": alert.summary,
        "detail": alert.detail,
        "action": alert.action,
        "state": alert.state.value,
        "value": alert.value,
        "current": alert.current,
        "threshold": alert.threshold,
        "since_unix_s": alert.since_unix_s,
    }


class AlertDelivery:
    """Owned by one event loop. ``environ`` contains the secrets that the configuration names."""

    def __init__(
        self,
        webhooks: Iterable[WebhookConfig],
        environ: Mapping[str, str],
        plane: str,
        *,
        pause_s: Callable[[int], float] = pause_s,
    ) -> None:
        self._make = partial(_Webhook, environ=environ, plane=plane, pause=pause_s)
        self._webhooks = [self._make(config) for config in webhooks]
        self._tasks: list[asyncio.Task[None]] = []
        self._started = False

    def start(self) -> None:
        """Begin to post, in the running loop."""
        self._started = True
        self._tasks = [asyncio.create_task(webhook.run()) for webhook in self._webhooks if webhook.usable]

    def configure(self, webhooks: Iterable[WebhookConfig]) -> None:
        """Use other webhooks from now on. Alerts for a URL that is still configured stay queued."""
        waiting = self.checkpoint()
        for task in self._tasks:
            task.cancel()
        self._webhooks = [self._make(config) for config in webhooks]
        self.restore(StoredState(waiting))
        if self._started:
            self.start()

    async def close(self) -> None:
        """Stop posting; the alerts that are still queued are in :meth:`checkpoint`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def deliver(self, notices: Sequence[AlertNotice]) -> None:
        """Write notices to the log, and queue them for each webhook whose minimum severity they reach.
        Returns at once."""
        for notice in notices:
            _log(notice)
            item = item_of(notice)
            for webhook in self._webhooks:
                if notice.alert.severity.rank >= webhook.least.rank:
                    webhook.put(item)

    @property
    def views(self) -> tuple[WebhookView, ...]:
        """The state of each webhook's deliveries."""
        return tuple(webhook.view for webhook in self._webhooks)

    def checkpoint(self) -> dict[str, Any]:
        """The queued alerts by webhook. Keys are hashes, because a URL may be secret."""
        return {_KEY + webhook.key: items for webhook in self._webhooks if (items := webhook.waiting())}

    def restore(self, stored: StoredState) -> None:
        """Put the alerts of a checkpoint at the front of the queues."""
        waiting = stored.entries(_KEY, list[Item], _with_ids)
        for webhook in self._webhooks:
            webhook.restore(waiting.get(webhook.key, ()))


def _with_ids(items: list[Item]) -> list[Item]:
    if not all(isinstance(item.get("id"), str) for item in items):
        raise ValueError("an alert has no id")
    return items


@dataclass(frozen=True, slots=True)
class _DeliveryResult:
    """The result of one attempt."""

    accepted: bool
    retry: bool = False
    reason: str = ""
    after_s: float = 0.0
    """The shortest pause before the next attempt that the receiver allows."""


class _Webhook:
    """One URL, its queue, and the task that posts."""

    def __init__(
        self, config: WebhookConfig, environ: Mapping[str, str], plane: str, pause: Callable[[int], float]
    ) -> None:
        self._config = config
        self._plane = plane
        self._pause_s = pause
        address = urlsplit(config.url)
        self.name = f"{address.scheme}://{address.hostname}{f':{address.port}' if address.port else ''}"
        self.key = hashlib.sha256(config.url.encode()).hexdigest()[:16]
        self.least = Severity(config.min_severity)
        self._secret = environ.get(config.secret_env, "") if config.secret_env else ""
        self._queue: deque[Item] = deque()
        self._sending: list[Item] = []
        self._queued = asyncio.Event()
        self._delivered = self._failed = self._dropped = 0
        self._problem = ""
        self.usable = bool(self._secret) or not config.secret_env
        if not self.usable:
            self._problem = (
                f"nothing is sent: the environment variable {config.secret_env} is not set where the "
                "controller runs"
            )
            log.critical(
                "alerts can't be sent: a webhook's secret is missing",
                webhook=self.name,
                variable=config.secret_env,
                remedy="set it for Ray on every node, and restart the plane",
            )

    @property
    def view(self) -> WebhookView:
        return WebhookView(
            self.name,
            delivered=self._delivered,
            failed=self._failed,
            dropped=self._dropped,
            waiting=len(self._queue) + len(self._sending),
            problem=self._problem,
        )

    def put(self, item: Item) -> None:
        """Queue an alert; if too many wait, the oldest is dropped."""
        self._queue.append(item)
        self._trim()
        self._queued.set()

    def waiting(self) -> list[Item]:
        return [*self._sending, *self._queue]

    def restore(self, items: Iterable[Item]) -> None:
        self._queue.extendleft(reversed(list(items)))
        self._trim()
        if self._queue:
            self._queued.set()

    def _trim(self) -> None:
        while len(self._queue) > QUEUE_LIMIT:
            dropped = self._queue.popleft()
            self._dropped += 1
            if self._dropped == 1 or self._dropped % 100 == 0:
                log.error(
                    "an alert is not sent: too many wait for the webhook",
                    webhook=self.name,
                    alert=dropped["id"],
                    dropped=self._dropped,
                    problem=self._problem,
                )

    async def run(self) -> None:
        """Post queued alerts until cancelled."""
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                if not self._queue:
                    self._queued.clear()
                    await self._queued.wait()
                self._sending = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                await self._deliver(session)
                self._sending = []

    async def _deliver(self, session: aiohttp.ClientSession) -> None:
        message = {"version": VERSION, "plane": self._plane, "alerts": self._sending}
        body = json.dumps(message, ensure_ascii=False).encode()
        ids = [item["id"] for item in self._sending]
        for attempt in range(1, self._config.max_attempts + 1):
            result = await self._post(session, body)
            if result.accepted:
                self._delivered += 1
                self._problem = ""
                return
            self._problem = result.reason
            if not result.retry or attempt == self._config.max_attempts:
                break
            log.warning("alerts wait for a webhook", webhook=self.name, why=result.reason, attempt=attempt)
            await asyncio.sleep(max(self._pause_s(attempt), result.after_s))
        self._failed += 1
        log.error(
            "alerts could not be sent and are given up",
            webhook=self.name,
            why=self._problem,
            attempts=attempt,
            alerts=ids,
        )

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> _DeliveryResult:
        headers = {"content-type": "application/json", "user-agent": "tierplane"}
        if self._secret:
            headers[SIGNATURE] = signature(self._secret, body, int(time.time()))
        try:
            # A redirect would take the message elsewhere.
            async with session.post(
                self._config.url, data=body, headers=headers, allow_redirects=False
            ) as response:
                status = response.status
                if 200 <= status < 300:
                    return _DeliveryResult(True)
                retry = status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
                retry_after = response.headers.get("retry-after", "")
                after_s = min(float(retry_after), MAX_PAUSE_S) if retry_after.isdecimal() else 0.0
                return _DeliveryResult(False, retry, f"it answered {status}", after_s)
        except TimeoutError:
            return _DeliveryResult(False, True, f"no answer in {self._config.timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The error's text may contain the whole URL, which may be secret.
            return _DeliveryResult(False, True, f"it can't be reached ({type(error).__name__})")


def _log(notice: AlertNotice) -> None:
    alert = notice.alert
    values: dict[str, Any] = {
        "rule": alert.rule,
        "subject": alert.subject,
        "severity": alert.severity.value,
        "summary": alert.summary,
        "value": round(alert.value, 4),
    }
    values |= {"detail": alert.detail} if alert.detail else {}
    if notice.transition is AlertTransition.RESOLVED:
        log.info("alert over", **values)
        return
    words = "alert still fires" if notice.transition is AlertTransition.REPEATED else "alert"
    write = {Severity.INFO: log.info, Severity.WARNING: log.warning, Severity.CRITICAL: log.error}
    write[alert.severity](words, **values, action=alert.action)
