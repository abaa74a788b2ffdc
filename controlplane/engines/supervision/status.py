"""An engine's status: one immutable value that is replaced as a whole."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from controlplane.core.domain.endpoint import EndpointState


class StructuredLog(Protocol):
    """A structured logger, such as structlog's."""

    def info(self, event: str, **fields: Any) -> Any:
        """Log an event."""
        ...

    def warning(self, event: str, **fields: Any) -> Any:
        """Log a problem."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """An engine as its supervisor sees it at one moment."""

    state: EndpointState
    phase: str = ""
    """What the engine is doing while it is not ready, in words for the operator."""
    base_url: str = ""
    """The URL up to ``/v1``, without a trailing slash; empty until there is a port."""
    port: int | None = None
    secret: str = field(default="", repr=False)
    pid: int | None = None
    """Id of the engine's first process."""
    generation: int = 0
    """Number of the engine process, from 1; 0 before the first."""
    restarts: int = 0
    started_unix_s: float = 0.0
    """When this generation's process started."""
    since_unix_s: float = 0.0
    """When ``state`` was entered."""
    diagnosis: str = ""
    """Why the last generation failed or the engine was given up; empty once the engine is ready."""


class StatusBoard:
    """Holds the latest status. The supervisor's thread writes it; any thread may read it or wait for it."""

    def __init__(self, on_change: Callable[[EngineStatus], None], log: StructuredLog) -> None:
        self._on_change = on_change
        self._log = log
        self._changed = threading.Condition()
        self._status = EngineStatus(EndpointState.STARTING, since_unix_s=time.time())

    @property
    def status(self) -> EngineStatus:
        """The latest status."""
        return self._status

    def wait_for(self, states: frozenset[EndpointState], timeout_s: float) -> EngineStatus:
        """Wait up to ``timeout_s`` for one of ``states``; returns the status at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._status.state in states, timeout_s)
            return self.status

    def publish(self, state: EndpointState | None = None, **fields: Any) -> None:
        """Replace ``fields`` (and the state); if that changes anything, wake waiting threads and call
        ``on_change``."""
        with self._changed:
            before = self._status
            if state is not None and state is not before.state:
                fields |= {"state": state, "since_unix_s": time.time()}
            after = dataclasses.replace(before, **fields)
            if after == before:
                return
            self._status = after
            self._changed.notify_all()
        try:
            self._on_change(after)
        except Exception as error:
            # An error in the owner's callback must not end the engine.
            self._log.warning("status callback failed", error=repr(error))
