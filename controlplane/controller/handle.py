"""Remote calls to the controller: the one place where a method of its interface becomes a Ray call."""

from __future__ import annotations

from typing import Any

import ray

from controlplane.controller.api import Method, P, R

CONTROLLER_NAME = "tierplane-controller"


class ControllerHandle:
    """Ray's handle on the controller's actor, with the signatures of
    :class:`~controlplane.controller.api.ControllerApi`.

    A call raises Ray's errors, and RuntimeError if Ray is not connected.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call from an event loop."""
        result: R = await self._submit(method.__name__, *args, **kwargs)
        return result

    def get(self, timeout_s: float, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call and block until there is a result. Raises GetTimeoutError, which is a TimeoutError."""
        result: R = ray.get(self._submit(method.__name__, *args, **kwargs), timeout=timeout_s)
        return result

    def kill(self) -> None:
        """End the actor for good."""
        ray.kill(self._actor, no_restart=True)

    def _submit(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._actor, name).remote(*args, **kwargs)


def find_controller(namespace: str) -> ControllerHandle | None:
    """The namespace's controller; None if there is none. Blocks."""
    try:
        return ControllerHandle(ray.get_actor(CONTROLLER_NAME, namespace=namespace))
    except ValueError:
        return None
