"""An address under a supervisor: nothing to start, only to see whether it answers."""

from __future__ import annotations

import time

from controlplane.config import TierConfig
from controlplane.core.domain.endpoint import EndpointState
from controlplane.engines.base import Engine
from controlplane.engines.external import address_of
from controlplane.engines.supervision.commands import CommandInbox, SupervisorCommand
from controlplane.engines.supervision.probe import ProbeResponse, get
from controlplane.engines.supervision.status import StatusBoard
from controlplane.errors import EngineStartError

_ALIVE = (200, 404, 405)
"""Not every server lists its models; that it answers is enough."""


async def watch_address(tier: TierConfig, engine: Engine, board: StatusBoard, wishes: CommandInbox) -> None:
    """Probe the tier's address until the wish to stop. One that is not there yet may come: never given up."""
    try:
        base_url, key = address_of(tier)
    except EngineStartError as error:
        board.publish(EndpointState.FAILED, diagnosis=str(error))
        while await wishes.wait(None) is not SupervisorCommand.STOP:
            wishes.forget_restart()
        return
    waiting = f"waiting for {base_url}"
    board.publish(phase=waiting, base_url=base_url, secret=key, generation=1, started_unix_s=time.time())
    failures = 0
    was_ready = False
    wait_s = 0.0
    while await wishes.wait(wait_s) is not SupervisorCommand.STOP:
        wishes.forget_restart()
        wait_s = tier.health_interval_s
        answer = await get(base_url + engine.ready_path, key, tier.health_timeout_s)
        if answer.status in _ALIVE:
            failures = 0
            was_ready = True
            board.publish(None if wishes.draining else EndpointState.READY, phase="", diagnosis="")
            continue
        failures += 1
        if not was_ready or failures >= tier.health_failures:
            state = EndpointState.RESTARTING if was_ready else EndpointState.STARTING
            board.publish(
                None if wishes.draining else state, phase=waiting, diagnosis=_said(base_url, answer, tier)
            )


def _said(base_url: str, answer: ProbeResponse, tier: TierConfig) -> str:
    text = f"{base_url}: {answer}"
    if answer.status in (401, 403):
        text += (
            f"; check the key in {tier.api_key_env}"
            if tier.api_key_env
            else "; it wants a key: name its variable in 'api_key_env'"
        )
    return text
