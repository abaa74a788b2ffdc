"""Pages that only the controller can answer (``/report``): the gateway passes the question on and waits for a
few seconds. This is no way for inference: requests to models never wait for the controller."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from controlplane.errors import ControllerUnreachable, RequestError, TierplaneError

ASK_TIMEOUT_S: Final = 4.0
RETRY_AFTER_S: Final = 5.0

Ask = Callable[..., Awaitable[Any]]
"""Calls a method of the controller, by name and with its arguments; raises a TierplaneError if it can't."""


async def ask_controller(ask: Ask | None, method: str, *args: Any, timeout_s: float = ASK_TIMEOUT_S) -> Any:
    """What the controller answers. Raises ControllerUnreachable (503) if it does not within ``timeout_s``."""
    if ask is None:
        raise ControllerUnreachable("this gateway has no controller", retry_after_s=RETRY_AFTER_S)
    try:
        return await asyncio.wait_for(ask(method, *args), timeout_s)
    except RequestError:
        raise
    except TimeoutError as error:
        message = f"the controller did not answer in {timeout_s:g} s"
        raise ControllerUnreachable(message, retry_after_s=RETRY_AFTER_S) from error
    except TierplaneError as error:
        raise ControllerUnreachable(str(error), retry_after_s=RETRY_AFTER_S) from error
