"""Supervises a server that runs elsewhere: there is nothing to start, so it is only probed."""

from __future__ import annotations

import time

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines.base import Engine
from controlplane.engines.external import address_of
from controlplane.engines.supervision.commands import CommandInbox, SupervisorCommand
from controlplane.engines.supervision.status import StatusBoard
from controlplane.errors import EngineStartError
from controlplane.http.fetch import Page, fetch

_ALIVE = (200, 404, 405)
"""Statuses that show a working server; some servers don't list their models."""


async def watch_address(tier: TierConfig, engine: Engine, board: StatusBoard, inbox: CommandInbox) -> None:
    """Probe the tier's URL until the stop command. An unreachable server may appear later, so the
    supervisor never gives it up."""
    try:
        base_url, key = address_of(tier)
    except EngineStartError as error:
        board.publish(EndpointState.FAILED, diagnosis=str(error))
        while await inbox.wait(None) is not SupervisorCommand.STOP:
            inbox.clear_restart()
        return
    waiting = f"waiting for {base_url}"
    board.publish(phase=waiting, base_url=base_url, secret=key, generation=1, started_unix_s=time.time())
    failures = 0
    was_ready = False
    wait_s = 0.0
    while await inbox.wait(wait_s) is not SupervisorCommand.STOP:
        inbox.clear_restart()
        wait_s = tier.health_interval_s
        response = await fetch(base_url + engine.ready_path, secret=key, timeout_s=tier.health_timeout_s)
        if response.status in _ALIVE:
            failures = 0
            was_ready = True
            board.publish(None if inbox.draining else EndpointState.READY, phase="", diagnosis="")
            continue
        failures += 1
        if not was_ready or failures >= tier.health_failures:
            state = EndpointState.RESTARTING if was_ready else EndpointState.STARTING
            board.publish(
                None if inbox.draining else state,
                phase=waiting,
                diagnosis=_diagnosis(base_url, response, tier),
            )


def _diagnosis(base_url: str, response: Page, tier: TierConfig) -> str:
    text = f"{base_url}: {response}"
    if response.status in (401, 403):
        text += (
            f"; check the key in {tier.api_key_env}"
            if tier.api_key_env
            else "; it requires a key: set 'api_key_env' to the environment variable that contains it"
        )
    return text
