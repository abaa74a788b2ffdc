"""The alerts' part of the controller's actor: rules judged every few seconds, and who is told."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

import structlog

from controlplane.config import ControllerConfig
from controlplane.config.alerts import AlertsConfig
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.alerting import Alerting
from controlplane.controller.controller import Controller
from controlplane.core.alerts.views import AlertsResponse
from controlplane.core.json_values import StoredState

log = structlog.stdlib.get_logger(__name__)


class AlertLoop:
    """For the control loop's event loop. Webhooks' secrets are read from this process's environment: Ray may
    have started it anew, on another node."""

    def __init__(
        self,
        controller: Controller,
        config: ControllerConfig,
        *,
        shift_s: float,
        store_warning: Callable[[], str],
    ) -> None:
        self._config = config.alerts
        self.alerting = Alerting(controller, config.alerts, shift_s=shift_s, store_warning=store_warning)
        self._delivery = AlertDelivery(config.alerts.webhooks, os.environ, config.namespace)

    def configure(self, config: AlertsConfig) -> None:
        """Other settings from now on."""
        if config == self._config:
            return
        self._config = config
        self.alerting.configure(config)
        self._delivery.configure(config.webhooks)

    async def run(self, ready: Callable[[], bool], on_look: Callable[[], None]) -> NoReturn:
        """Judge and tell until cancelled. While not ``ready`` nothing is judged; ``on_look`` is called after
        each look, to write down what happened."""
        self._delivery.start()
        while True:
            began_s = time.monotonic()
            try:
                if ready():
                    self._delivery.tell(self.alerting.look())
                    on_look()
            except Exception as error:
                log.exception("alerts could not be judged; it is tried again", error=repr(error))
            await asyncio.sleep(max(0.0, began_s + self._config.interval_s - time.monotonic()))

    async def close(self) -> None:
        """Post nothing any more."""
        await self._delivery.close()

    def answer(self) -> AlertsResponse:
        """For people."""
        return self.alerting.answer(self._delivery.views)

    def kept(self) -> dict[str, Any]:
        """What has to survive the controller, by key."""
        return self.alerting.kept() | self._delivery.kept()

    def restore(self, stored: StoredState) -> None:
        """Restore what was stored before a restart."""
        self.alerting.restore(stored)
        self._delivery.restore(stored)
